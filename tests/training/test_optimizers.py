"""Optimizers train as torch's own do, without torch's compiler."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from hpo.training.optimizers import eager

KINDS = [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW]

# A training with everything that a step may do, in a process of its own.
TRAINING = """
import sys
from pathlib import Path
from hpo.data.prepare import prepare
from hpo.execute.workers.task import Task, train_task
from hpo.spec.load import load_study

places = {
    "training.epochs": 2,
    "training.optimizer.name": sys.argv[2],
    "training.clip_norm": 1.0,
    "training.ema": 0.9,
    "training.augment.mixup": 0.2,
    "training.precision": "bfloat16",
}
spec = load_study("digits-cnn", overrides=places)
card = prepare(spec.data, spec.split, cache=Path(sys.argv[3]))
training = train_task(Task(0, spec.setup, 7, card, sys.argv[1]), "cpu")
message = next(training)
while not hasattr(message, "result"):
    message = training.send(True)
assert message.result.state == "complete", message.result.reason
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_those_of_torch_bit_for_bit(kind, fused):
    if fused and kind is torch.optim.RMSprop:
        pytest.skip("torch has no fused RMSprop")
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))]
    nets.append(copy.deepcopy(nets[0]))
    options = {"lr": 0.01, "weight_decay": 0.1} | ({"fused": True} if fused else {})
    optimizers = [kind(nets[0].parameters(), **options), eager(kind)(nets[1].parameters(), **options)]
    for _ in range(5):
        images = torch.randn(8, 10)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            net(images).square().mean().backward()
            optimizer.step()
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
def test_a_training_does_not_import_the_compiler(tmp_path, digits_cache, name):
    command = [sys.executable, "-c", TRAINING, str(tmp_path), name, str(digits_cache)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"], done.stderr
