"""Fit a study to minutes: trials and, where needed, epochs and first rungs, by the speed that is measured here."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hpo.errors import HpoError, SpecError
from hpo.records import DataCard
from hpo.report.text import counted, duration
from hpo.search.stages import from_unit, total_trials
from hpo.spec.automatic import chosen_pruner
from hpo.spec.grid import holds
from hpo.spec.search import PrunerSpec
from hpo.spec.space import Choice
from hpo.spec.study import Setup, StudySpec

if TYPE_CHECKING:
    from hpo.training.preflight import Speed

_USED = 0.85  # of the time: trainings beside each other are slower than the measured one
_START = 20.0  # seconds that processes, exports and the registration take
_LEAST = 10  # trials that a search should have, before each of them is made shorter
_SHORTEST = 0.25  # of the epochs of the study file
_MOST = 1000  # trials
_SAMPLES = 4  # candidates whose speed is measured
_MEASURING = 0.03  # of the time, after which no further one is
_PRUNED = 0.6  # of the epochs are trained, by pruners without rungs
_CLOSING = 0.6  # of the time, at most, for final trainings, where they do not fit beside the search
_LATE = 2.0  # times as many epochs as successive halving trains of many trials, for it promotes the first ones
_RUNGS = ("successive_halving", "hyperband")
EPOCHS = "training.epochs"
FINAL_EPOCHS = f"final.set.{EPOCHS}"


@dataclass(frozen=True)
class Pace:
    """Seconds of an epoch of one fold of each measured candidate, and of the one pass through a frozen backbone."""

    epochs: tuple[float, ...]
    features: float = 0.0

    @property
    def epoch(self) -> float:
        """Their mean."""
        return sum(self.epochs) / len(self.epochs)


@dataclass(frozen=True)
class Fitted:
    """What was fitted to a number of minutes, stored in the study's record.

    settings maps places of the study file to (what it had, what is used). closing is the time in seconds that the last
    trials and the final trainings take. text says all of it.
    """

    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    closing: float = 0.0
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types, of what a resumed study needs."""
        return {"settings": {path: list(pair) for path, pair in self.settings.items()}, "text": self.text}


def end_of_search(deadline: float, closing: float) -> float:
    """When the search hands out its last candidate, for a final training to end in time; half the time at least.

    closing is in seconds; the others are time.monotonic() values.
    """
    return max(deadline - closing, (time.monotonic() + deadline) / 2)


def measure_pace(spec: StudySpec, card: DataCard, device: str, threads: int, seconds: float) -> Pace:
    """The speed of some candidates of the space, on so many threads, for a study that has this many seconds.

    Raises HpoError where none can be trained.
    """
    from hpo.training.device import free_memory
    from hpo.training.preflight import measure_speed
    from hpo.training.trial import trial_data

    began, problem = time.monotonic(), "no candidate of the space can be made"
    speeds: list[Speed] = []
    try:
        for setup in _some(spec):
            if speeds and time.monotonic() - began > _MEASURING * seconds:
                break
            try:
                speeds.append(measure_speed(setup, card, device_name=device, seed=0, threads=threads))
            except (HpoError, RuntimeError, MemoryError) as error:  # a candidate may fail; others tell the speed
                problem = (str(error).splitlines() or [type(error).__name__])[0]
    finally:
        trial_data.cache_clear()  # the workers need the memory
        free_memory()
    if not speeds:
        raise HpoError(f"--minutes: no speed could be measured: {problem}", "See what is wrong: hpo check STUDY")
    return Pace(tuple(speed.epoch_seconds for speed in speeds), max(speed.features_seconds for speed in speeds))


def _some(spec: StudySpec) -> list[Setup]:
    """Random candidates, the same for each call."""
    draw, setups = random.Random(0), []  # noqa: S311
    for _ in range(_SAMPLES):
        values: dict[str, Any] = {}
        for path, part in spec.search.whole_space.ordered():
            place = draw.random()
            if holds(part.when, {**spec.fixed(), **values}):
                chosen = part.choice[int(place * len(part.choice))] if isinstance(part, Choice) else None
                values[path] = chosen if isinstance(part, Choice) else from_unit(part, place)
        try:
            setups.append(spec.with_values(values))
        except SpecError:
            continue
    return setups or [spec.setup]


