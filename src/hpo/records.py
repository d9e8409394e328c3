"""Frozen records that pass between the rooms; plain data, importable anywhere in milliseconds."""

from __future__ import annotations

import base64
import operator
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import PurePath
from typing import Any

from hpo.metrics import direction_of

# Stages after the search, whose trials samplers never see: the winner trained again, and ensembles of trials.
FINAL, ENSEMBLE = "final", "ensemble"
AFTER_SEARCH = (FINAL, ENSEMBLE)


class TrialState(StrEnum):
    """The state of a trial. STOPPED: interrupted; it does not count, and is tried again. PAUSED: it may continue."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETE = "complete"
    PRUNED = "pruned"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def finished(self) -> bool:
        """True for the states that count against a study's budget and are never tried again."""
        return self in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)


class EndReason(StrEnum):
    """Why a run of a study ended.

    BUDGET: all trials are done. EXHAUSTED: every candidate was tried. REACHED: a trial is as good as search.until.
    ENOUGH: search.enough holds. TIMEOUT: --timeout or --minutes. INTERRUPTED: Ctrl-C, SIGTERM. STOPPED: hpo stop.
    FAILING: the first trials failed.
    """

    BUDGET = "budget"
    EXHAUSTED = "exhausted"
    REACHED = "reached"
    ENOUGH = "enough"
    TIMEOUT = "timeout"
    INTERRUPTED = "interrupted"
    STOPPED = "stopped"
    FAILING = "failing"

    @property
    def completed(self) -> bool:
        """True where nothing is left to search."""
        return self.early or self in (EndReason.BUDGET, EndReason.EXHAUSTED)

    @property
    def early(self) -> bool:
        """True where the search has found what was asked for before its budget was spent."""
        return self in (EndReason.REACHED, EndReason.ENOUGH)

    @property
    def orderly(self) -> bool:
        """True where the run ended by itself, so that its best model is registered."""
        return self.completed or self is EndReason.TIMEOUT

    @property
    def by_user(self) -> bool:
        """True where the user ended the run, and waits for it to be gone."""
        return self in (EndReason.INTERRUPTED, EndReason.STOPPED)


class FailureKind(StrEnum):
    """Why a trial did not come to its end.

    SETUP: the candidate cannot be built or trained as it is written, and hpo says why. EXCEPTION: whatever else was
    raised, most often by a network of the user's own. WORKER_DIED: the system or native code ended the process.
    INTERRUPTED: the run was stopped, or its process was gone.
    """

    NOT_FINITE = "not_finite"
    OUT_OF_MEMORY = "out_of_memory"
    SETUP = "setup"
    DATA = "data"
    EXCEPTION = "exception"
    WORKER_DIED = "worker_died"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Epoch:
    """One pass over the training part, and what the network was worth after it.

    number counts from 1; fold from 0; last says that the fold ends with it. scores holds train_loss, train_accuracy
    and, where there is a validation part, valid_<name> for each of hpo.metrics.METRICS: the loss in nats per image, the
    rest in [0, 1].
    """

    number: int
    scores: Mapping[str, float]
    learning_rate: float
    seconds: float
    fold: int = 0
    last: bool = False


def best_of(epochs: Sequence[Epoch], monitor: str) -> Epoch:
    """The epoch whose weights a training keeps: the first with the best monitored score; without one, the last."""
    if monitor not in epochs[-1].scores:
        return epochs[-1]
    sign = 1.0 if direction_of(monitor) == "maximize" else -1.0
    return max(epochs, key=lambda epoch: (sign * epoch.scores[monitor], -epoch.number))


