"""The rungs of successive halving, as far as paused trials are to continue: promotion after Li et al. 2020 (ASHA)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from optuna.trial import FrozenTrial

from hpo.records import Candidate
from hpo.search.halving import Floats, best_first, noted_values, rung_values, rungs_within, signs_of
from hpo.search.stages import stage_names
from hpo.spec.automatic import chosen_pruner
from hpo.spec.study import StudySpec
from hpo.storage.trial_attrs import attrs_of, stage_of
from hpo.storage.trial_index import TrialIndex


class _Place(NamedTuple):
    rung: int  # the last one that the trial has reached
    rank: int  # among the trials that have reached it, 0 the best
    of: int


class Rungs:
    """The rungs that the trials of one stage have reached; values(trial) maps each to its values there.

    The rule is that of the pruner, which a trial meets again if it is repeated: the best n // factor of the n trials of
    a rung continue, and one at least. Of equal ones the earlier is better.
    """

    def __init__(
        self,
        trials: Iterable[FrozenTrial],
        *,
        factor: int,
        signs: Floats,
        values: Callable[[FrozenTrial], Mapping[int, tuple[float, ...]]],
    ) -> None:
        self._factor, self._values = factor, values
        reached: defaultdict[int, list[tuple[int, tuple[float, ...]]]] = defaultdict(list)
        for trial in sorted(trials, key=lambda trial: trial.number):
            for rung, found in values(trial).items():
                reached[rung].append((trial.number, found))
        self._ranks: dict[int, dict[int, int]] = {}
        for rung, each in reached.items():
            order = best_first(np.array([found for _, found in each]) * signs)
            self._ranks[rung] = {each[row][0]: rank for rank, row in enumerate(order)}

    def promoted(self, paused: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the paused trials that may continue, in this order: the highest rung first, and its best first."""
        found = [(self._place(trial), trial) for trial in paused]
        fit = [(place, trial) for place, trial in found if place.rank < max(1, place.of // self._factor) and place.of]
        return [trial for _, trial in sorted(fit, key=lambda pair: (-pair[0].rung, pair[0].rank))]

    def worst_first(self, paused: Iterable[FrozenTrial]) -> Sequence[FrozenTrial]:
        """The paused trials, those of the lowest rung first, and of these the worst."""
        found = [(self._place(trial), trial) for trial in paused]
        return [trial for _, trial in sorted(found, key=lambda pair: (pair[0].rung, -pair[0].rank, pair[1].number))]

    def _place(self, trial: FrozenTrial) -> _Place:
        rung = max(self._values(trial), default=-1)
        ranks = self._ranks.get(rung, {})
        return _Place(rung, ranks.get(trial.number, 0), len(ranks))


class PausedTrials:
    """The paused trials of a study: which of them continues, and which are the worst."""

    def __init__(self, spec: StudySpec) -> None:
        self._stages = stage_names(spec)
        self._thaws = spec.search.thaw is not None
        part, _ = chosen_pruner(spec)
        self._several, self._first, self._factor = (
            bool(spec.search.objectives),
            part.min_epochs or 1,
            part.reduction_factor,
        )
        self._signs = signs_of(spec)

    def promoted(self, index: TrialIndex, resumable: Callable[[Candidate], bool]) -> FrozenTrial | None:
        """The trial to continue now, of the first stage that has one; None where there is none that is resumable."""
        for stage in self._stages if self._thaws else ():
            paused = _of(index, stage)
            for trial in self._rungs(index, stage).promoted(paused) if paused else ():
                if resumable(attrs_of(trial).candidate(trial.number)):
                    return trial
        return None

    def worst_first(self, index: TrialIndex) -> list[FrozenTrial]:
        """All of them, the worst first; those of earlier stages, which are over, before others."""
        stages = [stage for stage in self._stages if _of(index, stage)]
        return [trial for stage in stages for trial in self._rungs(index, stage).worst_first(_of(index, stage))]

    def _rungs(self, index: TrialIndex, stage: str | None) -> Rungs:
        trials = [*index.ended(stage).visible, *index.unfinished(stage)]
        values = self._noted if self._several else self._reported
        return Rungs(trials, factor=self._factor, signs=self._signs, values=values)

    def _noted(self, trial: FrozenTrial) -> dict[int, tuple[float, ...]]:
        noted = noted_values(trial.system_attrs)
        rungs = rungs_within(0, max(noted, default=0), first=self._first, factor=self._factor)
        return {rung: noted[rung] for rung in rungs if rung in noted}  # others were rungs before these moved

    def _reported(self, trial: FrozenTrial) -> dict[int, tuple[float, ...]]:
        found = rung_values(trial.intermediate_values, first=self._first, factor=self._factor)
        return {rung: (value,) for rung, value in found.items()}


def _of(index: TrialIndex, stage: str | None) -> list[FrozenTrial]:
    return [trial for trial in index.paused.values() if stage_of(trial) == stage]
