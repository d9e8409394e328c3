"""The events of a run: all that leaves the supervisor. Subscribers track, keep models, clean up and display them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpo.records import Candidate, DataCard, EndReason, Epoch, ModelVersion, SplitCard, StudyResult, Trial, TrialResult


@dataclass(frozen=True)
class Notice:
    """A line for the user: a download in progress, a decision, a warning. total 0: no measure of progress."""

    text: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class StudyOpened:
    """The study is ready to hand out trials.

    budget is the study's total of trials; finished counts those done by earlier runs. stack is the number of trainings
    that each worker does at once; alone says why that is 1, where it was measured. trials_of_others: the numbers of
    those that other living supervisors answer for.
    """

    study: StudyResult
    data: DataCard
    split: SplitCard
    budget: int
    finished: int
    workers: int
    device: str
    stack: int = 1
    alone: str = ""
    trials_of_others: frozenset[int] = frozenset()


@dataclass(frozen=True)
class TrialStarted:
    """A worker has the candidate. setup (hpo.spec.study.Setup) is all it trains with; started is in epoch seconds.

    setup is None for values that do not fit together. Where the event was read from a storage, started is 0.0 too.
    """

    candidate: Candidate
    worker: str
    setup: Any = None
    started: float = 0.0


@dataclass(frozen=True)
class EpochEnded:
    """One more epoch of a running trial. costs are those of its network, where a pruner compares them."""

    number: int
    epoch: Epoch
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialEnded:
    """A trial is over, and Optuna's storage has its result. best: the best of the search so far."""

    result: TrialResult
    best: bool = False


@dataclass(frozen=True)
class TrialPaused:
    """The pruner has ended a trial that may go on later: a TrialStarted follows then, or its TrialEnded at the end."""

    result: TrialResult


@dataclass(frozen=True)
class TrialsReaped:
    """Trials of another supervisor that died were stopped or finished; study holds them."""

    study: StudyResult
    trials_of_others: frozenset[int]


@dataclass(frozen=True)
class SearchEnded:
    """The run hands out no more trials, and none is running.

    summarize: this run writes the study's summary; of several supervisors that end together one does.
    """

    study: StudyResult
    reason: EndReason
    trials_of_others: frozenset[int] = frozenset()
    summarize: bool = True


@dataclass(frozen=True)
class WinnerChosen:
    """The study's best trial, if any. remarks are lines for the summary.

    register: its model is to become the challenger; False if the study was cut short or continues elsewhere.
    """

    study: StudyResult
    reason: EndReason
    winner: Trial | None
    remarks: tuple[str, ...] = ()
    register: bool = True
    summarize: bool = True


@dataclass(frozen=True)
class StudyProfiled:
    """Where the time of a run went.

    trials counts those that this run profiled. seconds is how long its workers were ready; phases holds seconds of all
    workers together and adds up to workers * seconds. outside holds CPU seconds of the other processes. operators holds
    shares as in Profile, averaged over the trials.
    """

    trials: int
    workers: int
    seconds: float
    phases: Mapping[str, float]
    outside: Mapping[str, float]
    operators: Mapping[str, float]


@dataclass(frozen=True)
class StudyEnded:
    """The run is over; model is the registered challenger.

    ensemble says in one line what an ensemble of the study gains, or "".
    """

    study: StudyResult
    reason: EndReason
    model: ModelVersion | None = None
    ensemble: str = ""


# The events that a caller's watch function sees. Subscribers inside the run see RunEvent.
Event = Notice | StudyOpened | TrialStarted | EpochEnded | TrialPaused | TrialEnded | StudyProfiled | StudyEnded
RunEvent = Event | TrialsReaped | SearchEnded | WinnerChosen