def fit(
    spec: StudySpec, pace: Pace, *, seconds: float, workers: int, most: int | None, done: int = 0, begun: bool = False
) -> Fitted:
    """Fit a study to the seconds that are left.

    done trials have ended. begun: trials exist, and their epochs stay. most: the trials that the user allows. The
    number of trials of a grid or of stages stays, and so do epochs that are searched.
    """
    whole = not fits_trials(spec)
    planned = total_trials(spec) if whole else most or spec.search.trials
    least = max(1, (planned if whole else min(planned, _LEAST)) - done)
    usable = max(1.0, seconds * _USED - _START - pace.features / workers)
    wanted = _one(spec, pace) * _share(spec) * least / workers
    used = spec if begun else _final_shortened(spec, pace, workers, usable=usable, search=wanted)
    kept = "they are searched" if EPOCHS in spec.search.whole_space else "it has begun" if begun else ""
    if not kept and wanted + _final(used, pace, workers) > usable:
        before = used
        share = _left(used, pace, workers, usable=usable, search=wanted)
        used = _shortened(used, max(_shortest(used), int(used.training.epochs * share)))
        kept = "" if used is not before else "others do not fit the study"
    closing = _final(used, pace, workers)
    one = _one(used, pace) * _share(used)
    trials = max(1, int((usable - closing) * workers / one))
    trials = planned if whole else min(done + trials, most or max(_MOST, done))
    settings = {**_changes(spec, used), **({} if whole else {"search.trials": (spec.search.trials, trials)})}
    expected = pace.features / workers + one * max(trials - done, 0) / workers + closing
    text = _told(spec, used, pace, trials=trials, workers=workers, expected=expected, closing=closing, kept=kept)
    return Fitted(settings, closing + _one(used, pace), text)


def fits_trials(spec: StudySpec) -> bool:
    """Whether the number of trials is fitted: that of stages and of a grid stays."""
    return not spec.search.stages and spec.search.sampler.name != "grid"


def as_written(spec: StudySpec, trials: int) -> StudySpec:
    """The spec with its file's number of trials in place of --trials, where that number is fitted.

    A later run compares what was fitted with the file.
    """
    return with_place(spec, "search.trials", trials) if fits_trials(spec) else spec


def _told(
    spec: StudySpec,
    used: StudySpec,
    pace: Pace,
    *,
    trials: int,
    workers: int,
    expected: float,
    closing: float,
    kept: str,
) -> str:
    epochs, planned = int(_mean_epochs(used)), total_trials(spec)
    words = [f"{counted(trials, 'trial')} of {epochs} epochs"]
    words += [f"the file has {planned} of {int(_mean_epochs(spec))}"] * ((trials, used) != (planned, spec))
    changed = {path: pair for path, pair in _changes(spec, used).items() if path != EPOCHS}
    words += [f"{path} {after} in place of {before}" for path, (before, after) in changed.items()]
    words += [f"the epochs stay: {kept}"] * bool(kept)
    words.append(f"an epoch takes {pace.epoch:.2g} s here (mean of {counted(len(pace.epochs), 'candidate')})")
    words += [f"the pruner leaves about {_share(used):.0%} of the epochs"] * (_share(used) < 1)
    words += [f"final training {duration(closing)}"] * bool(closing)
    words.append(f"about {duration(expected + _START)} on {counted(workers, 'worker')}")
    return "; ".join(words)


def _changes(spec: StudySpec, used: StudySpec) -> dict[str, tuple[Any, Any]]:
    places = (EPOCHS, FINAL_EPOCHS, "search.pruner.min_epochs", "search.pruner.warmup_epochs")
    pairs = {path: (_at(spec, path), _at(used, path)) for path in places}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def _at(part: Any, path: str) -> Any:
    """The value at a dotted path; a mapping's keys are paths, and None is a part that is not there."""
    if part is None or not path:
        return part
    if isinstance(part, Mapping):
        return part.get(path)
    key, _, rest = path.partition(".")
    return _at(getattr(part, key), rest)


def with_place(part: Any, path: str, value: Any) -> Any:
    """A part of a spec with another value at a dotted path, not validated again; what was not given stays so."""
    if isinstance(part, Mapping):
        return {**part, path: value}
    key, _, rest = path.partition(".")
    return part.model_copy(update={key: with_place(getattr(part, key), rest, value) if rest else value})