@dataclass(frozen=True)
class Candidate:
    """What Optuna wants tried next.

    number is Optuna's; ordinal is the place in the study's own sequence, which a retried candidate keeps. parameters
    maps dotted paths of the spec to values. seed in [0, 2**31) drives initialisation, data order and dropout. deaths
    counts the tries so far whose process died. final: of a final training, its settings (FinalSpec.settings); None
    where they were not recorded, and for other trials.
    """

    number: int
    ordinal: int
    parameters: Mapping[str, Any]
    seed: int
    attempt: int = 1
    stage: str | None = None
    deaths: int = 0
    final: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Profile:
    """Seconds of a trial's epochs by phase, and the shares of its slowest operators in the time of all operators."""

    seconds: Mapping[str, float]
    operators: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialResult:
    """How one candidate ended.

    value is the objective at the best epoch (None unless complete or pruned), values are those of several objectives;
    best_epoch counts from 1 (0: none was finished). scores are those of the best epoch; with folds, their means, and
    folds has those of each. confusion is (true class, predicted class) counts on the validation part. folder is where
    weights and validation probabilities are, or ""; only its name is stored. settings are what the machine decided:
    device, precision, layout, threads, micro_batch. feasible is False where a constraint is broken or the memory does
    not suffice. failure is why a trial did not come to its end. predicted holds the predicted classes of the validation
    images, in the order of their rows (see pack_classes). ended is when, in seconds since 1970 (0.0: not known).
    profile is None where the run was not profiled. system holds system metrics over time, as columns: MLflow's names
    without its prefix system/, and `time`. members: of an ensemble, how often each of its trials
    (STUDY~GENERATION#NUMBER) counts. judged: as predicted, by members that other images chose. pauses: how often it was
    paused.
    """

    number: int
    state: TrialState
    value: float | None = None
    best_epoch: int = 0
    epochs: tuple[Epoch, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    parameter_count: int = 0
    confusion: tuple[tuple[int, ...], ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    traceback: str = ""
    folder: str = ""
    values: tuple[float, ...] = ()
    folds: tuple[Mapping[str, float], ...] = ()
    feasible: bool = True
    predicted: str = ""
    failure: FailureKind | None = None
    ended: float = 0.0
    profile: Profile | None = None
    system: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    members: Mapping[str, int] = field(default_factory=dict)
    pauses: int = 0
    judged: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; from_json takes it back."""
        return {**asdict(self), "folder": PurePath(self.folder).name}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrialResult:
        """The record that to_json wrote; keys of other versions are ignored."""
        known = {key: value for key, value in data.items() if key in cls.__dataclass_fields__}
        known["state"] = TrialState(known["state"])
        known["folder"] = PurePath(known.get("folder", "")).name  # older versions stored an absolute path
        known["failure"] = next((kind for kind in FailureKind if kind == known.get("failure")), None)
        known["epochs"] = tuple(Epoch(**epoch) for epoch in known.get("epochs", ()))
        known |= {name: tuple(known.get(name, ())) for name in ("values", "folds", "judged")}
        known["confusion"] = tuple(tuple(row) for row in known.get("confusion", ()))
        known["system"] = {name: tuple(column) for name, column in known.get("system", {}).items()}
        profile = known.get("profile") or {}  # of older versions with more fields
        known["profile"] = Profile(profile["seconds"], profile.get("operators", {})) if profile else None
        return cls(**known)


def pack_classes(classes: Sequence[int]) -> str:
    """Class numbers in [0, 65536) as text: two bytes each, base64; unpack_classes takes it back."""
    return base64.b64encode(array("H", classes).tobytes()).decode("ascii")


def unpack_classes(text: str) -> list[int]:
    """The class numbers that pack_classes wrote."""
    return array("H", base64.b64decode(text)).tolist()


@dataclass(frozen=True)
class Trial:
    """One trial as the study storage holds it: its candidate, state and result.

    run_seconds is the wall time from ask to tell; started is seconds since the epoch (0.0 while waiting). outside: the
    study's space has left it, so it does not count.
    """

    candidate: Candidate
    state: TrialState
    result: TrialResult | None = None
    started: float = 0.0
    run_seconds: float = 0.0
    worker: str = ""
    outside: bool = False

    @property
    def number(self) -> int:
        """Optuna's trial number."""
        return self.candidate.number

    @property
    def value(self) -> float | None:
        """The objective, once there is one."""
        return self.result.value if self.result else None


@dataclass(frozen=True)
class StudyResult:
    """A study as its storage holds it. name is the study's; generation counts from 1, one more for each --fresh.

    objectives holds (score, maximize or minimize) of each aim; objective and direction are those of the first. enough
    says why search.enough ended it, or is "". fitted is what --minutes made of its file (hpo.execute.budget.Fitted).
    """

    name: str
    generation: int
    direction: str
    objective: str
    trials: tuple[Trial, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)
    data_digest: str = ""
    created: float = 0.0
    objectives: tuple[tuple[str, str], ...] = ()
    enough: str = ""
    fitted: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The name under which storage and tracking know this generation: name, name~2, name~3, ..."""
        return self.name if self.generation == 1 else f"{self.name}~{self.generation}"

    @property
    def exact(self) -> str:
        """What asks for this generation, whatever newer one there is: name~1, name~2, ..."""
        return f"{self.name}~{self.generation}"

    @property
    def best(self) -> Trial | None:
        """The complete trial with the best objective; the earlier one where two are equal."""
        return next(iter(self.ranked()), None)

    def ranked(self, stage: str | None = None) -> list[Trial]:
        """Complete feasible trials of the search, or of one stage (such as FINAL), best first, earlier ones first."""
        sign = -1.0 if self.direction == "maximize" else 1.0
        done = [
            trial
            for trial in self.trials
            if trial.state is TrialState.COMPLETE
            and trial.value is not None
            and trial.result is not None
            and trial.result.feasible
            and not trial.outside
            and (trial.candidate.stage not in AFTER_SEARCH if stage is None else trial.candidate.stage == stage)
        ]
        return sorted(done, key=lambda trial: (sign * (trial.value or 0.0), trial.number))

    def after_search(self) -> list[Trial]:
        """The complete final trainings and ensembles: models that no search finds, and no limit removes."""
        return [trial for stage in AFTER_SEARCH for trial in self.ranked(stage)]

    def pareto(self) -> list[Trial]:
        """Those of ranked() that no other is at least as good as in every objective and better in one."""
        signs = [-1.0 if direction == "maximize" else 1.0 for _, direction in self.objectives]

        def costs(trial: Trial) -> list[float]:
            values = (trial.result.values if trial.result else ()) or (trial.value or 0.0,)
            return [sign * value for sign, value in zip(signs, values, strict=True)]

        ranked = [(trial, costs(trial)) for trial in self.ranked()]
        return [
            trial
            for trial, mine in ranked
            if not any(other != mine and all(map(operator.le, other, mine)) for _, other in ranked)
        ]

    @property
    def counted(self) -> tuple[Trial, ...]:
        """The trials that count against the budget: none after the search, none that was or will be run again."""
        last = {trial.candidate.ordinal: trial for trial in self.trials if trial.candidate.stage not in AFTER_SEARCH}
        return tuple(trial for trial in last.values() if trial.state is not TrialState.STOPPED and not trial.outside)

    def count(self, *states: TrialState) -> int:
        """The number of trials in one of these states."""
        return sum(trial.state in states for trial in self.trials)


@dataclass(frozen=True)
class DataCard:
    """A data set as prepared on disk, without its pixels: all that rooms other than learn need to know.

    folder holds development_images.npy (n, height, width, channels) uint8 and development_labels.npy (n,) int64: all
    images that a trial may see, an official training part first and an official validation part from row valid_start
    (None: the data set has none). The test part lies in test_folder, which no trial is given: see sealed. image_shape
    is (height, width, channels). digest is "sha256:..." over pixels and labels of all parts. official says whether the
    bytes had the publisher's checksum. files counts the files of a folder: seen, used, and those skipped by reason.
    ranges maps a kind of pixel (a numpy dtype) to the values that became 0 and 255. warnings are about images that can
    hardly be meant. groups is how many groups no two parts share, 0 where none are known. several_labels: labels are
    (n, classes) of 0 and 1. shared: the parts of the user's own that hold the same images.
    """

    name: str
    folder: str
    test_folder: str
    digest: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    development_count: int
    test_count: int
    valid_start: int | None
    official: bool
    source: str
    licence: str = ""
    citation: str = ""
    files: Mapping[str, int] = field(default_factory=dict, hash=False)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    warnings: tuple[str, ...] = field(default=(), hash=False)
    groups: int = 0
    several_labels: bool = False
    shared: tuple[str, ...] = ()

    @property
    def accounting(self) -> str:
        """Files seen, used and skipped, and why, in one line; "" where no files were read one by one."""
        if not self.files:
            return ""
        skipped = {reason: count for reason, count in self.files.items() if reason not in ("seen", "used")}
        why = f": {', '.join(f'{count:,} {reason}' for reason, count in skipped.items())}" if skipped else ""
        return f"{self.files['seen']:,} seen, {self.files['used']:,} used, {sum(skipped.values()):,} skipped{why}"

    @property
    def pixel_ranges(self) -> str:
        """The range of each kind of pixel in words."""
        return ", ".join(f"{kind} {low:g} to {high:g}" for kind, (low, high) in self.ranges.items())

    @property
    def sealed(self) -> DataCard:
        """The card without the way to the test part: what trials are handed."""
        return replace(self, test_folder="")


@dataclass(frozen=True)
class SplitCard:
    """How many images each part holds, and the share of each class in it.

    shares maps train, valid and test to one share in [0, 1] per class, in the order of the data set's class names.
    """

    counts: Mapping[str, int]
    shares: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class ModelVersion:
    """One version in the registry. model_uri loads it; scores are validation and, once opened, test scores.

    origin is the store that it was copied from, and that study and trial are of; "" where it was registered here.
    foreign: its files were made in another store, and copied or imported.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    model_uri: str
    study: str
    trial: int
    scores: Mapping[str, float] = field(default_factory=dict)
    created: float = 0.0
    origin: str = ""
    foreign: bool = False

    @property
    def generation(self) -> str:
        """Its study's title, but name~1 for a first generation: a name alone is read as the newest one."""
        return self.study if "~" in self.study else f"{self.study}~1"
