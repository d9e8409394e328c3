"""Measurements before a study runs: a rehearsal of a trial, the stack size, and a preview of augmented images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, float32, nn
from torch.nn import functional

from hpo.data.prepare import TrialData, open_trial
from hpo.errors import HpoError, TrainingError
from hpo.models import MODELS, build_model, export_program, parameter_count, save_trained
from hpo.models.backbones import Backbone
from hpo.models.basic import OneLogit
from hpo.models.transfer import Transfer, transfer_of
from hpo.records import DataCard
from hpo.spec.grid import holds, listed
from hpo.spec.models import OwnModelSpec
from hpo.spec.study import Setup, StudySpec
from hpo.spec.training import AugmentSpec, TrainingSpec
from hpo.training.augment import mix_batch
from hpo.training.batches import augmenter
from hpo.training.device import free_memory
from hpo.training.device import threads as computing_on
from hpo.training.features import cached_views, forward
from hpo.training.loop import predict_logits, train
from hpo.training.optimizers import check_optimizer
from hpo.training.stack_layers import UnstackableError, key_of
from hpo.training.stack_speed import FULL, shared_seconds, step_seconds
from hpo.training.trial import build_full, measured_precision


@dataclass(frozen=True)
class Speed:
    """Seconds of one training step, and of one epoch, estimated from a few steps.

    features_seconds: of the one pass of all images through a frozen backbone, 0 without one.
    """

    parameter_count: int
    precision: str
    batch_seconds: float
    features_seconds: float
    epoch_seconds: float


@dataclass(frozen=True)
class Preflight:
    """The speed of a training, the seconds of one export and the bytes of a model."""

    speed: Speed
    export_seconds: float
    model_bytes: int


def failing_ends(spec: StudySpec, card: DataCard) -> list[str]:
    """A line for each candidate at an end of the search space whose network or first step fails, with the reason.

    Every end of a range and every choice is tried in the study's own network, then all low and all high ends together.
    Networks but a user's own are built without memory, on torch's meta device.
    """
    found: dict[str, str] = {}
    seen = []  # most places of training do not change the network
    for values in _ends(spec):
        try:
            setup = spec.with_values(values)
            count = min(2, setup.training.micro_batch or setup.training.batch_size)
            check_optimizer(setup.training.optimizer)
            if (setup.model, count, setup.training.first_size) in seen:
                continue
            seen.append((setup.model, count, setup.training.first_size))
            _step_without_memory(setup, card, count)
        except (HpoError, ValueError, RuntimeError) as error:
            shown = ", ".join(f"{path}={value}" for path, value in values.items())
            found.setdefault(" ".join(str(error).split()), shown)
    return [f"trials with {shown} will fail: {reason}" for reason, shown in found.items()]


def _ends(spec: StudySpec) -> list[dict[str, Any]]:
    space, fixed = spec.search.whole_space, spec.fixed()
    parents = {
        path: {asked: listed(wanted)[0] for asked, wanted in parameter.when.items() if asked in space}
        for path, parameter in space.items()
    }
    tried = [{**parents[path], path: end} for path, parameter in space.items() for end in parameter.ends()]
    for side in (0, -1):
        together: dict[str, Any] = {}
        for path, parameter in space.ordered():
            if holds(parameter.when, {**fixed, **together}):
                together[path] = parameter.ends()[side]
        tried.append(together)
    return tried


def _step_without_memory(setup: Setup, card: DataCard, count: int) -> None:
    height, width, channels = card.image_shape
    classes, binary, training = len(card.class_names), setup.task == "binary", setup.training
    height, width = (max(1, round(training.size_of(1) * side)) for side in (height, width))
    with torch.device("meta" if setup.model.kind in MODELS else "cpu"):
        net = build_model(
            setup.model, image_shape=card.image_shape, classes=classes, seed=0, binary=binary, loaded=False
        )
        try:
            net.train()(torch.zeros(count, channels, height, width))
        except ValueError as error:
            raise _batch_norm_of_one(training) if "more than 1 value per channel" in str(error) else error from None


def _batch_norm_of_one(spec: TrainingSpec) -> TrainingError:
    place, size = ("micro_batch", spec.micro_batch) if spec.micro_batch else ("batch_size", spec.batch_size)
    return TrainingError(
        f"training.{place} {size}: batch norm cannot learn from pieces of one image.",
        "Take 2 or more images at once, or turn batch_norm off.",
    )


def preflight(setup: Setup, card: DataCard, *, device_name: str, seed: int, folder: Path) -> Preflight:
    """Train a few batches, evaluate them, and export. Raises TrainingError if the loss is not finite."""
    speed, net, data = _rehearse(setup, card, device_name, seed)
    started = time.perf_counter()
    save_trained(net.cpu(), setup, data, folder)
    program = export_program(folder)
    return Preflight(speed, time.perf_counter() - started, program.stat().st_size)


def measure_speed(setup: Setup, card: DataCard, *, device_name: str, seed: int, threads: int) -> Speed:
    """Train a few batches on so many CPU threads, as a worker would. Raises TrainingError as preflight does."""
    with computing_on(threads):
        return _rehearse(setup, card, device_name, seed)[0]


def _rehearse(setup: Setup, card: DataCard, device_name: str, seed: int) -> tuple[Speed, nn.Module, TrialData]:
    net, data = build_full(setup, card, seed=seed, device_name=device_name)
    whole, spec = net, setup.training
    steps = min(4, -(-len(data.train) // spec.batch_size))
    # Rows are spread over the part, because the first rows of a sorted file may be of one class.
    some = torch.linspace(0, len(data.train) - 1, min(len(data.train), steps * spec.batch_size)).long()
    few = replace(data, train=data.train[some.to(data.train.device)], valid=data.valid[:0])
    transfer, features_seconds = transfer_of(net), 0.0
    if transfer is not None and (views := cached_views(setup)) is not None:
        few, seconds = _seen(transfer, few, views)
        net, features_seconds = transfer.head, seconds * (1 + views) * card.development_count
    once = spec.model_copy(update={"epochs": 2, "patience": None})
    try:
        precision = spec.precision if spec.precision != "auto" else measured_precision(net, few, spec.batch_size)
        epochs = list(train(net, few, once, seed=seed, precision=precision))
        valid_seconds = _validation_seconds(net, few, data.valid, precision, spec.micro_batch)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise _batch_norm_of_one(spec) from None
    if not epochs:
        raise TrainingError("the training yields no epoch.", "Set training.epochs to 1 or more.")
    step_seconds = epochs[-1].seconds / steps  # the first epoch warms up
    speed = Speed(
        parameter_count=parameter_count(whole),
        precision=precision,
        batch_seconds=step_seconds,
        features_seconds=features_seconds,
        epoch_seconds=step_seconds * -(-len(data.train) // spec.batch_size) + valid_seconds,
    )
    return speed, whole, data


def _validation_seconds(
    net: nn.Module, data: TrialData, rows: Tensor, precision: str, micro_batch: int | None
) -> float:
    """Seconds of a pass through the validation images in these rows, from some of them."""
    some = rows[:1024]
    if not len(some):
        return 0.0
    started = time.perf_counter()
    predict_logits(net, data, some, precision=precision, micro_batch=micro_batch)
    return (time.perf_counter() - started) * len(rows) / len(some)


def _seen(net: Transfer, few: TrialData, views: int) -> tuple[TrialData, float]:
    """The data with features of one batch repeated for all images, and the seconds for each image."""
    images = few.images.index_select(0, few.train[:64])
    started = time.perf_counter()
    features = torch.cat([forward(body, images) for body in net.bodies if isinstance(body, Backbone)], dim=1)
    seconds = (time.perf_counter() - started) / len(images)
    # The time of a step does not depend on which image has which features.
    spread = features.to(images.device)[torch.arange(len(few.images), device=images.device) % len(features)]
    return replace(few, images=spread[:, None].expand(-1, 1 + views, -1) if views else spread), seconds


def save_preview(setup: Setup, card: DataCard, path: Path, *, images: int, copies: int, seed: int) -> Path:
    """Write a PNG with one row for each of `images` training images, class by class, and `copies` changes of each."""
    from PIL import Image

    data = open_trial(card, setup.split, device=torch.device("cpu"))
    labels = data.labels[data.train]
    by_class = [
        data.train[labels == label if labels.ndim == 1 else labels[:, label] > 0]
        for label in range(len(data.class_names))
    ]
    # Round after round of the classes; one that has no more images is left out.
    rounds = (rows[turn] for turn in range(len(data.train)) for rows in by_class if turn < len(rows))
    rows = torch.stack(list(islice(rounds, images)))
    generator = torch.Generator().manual_seed(seed)
    picture = preview(data.images[rows], setup.training.augment, generator=generator, copies=copies)
    # Small images are shown large, pixel by pixel.
    scale = max(1, 96 // data.images.shape[1])
    pixels = np.repeat(np.repeat(picture, scale, axis=0), scale, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)
    return path


def preview(images: Tensor, spec: AugmentSpec, *, generator: torch.Generator, copies: int) -> npt.NDArray[np.uint8]:
    """One picture, uint8, of images (n, height, width, channels) uint8 as training sees them.

    Each image is a row: first as it is, then `copies` random changes of it; white lines of 2 pixels separate them.
    """
    change = augmenter(spec)
    labels = torch.zeros(len(images), dtype=torch.long)
    columns = [images]
    for _ in range(copies):
        changed = images if change is None else change(images, generator)
        mixed, *_ = mix_batch(changed.permute(0, 3, 1, 2).float(), labels, spec, generator)
        columns.append(mixed.round().to(torch.uint8).permute(0, 2, 3, 1))
    framed = functional.pad(torch.stack(columns, dim=1), (0, 0, 2, 0, 2, 0), value=255)
    rows, columns_count, height, width, channels = framed.shape
    picture = framed.transpose(1, 2).reshape(rows * height, columns_count * width, channels)
    array: npt.NDArray[np.uint8] = picture[2:, 2:].cpu().numpy()
    return array


_SIZES = (4, 8, 16, 32, 64)
_WORTH = 1.15  # a stack must be faster by this factor; below it noise would decide
_MORE = 1.05  # and a larger stack faster than a smaller one by this factor
_PATIENCE = 1.0  # seconds after which no larger stack is tried


def choose_places(setups: Sequence[Setup], card: DataCard, *, device_name: str, most: int) -> tuple[int, str]:
    """The stack size at which these setups together train fastest, and ""; or 1, and the reason."""
    try:
        made = [_made(setup, card, device_name) for setup in setups]
    except UnstackableError as why:
        return 1, str(why)
    started = time.perf_counter()
    alone = [step_seconds(*each, together=1, precision=_alone(*each)) for each in made]
    if device_name == "cpu" and max(alone) > FULL:
        return 1, f"a step of the largest takes {1000 * max(alone):.1f} ms, all of it computing"
    places, factor = 1, 1.0
    for size in [size for size in _SIZES if size <= most] or [most]:
        try:
            shared = [min(shared_seconds(*each, together=size).values()) for each in made]
        except RuntimeError:  # a stack of this size does not fit on this device or fails there
            free_memory()
            break
        gain = sum(alone) / sum(shared)
        if gain < _MORE * factor:
            break
        places, factor = size, gain
        if time.perf_counter() - started > _PATIENCE:
            break
    if factor < _WORTH:
        return 1, f"side by side each is {factor:.2f} times as fast as alone here"
    return places, ""


def _alone(net: nn.Module, data: TrialData, spec: TrainingSpec) -> str:
    return spec.precision if spec.precision != "auto" else measured_precision(net, data, spec.batch_size)


def _made(setup: Setup, card: DataCard, device_name: str) -> tuple[nn.Module, TrialData, TrainingSpec]:
    """The network or head that is trained, its data and its training; a head gets features of zeros.

    Real features would take the same time. Raises UnstackableError.
    """
    if isinstance(setup.model, OwnModelSpec):
        raise UnstackableError("it is a network of your own")
    net, data = build_full(setup, card, seed=0, device_name=device_name)
    transfer = transfer_of(net)
    if transfer is not None:
        if cached_views(setup) is None:
            raise UnstackableError("it has a backbone")
        net = OneLogit(transfer.head) if setup.task == "binary" else transfer.head
        first = next(layer for layer in transfer.head.modules() if isinstance(layer, nn.Linear))
        features = data.images.new_zeros(1, dtype=float32).expand(len(data.images), first.in_features)
        data = replace(data, images=features)
    key_of(net, data, setup.training, "float32")
    return net, data, setup.training
