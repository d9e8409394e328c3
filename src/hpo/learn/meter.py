"""Profile one trial: a clock for its phases, the work of its network, and what the device could do at best."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from hpo.learn.data import TrialData
from hpo.learn.roofline import peaks, synchronise, work_of
from hpo.learn.train import input_of
from hpo.profile import NO_CLOCK, Clock, Profile
from hpo.spec.training import TrainingSpec


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
        with contextlib.suppress(Exception):  # a network of the user's own may refuse to be watched: it has no figures
            work = work_of(net, input_of(data)(data.images[rows]), data.labels[rows], precision=precision)
            self._epoch = batches * work[0], batches * work[1]
            self._peaks = peaks(self._device_name, precision, torch.get_num_threads())
        self.clock.lap("profile")

    def trained(self, *, epochs: int) -> None:
        """So many epochs of the network that was built last are over."""
        self._done = self._done[0] + epochs * self._epoch[0], self._done[1] + epochs * self._epoch[1]

    def profile(self) -> Profile | None:
        """What there is to say of the trial so far."""
        return Profile(dict(self.clock.seconds), dict(self.clock.cpu_seconds), *self._done, *self._peaks)


class _Off(Meter):
    """The meter of a trial that nobody profiles."""

    def __init__(self) -> None:
        self.clock = NO_CLOCK

    def built(self, net: nn.Module, data: TrialData, spec: TrainingSpec, *, precision: str) -> None:
        """Nobody asks."""

    def trained(self, *, epochs: int) -> None:
        """Nobody asks."""

    def profile(self) -> Profile | None:
        """Nobody asks."""
        return None


NO_METER: Meter = _Off()
