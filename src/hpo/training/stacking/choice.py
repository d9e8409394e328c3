"""Choose the number of trainings in a stack by a short measurement."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import float32, nn

from hpo.data.prepare import TrialData
from hpo.models.basic import OneLogit
from hpo.models.transfer import transfer_of
from hpo.records import DataCard
from hpo.spec.models import OwnModelSpec
from hpo.spec.study import Setup
from hpo.spec.training import TrainingSpec
from hpo.training.compute.device import free_memory
from hpo.training.features import cached_views
from hpo.training.stacking.compatibility import UnstackableError
from hpo.training.stacking.speed import FULL, shared_seconds, step_seconds
from hpo.training.stacking.stack import key_of
from hpo.training.trial import build_full, measured_precision

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
