"""The rungs of successive halving, as far as paused trials are to continue: promotion after Li et al. 2020 (ASHA)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from optuna.trial import FrozenTrial

from hpo.records import Candidate
from hpo.search.stages import stage_names
from hpo.spec.automatic import chosen_pruner
from hpo.spec.study import StudySpec
from hpo.storage.optuna_private import RUNG
from hpo.storage.trial_attrs import attrs_of, stage_of
from hpo.storage.trial_index import TrialIndex

_RUNG = re.compile(rf"{RUNG}(\d+)")


class _Place(NamedTuple):
    rung: int  # the last one that the trial has reached
    rank: int  # among the trials that have reached it, 0 the best
    of: int


class Rungs:
    """The rungs that the trials of one stage have reached, with their values there, as Optuna's pruner has noted them.

    The rule is that of the pruner, which a trial meets again if it is repeated: the best n // factor of the n trials of
    a rung continue, and one at least. Of equal ones the earlier is better.
    """

    def __init__(self, trials: Iterable[FrozenTrial], *, factor: int, maximize: bool) -> None:
        self._factor = factor
        costs: defaultdict[int, list[tuple[float, int]]] = defaultdict(list)
        for trial in trials:
            for rung, value in _values(trial).items():
                costs[rung].append((-value if maximize else value, trial.number))
        order = {rung: [number for _, number in sorted(of)] for rung, of in costs.items()}
        self._ranks = {rung: {number: rank for rank, number in enumerate(of)} for rung, of in order.items()}

    def promoted(self, paused: Iterable[FrozenTrial]) -> list[FrozenTrial]:
        """Those of the paused trials that may continue, in this order: the highest rung first, and its best first."""
        found = [(self._place(trial), trial) for trial in paused if _values(trial)]
        fit = [(place, trial) for place, trial in found if place.rank < max(1, place.of // self._factor)]
        return [trial for _, trial in sorted(fit, key=lambda pair: (-pair[0].rung, pair[0].rank))]

    def worst_first(self, paused: Iterable[FrozenTrial]) -> Sequence[FrozenTrial]:
        """The paused trials, those of the lowest rung first, and of these the worst."""
        found = [(self._place(trial) if _values(trial) else _Place(-1, 0, 0), trial) for trial in paused]
        return [trial for _, trial in sorted(found, key=lambda pair: (pair[0].rung, -pair[0].rank, pair[1].number))]

    def _place(self, trial: FrozenTrial) -> _Place:
        rung = max(_values(trial))
        ranks = self._ranks[rung]
        return _Place(rung, ranks[trial.number], len(ranks))


def _values(trial: FrozenTrial) -> dict[int, float]:
    """Rung -> value of the trial there."""
    found = {match: value for key, value in trial.system_attrs.items() if (match := _RUNG.fullmatch(key))}
    return {int(match[1]): float(value) for match, value in found.items()}


class PausedTrials:
    """The paused trials of a study: which of them continues, and which are the worst."""

    def __init__(self, spec: StudySpec) -> None:
        self._stages = stage_names(spec)
        self._thaws = spec.search.thaw is not None
        self._factor = chosen_pruner(spec)[0].reduction_factor
        self._maximize = spec.search.better == "maximize"

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
        return Rungs(trials, factor=self._factor, maximize=self._maximize)


def _of(index: TrialIndex, stage: str | None) -> list[FrozenTrial]:
    return [trial for trial in index.paused.values() if stage_of(trial) == stage]