def as_fitted(spec: StudySpec, record: Mapping[str, Any], *, trials: bool) -> StudySpec:
    """The spec with what was fitted when the study ran with --minutes, where the file has not changed since.

    record is that of Fitted.to_json, or {}. trials: their number, too.
    """
    for path, (before, after) in record.get("settings", {}).items():
        if (trials or path != "search.trials") and _at(spec, path) == before:
            spec = with_place(spec, path, after)
    return spec


def _shortest(spec: StudySpec) -> int:
    """The epochs of the shortest training that is worth while."""
    return max(1, math.ceil(spec.training.epochs * _SHORTEST))


def _final_shortened(spec: StudySpec, pace: Pace, workers: int, *, usable: float, search: float) -> StudySpec:
    """The spec with fewer epochs of its final trainings, where they have their own and do not fit beside the search."""
    closing, epochs = _final(spec, pace, workers), _at(spec, FINAL_EPOCHS)
    if epochs is None or search + closing <= usable:
        return spec
    share = max(_CLOSING * usable, usable - search) / closing
    fewer = max(_shortest(spec), int(epochs * share))
    return with_place(spec, FINAL_EPOCHS, fewer) if fewer < epochs else spec


def _left(spec: StudySpec, pace: Pace, workers: int, *, usable: float, search: float) -> float:
    """The share of their epochs that trials have time for; final trainings without epochs of their own shrink too."""
    closing = _final(spec, pace, workers)
    if _at(spec, FINAL_EPOCHS) is None:
        return usable / (search + closing)
    return (usable - closing) / search


def _shortened(spec: StudySpec, epochs: int) -> StudySpec:
    """The spec with fewer epochs, and its pruner's first rung or warmup in proportion; itself where that is refused."""
    share, pruner = epochs / spec.training.epochs, spec.search.pruner
    used: StudySpec = with_place(spec, EPOCHS, epochs)
    if pruner.name in (*_RUNGS, "auto"):  # auto without a rung of its own chooses it from the epochs
        if pruner.min_epochs is not None:
            used = with_place(used, "search.pruner.min_epochs", max(1, round(share * pruner.min_epochs)))
    elif pruner.warmup_epochs:
        used = with_place(used, "search.pruner.warmup_epochs", round(share * pruner.warmup_epochs))
    try:
        StudySpec.model_validate(used.model_dump())
    except ValidationError:
        return spec
    return used


def _mean_epochs(spec: StudySpec) -> float:
    space = spec.search.whole_space
    ends: Sequence[Any] = space[EPOCHS].ends() if EPOCHS in space else [spec.training.epochs]
    return float(sum(ends)) / len(ends)


def _one(spec: StudySpec, pace: Pace) -> float:
    """Seconds of a whole trial."""
    return pace.epoch * _mean_epochs(spec) * _folds(spec)


def _folds(spec: StudySpec) -> int:
    return spec.split.folds if spec.split.kind == "kfold" else 1


def _final(spec: StudySpec, pace: Pace, workers: int) -> float:
    """Seconds of the final trainings."""
    if spec.final is None:
        return 0.0
    epochs = spec.final.set.get(EPOCHS, _mean_epochs(spec))
    more = 1.25 if spec.final.on == "all" else 1.0  # the validation images train, too
    return math.ceil(spec.final.trainings / workers) * pace.epoch * float(epochs) * more


def _share(spec: StudySpec) -> float:
    """The share of the epochs of its trials that a search trains, where it prunes."""
    pruner, _ = chosen_pruner(spec)
    if pruner.name == "none":
        return 1.0
    if pruner.name not in _RUNGS:
        return _PRUNED
    # Their rungs count on from fold to fold.
    return min(1.0, _LATE * _halved(pruner, _mean_epochs(spec) * _folds(spec)))


def _halved(pruner: PrunerSpec, epochs: float) -> float:
    """The share that successive halving trains of many trials: one in `factor` goes on from each rung."""
    rung, share, reached, trained = float(pruner.min_epochs or 1), 1.0, 0.0, 0.0
    while rung < epochs:
        trained += share * (rung - reached)
        rung, share, reached = rung * pruner.reduction_factor, share / pruner.reduction_factor, rung
    return (trained + share * (epochs - reached)) / epochs
