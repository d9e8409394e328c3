"""An index of a study's trials, updated as they end: asking takes the same time in a study of any size."""

from __future__ import annotations

import bisect
import copy
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from hpo.records import AFTER_SEARCH, TrialState
from hpo.storage.optuna_private import domination_ranks, trial_id_of
from hpo.storage.trial_attrs import attrs_of, key_of, pauses_of, retry_of, stage_of, state_of

# Samplers see at most this many trials of a long study: the best and the latest of those that have ended, and a sample
# of the others. TPE calls at most 25 trials good, which are the same with and without this; the sample tells it of the
# others. In a study of up to MOST trials, nothing is left out.
BEST, LATEST, OTHERS = 100, 100, 300
MOST = BEST + LATEST + OTHERS

_NUMBER = attrgetter("number")


class TrialCounts(NamedTuple):
    """The number of trials that count against a budget, by state: no interrupted trials, none that is retried."""

    waiting: int
    running: int
    ended: int

    @property
    def total(self) -> int:
        """The number of all of them."""
        return sum(self)


class EndedTrials:
    """The ended trials of one stage, and the paused ones as if they were pruned; maximize has one entry an objective.

    visible are those that samplers and pruners may see, by number: all but the interrupted ones; numbers are theirs.
    first_tries are the numbers of the trials that are no retry, interrupted ones included.
    """

    def __init__(self, maximize: Sequence[bool]) -> None:
        self.visible: list[FrozenTrial] = []
        self.numbers: set[int] = set()
        self.first_tries: list[int] = []
        self._signs = [-1.0 if up else 1.0 for up in maximize]
        self._costs: list[tuple[float, int, FrozenTrial]] = []  # sorted; of complete and feasible trials
        self._by_key: dict[str, list[FrozenTrial]] = {}
        self._without_key: list[FrozenTrial] = []
        self._sample: list[FrozenTrial] = []
        self._sampled_at = 0  # the number of visible trials when the sample was chosen

    def add(self, trial: FrozenTrial, seen: FrozenTrial | None) -> None:
        """Add a trial that has ended, as it is to be seen; None: not at all."""
        if retry_of(trial) is None:
            bisect.insort(self.first_tries, trial.number)
        if seen is None:
            return
        trial = seen
        self._without_key.append(trial)
        state = state_of(trial)
        if state is TrialState.STOPPED:
            return
        bisect.insort(self.visible, trial, key=_NUMBER)
        self.numbers.add(trial.number)
        feasible = all(amount <= 0 for amount in trial.constraints.values())
        if state is TrialState.COMPLETE and feasible:
            bisect.insort(self._costs, (self._signs[0] * trial.values[0], trial.number, trial))

    def remove(self, trial: FrozenTrial) -> None:
        """Remove a trial that was paused."""
        self.first_tries = [number for number in self.first_tries if number != trial.number]
        self.visible = [each for each in self.visible if each.number != trial.number]
        self.numbers.discard(trial.number)
        self._sampled_at = 0
        for found in (self._without_key, *self._by_key.values()):
            found[:] = [each for each in found if each.number != trial.number]

    def with_key(self, key: str) -> list[FrozenTrial]:
        """The trials with these parameters (see key_of), interrupted ones included."""
        # Keys take time and few searches ask for them: they are computed late.
        for trial in self._without_key:
            parameters = attrs_of(trial).parameters
            if parameters is not None:
                self._by_key.setdefault(key_of(parameters), []).append(trial)
        self._without_key = []
        return self._by_key.get(key, [])

    @property
    def best(self) -> FrozenTrial | None:
        """The complete and feasible trial with the best first objective."""
        return self._costs[0][2] if self._costs else None

    def sample(self) -> list[FrozenTrial]:
        """The trials that samplers see, by number. It depends on the trials only, not on who asks or when."""
        if len(self.visible) <= MOST:
            return self.visible
        if self._sampled_at != len(self.visible):
            others, latest = self.visible[:-LATEST], self.visible[-LATEST:]
            stride = 1
            while len(others) > stride * OTHERS:
                stride *= 2  # doubled, so that the sample stays the same for long
            chosen = {trial.number: trial for trial in [*others[::stride], *latest, *self._best()]}
            self._sample = sorted(chosen.values(), key=_NUMBER)
            self._sampled_at = len(self.visible)
        return self._sample

    def _best(self) -> list[FrozenTrial]:
        if len(self._signs) == 1 or len(self._costs) <= BEST:
            return [trial for _, _, trial in self._costs[:BEST]]
        # With several objectives: the least dominated ones.
        costs = np.array([trial.values for _, _, trial in self._costs]) * self._signs
        ranks = domination_ranks(costs, least=BEST)
        return [self._costs[row][2] for row in np.argsort(ranks, kind="stable")[:BEST]]


