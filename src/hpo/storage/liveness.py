"""Who answers for which trial, and who is dead: by the locks that can be seen, by signs of life where they cannot."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.storage.heartbeat import Pulse
from hpo.storage.lease import Lease
from hpo.storage.optuna_storage import START, Storage, result_of, start_of

_REMOTE_GRACE = 600.0  # seconds in which a supervisor elsewhere brings a trial's run in MLflow to its end


class Roll:
    """The supervisors of one study, as the holder of lease sees them; running() gives the trials that are its own."""

    def __init__(self, storage: Storage, study_id: int, lease: Lease, running: Callable[[], Sequence[Any]]) -> None:
        self._storage, self._id, self._lease = storage, study_id, lease
        self._pulse = Pulse(storage, lambda: [trial._trial_id for trial in running()]) if storage.shared else None

    def gone(self, trials: Iterable[FrozenTrial], *, mine: Container[int]) -> list[FrozenTrial]:
        """Those that run under a dead supervisor, or under this one, which has not their number among mine."""
        silent = self._silent()

        def abandoned(trial: FrozenTrial) -> bool:
            if trial.state is not optuna.trial.TrialState.RUNNING or START not in trial.user_attrs:
                return False
            lease = start_of(trial).lease
            if lease == self._lease.name:
                return trial.number not in mine  # killed between taking it up and signing for it
            return not self._lease.alive(lease) if self._lease.near(lease) else trial._trial_id in silent

        return [trial for trial in trials if abandoned(trial)]

    def attended(self, trials: Iterable[FrozenTrial]) -> set[int]:
        """Numbers of those that another living supervisor answers for, see Study.attended."""
        found, silent, now = set(), self._silent(), time.time()
        living: dict[str, bool] = {self._lease.name: False, "": False}
        for trial in trials:
            lease = start_of(trial).lease
            if self._lease.near(lease):
                if lease not in living:
                    living[lease] = self._lease.alive(lease)
                theirs = living[lease]
            elif trial.state.is_finished():
                result = result_of(trial)
                theirs = result is not None and now - result.ended < _REMOTE_GRACE
            else:
                theirs = trial._trial_id not in silent
            found |= {trial.number} if theirs else set()
        return found

    def listen(self) -> None:
        """Wait until the silence of supervisors elsewhere would mean that they are dead, see Pulse."""
        if self._pulse is not None:
            self._pulse.await_steady()

    def close(self) -> None:
        """Give no more signs of life."""
        if self._pulse is not None:
            self._pulse.close()

    def _silent(self) -> set[int]:
        """Optuna's ids of running trials whose supervisor, on whatever machine, gives no sign of life."""
        return self._storage.silent(self._id) if self._pulse is not None and self._pulse.steady else set()
