"""How fast networks train in a stack and alone: what decides whether they share, and in which precision."""

from __future__ import annotations

import copy
from collections.abc import Generator
from dataclasses import replace

import torch
from torch import nn

from hpo.data.prepare import TrialData
from hpo.records import Epoch
from hpo.spec.training import TrainingSpec
from hpo.training.device import device_clock, has_bfloat16
from hpo.training.loop import train
from hpo.training.stack import Stack

_STEPS = 4
_SOME = 4  # networks in a measured stack, which represents larger ones
FULL = 0.003  # seconds; a CPU step that takes longer is all arithmetic, and a stack does not make it faster


def step_seconds(net: nn.Module, data: TrialData, spec: TrainingSpec, *, together: int, precision: str) -> float:
    """Seconds of a training step for each of `together` such networks; 1 is alone. The network is unchanged.

    On a CPU they are CPU seconds of this thread, so other processes do not count.
    """
    rows = data.train[: _STEPS * spec.batch_size]
    few = replace(data, train=rows, valid=data.valid[:0])
    brief = spec.model_copy(update={"epochs": 2, "patience": None, "precision": precision})
    nets = [copy.deepcopy(net) for _ in range(together)]
    clock = device_clock(few.images.device)
    with torch.random.fork_rng(devices=[few.images.device] if few.images.device.type == "cuda" else []):
        if together == 1:
            fits: list[Generator[Epoch | None, None, None]] = [train(nets[0], few, brief, seed=0, precision=precision)]
        else:
            stack = Stack(precision=precision)
            fits = [stack.join(each, few, brief, seed=0) for each in nets]
        for _ in range(brief.epochs):  # the first warms up
            started = clock()
            for waits in [fit for fit in fits if next(fit) is None]:
                next(waits)
            seconds = clock() - started
        for fit in fits:
            fit.close()
    return seconds / together / -(-len(rows) // spec.batch_size)


def shared_precision(net: nn.Module, data: TrialData, spec: TrainingSpec) -> str:
    """float32 or bfloat16, whichever trains a stack of networks like this one faster."""
    if not has_bfloat16(data.images.device):
        return "float32"
    seconds = shared_seconds(net, data, spec, together=_SOME)
    return min(seconds, key=seconds.__getitem__)


def why_slower_stacked(net: nn.Module, data: TrialData, spec: TrainingSpec) -> str:
    """The reason why a network like this one trains faster alone on its device; "" if it does not."""
    alone = min(shared_seconds(net, data, spec, together=1).values())
    if data.images.device.type == "cpu" and alone > FULL:
        return f"a step takes {1000 * alone:.1f} ms, all of it computing"
    gain = alone / min(shared_seconds(net, data, spec, together=_SOME).values())
    return "" if gain > 1 else f"side by side it is {gain:.2f} times as fast as alone here"


def shared_seconds(net: nn.Module, data: TrialData, spec: TrainingSpec, *, together: int) -> dict[str, float]:
    """Seconds of a step in a stack of `together` (1: alone), by precision that the spec and the device allow."""
    half = spec.precision == "bfloat16" or (spec.precision == "auto" and has_bfloat16(data.images.device))
    precisions = ["float32"] * (spec.precision != "bfloat16") + ["bfloat16"] * half
    return {each: step_seconds(net, data, spec, together=together, precision=each) for each in precisions}