def _as_pruned(trial: FrozenTrial) -> FrozenTrial:
    """A paused trial as samplers and pruners see it."""
    seen = copy.copy(trial)
    seen.state = OptunaState.PRUNED
    last = trial.intermediate_values[trial.last_step] if trial.last_step is not None else math.nan
    seen.values = None if math.isnan(last) else [last]
    return seen


class TrialIndex:
    """All trials of one study, by number; a trial that has ended is never looked at twice.

    open are the trials that have not ended, without the paused ones, which are in paused; retried are the numbers of
    trials that another trial repeats. read_up_to is the highest id of an ended or paused trial up to which all trials
    were read; latest is the highest id of all. seen is how samplers and pruners see an ended trial; None: not at all,
    and it does not count.
    """

    def __init__(
        self, maximize: Sequence[bool], seen: Callable[[FrozenTrial], FrozenTrial | None] = lambda trial: trial
    ) -> None:
        self.seen = seen
        self.trials: dict[int, FrozenTrial] = {}
        self.open: dict[int, FrozenTrial] = {}
        self.paused: dict[int, FrozenTrial] = {}
        self.retried: set[int] = set()
        self.read_up_to = self.latest = -1
        self._ended: set[int] = set()
        self._stages: defaultdict[str | None, EndedTrials] = defaultdict(lambda: EndedTrials(maximize))

    def update(self, trials: Sequence[FrozenTrial]) -> None:
        """Enter trials as they are now."""
        for trial in trials:
            self.trials[trial.number] = trial
            self.latest = max(self.latest, trial_id_of(trial))
            if (original := retry_of(trial)) is not None:
                self.retried.add(original)
            known = self.paused.get(trial.number)
            if known is not None and pauses_of(known) == pauses_of(trial):
                continue
            if known is not None:
                self._stages[stage_of(trial)].remove(self.paused.pop(trial.number))
            if pauses_of(trial):
                self.open.pop(trial.number, None)
                self.paused[trial.number] = trial
                pruned = _as_pruned(trial)
                self._stages[stage_of(trial)].add(pruned, self.seen(pruned))
            elif not trial.state.is_finished():
                self.open[trial.number] = trial
            elif trial.number not in self._ended:
                self.open.pop(trial.number, None)
                self._ended.add(trial.number)
                self._stages[stage_of(trial)].add(trial, self.seen(trial))

    def ended(self, stage: str | None) -> EndedTrials:
        """The ended trials of a stage."""
        return self._stages[stage]

    def unfinished(self, stage: str | None) -> list[FrozenTrial]:
        """The trials of a stage that have not ended, by number."""
        return sorted((trial for trial in self.open.values() if stage_of(trial) == stage), key=_NUMBER)

    def count(self, stages: Collection[str | None]) -> TrialCounts:
        """The number of trials of these stages that count against a budget."""
        unfinished = (trial for number, trial in self.open.items() if number not in self.retried)
        states = [state_of(trial) for trial in unfinished if stage_of(trial) in stages]
        ended = [self._stages[stage].numbers for stage in stages]
        return TrialCounts(
            waiting=states.count(TrialState.WAITING),
            running=states.count(TrialState.RUNNING),
            ended=sum(len(numbers) - len(numbers & self.retried) for numbers in ended),
        )

    def first_tries(self, stages: Collection[str | None] | None = None, *, before: float = math.inf) -> int:
        """The number of candidates of these stages, or of the whole search: trials that are no retry.

        Interrupted trials count. before: only trials with a smaller number.
        """
        wanted = {*self._stages, *map(stage_of, self.open.values())} - {*AFTER_SEARCH} if stages is None else {*stages}
        begun = [trial for trial in self.open.values() if retry_of(trial) is None and trial.number < before]
        ended = (bisect.bisect_left(self._stages[stage].first_tries, before) for stage in wanted)
        return sum(stage_of(trial) in wanted for trial in begun) + sum(ended)
