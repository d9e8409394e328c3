"""Profile one trial: a clock for its phases, the work of its network, and what the device could do at best."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import nn

from hpo.data.prepare import TrialData
from hpo.models.inputs import input_of
from hpo.profile import NO_CLOCK, Clock, Profile
from hpo.spec.training import TrainingSpec
from hpo.training.compute.roofline import peaks, synchronise, work_of
from hpo.training.growing_subset import GrowingRows


class Meter:
    """One trial's: built and trained for each fold, then profile."""

    def __init__(self, device_name: str) -> None:
        self.clock = Clock(synchronise(torch.device(device_name)))
        self._device_name = device_name
        self._epoch = self._done = 0.0, 0.0
        self._peaks = 0.0, 0.0

    def built(self, net: nn.Module, data: TrialData, spec: TrainingSpec, *, precision: str) -> None:
        """A network is ready to be trained: count what an epoch of it computes and moves."""
        self.clock.lap("load")
        rows = data.train[: spec.micro_batch or spec.batch_size]
        batches = len(data.train) / len(rows)
        self._growing = GrowingRows(data, spec, seed=0)
        self._whole = -(-len(data.train) // spec.batch_size)
        with contextlib.suppress(Exception):  # a network of the user's own may refuse to be watched: it has no figures
            work = work_of(net, input_of(data)(data.images[rows]), data.labels[rows], precision=precision)
            self._epoch = batches * work[0], batches * work[1]
            self._peaks = peaks(self._device_name, precision, torch.get_num_threads())
        self.clock.lap("profile")

    def trained(self, epochs: Sequence[int]) -> None:
        """Epochs of these numbers of the network that was built last are over."""
        steps = self._growing.batches
        shares = sum(steps(number) - steps(number - 1) for number in epochs) / self._whole
        self._done = self._done[0] + shares * self._epoch[0], self._done[1] + shares * self._epoch[1]

    def profile(self) -> Profile | None:
        """What there is to say of the trial so far."""
        return Profile(dict(self.clock.seconds), dict(self.clock.cpu_seconds), *self._done, *self._peaks)


class _Off(Meter):
    """The meter of a trial that nobody profiles."""

    def __init__(self) -> None:
        self.clock = NO_CLOCK

    def built(self, net: nn.Module, data: TrialData, spec: TrainingSpec, *, precision: str) -> None:
        """Nobody asks."""

    def trained(self, epochs: Sequence[int]) -> None:
        """Nobody asks."""

    def profile(self) -> Profile | None:
        """Nobody asks."""
        return None


NO_METER: Meter = _Off()
