"""One real batch through everything that a trial does, timed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hpo.errors import TrainingError
from hpo.learn.export import export_program, save_trained
from hpo.learn.models import build_model, parameter_count
from hpo.learn.train import train
from hpo.learn.trial import measured_precision, trial_data
from hpo.records import DataCard
from hpo.spec.study import Setup


@dataclass(frozen=True)
class Preflight:
    """Seconds of one training step, of one epoch (estimated from a few steps) and of one export; bytes of a model."""

    parameter_count: int
    precision: str
    batch_seconds: float
    epoch_seconds: float
    export_seconds: float
    model_bytes: int


def preflight(setup: Setup, card: DataCard, *, device_name: str, seed: int, folder: Path) -> Preflight:
    """Train a few batches, evaluate them, and export. Raises TrainingError where the loss is not finite."""
    data = trial_data(card, setup.split, device_name)
    spec = setup.training
    classes, binary = len(data.class_names), setup.task == "binary"
    net = build_model(setup.model, image_shape=card.image_shape, classes=classes, seed=seed, binary=binary)
    net.to(torch.device(device_name))
    precision = spec.precision if spec.precision != "auto" else measured_precision(net, data, spec.batch_size)
    steps = min(4, -(-len(data.train) // spec.batch_size))
    # Rows spread over the part: the first rows of a sorted file may be of one class.
    some = torch.linspace(0, len(data.train) - 1, min(len(data.train), steps * spec.batch_size)).long()
    few = replace(data, train=data.train[some.to(data.train.device)], valid=data.valid[:1024])
    once = spec.model_copy(update={"epochs": 2, "patience": None})
    epochs = list(train(net, few, once, seed=seed, precision=precision))
    if not epochs:
        raise TrainingError("the training yields no epoch.", "Set training.epochs to 1 or more.")
    step_seconds = epochs[-1].seconds / steps  # the first epoch warms up
    started = time.perf_counter()
    save_trained(net.cpu(), data, folder)
    program = export_program(setup, folder)
    return Preflight(
        parameter_count=parameter_count(net),
        precision=precision,
        batch_seconds=step_seconds,
        epoch_seconds=step_seconds * -(-len(data.train) // spec.batch_size),
        export_seconds=time.perf_counter() - started,
        model_bytes=program.stat().st_size,
    )
