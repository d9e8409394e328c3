"""A study's trials, sorted once as they end, which never change then: asking costs the same in a study of any size."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import optuna
from optuna.study._multi_objective import _fast_non_domination_rank
from optuna.trial import FrozenTrial

from hpo.records import FINAL, TrialState
from hpo.storage.trial_attrs import key_of, retry_of, stage_of, start_of, state_of

# What samplers are shown of a long study: the best and the latest of the trials that have ended, and a sample of the
# others. TPE calls at most 25 trials good, which are the same with and without this; what it thinks of the others it
# learns from the sample. Up to so many trials in all, nothing is left out.
BEST, LATEST, OTHERS = 100, 100, 300
MOST = BEST + LATEST + OTHERS

_NUMBER = attrgetter("number")


class Tally(NamedTuple):
    """How many trials count against a budget: none that was interrupted, none that is run again."""

    waiting: int
    running: int
    ended: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Shelf:
    """The trials of one stage that have ended; maximize has one entry for each objective.

    ended are those that samplers and pruners may see, by number: all but the interrupted ones; numbers are theirs.
    first_tries are the numbers of those that are no retry, interrupted ones too.
    """

    def __init__(self, maximize: Sequence[bool]) -> None:
        self.ended: list[FrozenTrial] = []
        self.numbers: set[int] = set()
        self.first_tries: list[int] = []
        self._signs = [-1.0 if up else 1.0 for up in maximize]
        self._costs: list[tuple[float, int, FrozenTrial]] = []  # sorted; of complete and feasible trials
        self._keyed: dict[str, list[FrozenTrial]] = {}
        self._unkeyed: list[FrozenTrial] = []
        self._shown: list[FrozenTrial] = []
        self._shown_of = 0  # how many had ended when that was chosen

    def add(self, trial: FrozenTrial) -> None:
        """Put a trial on the shelf."""
        if retry_of(trial) is None:
            bisect.insort(self.first_tries, trial.number)
        self._unkeyed.append(trial)
        if state_of(trial) is TrialState.STOPPED:
            return
        bisect.insort(self.ended, trial, key=_NUMBER)
        self.numbers.add(trial.number)
        feasible = all(amount <= 0 for amount in trial.constraints.values())
        if trial.state is optuna.trial.TrialState.COMPLETE and feasible:
            bisect.insort(self._costs, (self._signs[0] * trial.values[0], trial.number, trial))

    def same(self, key: str) -> list[FrozenTrial]:
        """The trials with these parameters (see key_of), interrupted ones too."""
        self._key()
        return self._keyed.get(key, [])

    def shown(self) -> list[FrozenTrial]:
        """What samplers see of it, by number: the same for the same trials, whoever asks and whenever."""
        if len(self.ended) <= MOST:
            return self.ended
        if self._shown_of != len(self.ended):
            others, latest = self.ended[:-LATEST], self.ended[-LATEST:]
            stride = 1
            while len(others) > stride * OTHERS:
                stride *= 2  # doubled, so that the sample stays the same for long
            chosen = {trial.number: trial for trial in [*others[::stride], *latest, *self._best()]}
            self._shown = sorted(chosen.values(), key=_NUMBER)
            self._shown_of = len(self.ended)
        return self._shown

    def _best(self) -> list[FrozenTrial]:
        if len(self._signs) == 1 or len(self._costs) <= BEST:
            return [trial for _, _, trial in self._costs[:BEST]]
        # With several objectives: the least dominated ones.
        costs = np.array([trial.values for _, _, trial in self._costs]) * self._signs
        ranks = _fast_non_domination_rank(costs, n_below=BEST)
        return [self._costs[place][2] for place in np.argsort(ranks, kind="stable")[:BEST]]

    def _key(self) -> None:
        """Keys take time and few searches ask for them: they are made late."""
        for trial in self._unkeyed:
            parameters = start_of(trial).parameters
            if parameters is not None:
                self._keyed.setdefault(key_of(parameters), []).append(trial)
        self._unkeyed = []


class Books:
    """All trials of one study. open maps numbers to trials that have not ended; again are numbers that are run again.

    read takes in what was read from the storage since; a trial that had ended by then is never looked at twice.
    """

    def __init__(self, maximize: Sequence[bool]) -> None:
        self.open: dict[int, FrozenTrial] = {}
        self.again: set[int] = set()
        self._ended: set[int] = set()
        self._shelves: defaultdict[str | None, Shelf] = defaultdict(lambda: Shelf(maximize))

    def read(self, trials: Sequence[FrozenTrial]) -> None:
        """Enter trials as they stand now."""
        for trial in trials:
            if (original := retry_of(trial)) is not None:
                self.again.add(original)
            if not trial.state.is_finished():
                self.open[trial.number] = trial
            elif trial.number not in self._ended:
                self.open.pop(trial.number, None)
                self._ended.add(trial.number)
                self._shelves[stage_of(trial)].add(trial)

    def shelf(self, stage: str | None) -> Shelf:
        """What has ended of a stage."""
        return self._shelves[stage]

    def under_way(self, stage: str | None) -> list[FrozenTrial]:
        """What has not ended of a stage, by number."""
        return sorted((trial for trial in self.open.values() if stage_of(trial) == stage), key=_NUMBER)

    def tally(self, stages: Collection[str | None]) -> Tally:
        """What of these stages counts against a budget."""
        under_way = (trial for number, trial in self.open.items() if number not in self.again)
        states = [state_of(trial) for trial in under_way if stage_of(trial) in stages]
        ended = [self._shelves[stage].numbers for stage in stages]
        return Tally(
            waiting=states.count(TrialState.WAITING),
            running=states.count(TrialState.RUNNING),
            ended=sum(len(numbers) - len(numbers & self.again) for numbers in ended),
        )

    def first_tries(self, stages: Collection[str | None] | None = None, *, before: float = math.inf) -> int:
        """How many candidates of these stages, or of the whole search, there are: trials that are no retry.

        Interrupted ones count. before: only trials with a smaller number.
        """
        wanted = {*self._shelves, *map(stage_of, self.open.values())} - {FINAL} if stages is None else {*stages}
        begun = [trial for trial in self.open.values() if retry_of(trial) is None and trial.number < before]
        ended = (bisect.bisect_left(self._shelves[stage].first_tries, before) for stage in wanted)
        return sum(stage_of(trial) in wanted for trial in begun) + sum(ended)
