"""Trials that are paused in place of pruned: which ones, and whose checkpoints the disk has room for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hpo.execute.workdir import checkpoint_file
from hpo.records import FINAL, Candidate, Epoch, Profile, TrialResult, TrialState
from hpo.search.study import Study
from hpo.spec.study import StudySpec


class Pauses:
    """The pauses of one run of a study; work is its folder of work in progress. allowed: it has any (search.thaw)."""

    def __init__(self, spec: StudySpec, study: Study, work: Path) -> None:
        self.allowed = spec.search.thaw is not None
        self._room = 1e9 * spec.search.thaw.disk_gb if spec.search.thaw else 0.0
        self._objective = spec.search.objective
        self._study, self._work = study, work

    def has_checkpoint(self, candidate: Candidate) -> bool:
        """Whether the checkpoint of a paused trial is here: another machine of the study may have it."""
        return checkpoint_file(self._work, candidate).is_file()

    def settled(self, result: TrialResult, candidate: Candidate, before: TrialResult | None) -> TrialResult:
        """The result of a trial, paused where the pruner has ended it and it can continue.

        before is what it had when it was paused last. A network that is too large, or a training that was begun again
        with smaller pieces, has no state to continue from.
        """
        paused = (
            self.allowed
            and candidate.stage != FINAL
            and result.state is TrialState.PRUNED
            and len(result.epochs) > 0
            and result.feasible
            and "micro_batch" not in result.settings
            and math.isfinite(result.epochs[-1].scores.get(self._objective, math.nan))
            and self.has_checkpoint(candidate)
        )
        pauses = paused + (before.pauses if before else 0)
        if before is not None and result.state is not TrialState.STOPPED:
            result = replace(
                result,
                seconds=before.seconds + result.seconds,
                system=_joined(before.system, result.system),
                profile=_added(before.profile, result.profile),
            )
        return replace(result, state=TrialState.PAUSED if paused else result.state, pauses=pauses)

    def too_many(self) -> list[int]:
        """The numbers of the worst paused trials: without their checkpoints, the others fit the disk budget."""
        trials = [(candidate.number, self._size(candidate)) for candidate in self._study.worst_paused()]
        excess, chosen = sum(size for _, size in trials) - self._room, []
        for number, size in trials:
            if excess <= 0:
                break
            chosen += [number] if size else []
            excess -= size
        return chosen

    def _size(self, candidate: Candidate) -> int:
        try:
            return checkpoint_file(self._work, candidate).stat().st_size
        except OSError:
            return 0


def is_known(epoch: Epoch, before: TrialResult | None) -> bool:
    """Whether an epoch of a trial comes from its checkpoint: before is what it had when it was paused."""
    told = before.epochs[-1:] if before else ()
    return any((epoch.fold, epoch.number) <= (last.fold, last.number) for last in told)


def _joined(
    earlier: Mapping[str, tuple[float, ...]], later: Mapping[str, tuple[float, ...]]
) -> Mapping[str, tuple[float, ...]]:
    """The columns of both, one after the other; only the later ones where they differ in kind."""
    if earlier.keys() != later.keys():
        return later
    return {name: (*column, *later[name]) for name, column in earlier.items()}


def _added(earlier: Profile | None, later: Profile | None) -> Profile | None:
    """The seconds of both, and the slowest operators of the later one."""
    if earlier is None or later is None:
        return later
    phases = {*earlier.seconds, *later.seconds}
    seconds = {name: earlier.seconds.get(name, 0.0) + later.seconds.get(name, 0.0) for name in sorted(phases)}
    return Profile(seconds, later.operators)
