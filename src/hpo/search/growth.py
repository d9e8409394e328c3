"""A study whose space has changed: what changed, which of its trials count on, and how samplers see those.

Optuna cannot change the options of a parameter within a study. Such a parameter therefore gets a new name in Optuna's
storage (`path~2`), and earlier trials are shown to samplers and pruners as if they had been drawn from the new space.
Stored, they stay as they are, with their numbers, results and runs. So a study may grow any number of times, and the
candidates that follow depend on the storage alone, as always.

The study's record has `grown`, a list with what each growth changed, and `outside`, the numbers of trials that do not
count, since they are not in the space of now.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import check_distribution_compatibility
from optuna.trial import FrozenTrial
from pydantic import ValidationError

from hpo.errors import SpecError
from hpo.records import FINAL, FailureKind, TrialResult, TrialState
from hpo.search.stages import Stage, distribution, encode
from hpo.spec.grid import holds
from hpo.spec.space import Choice, Float, Int, Space
from hpo.spec.study import Setup, StudySpec
from hpo.storage.optuna_private import FIXED, trial_id_of
from hpo.storage.optuna_storage import Storage
from hpo.storage.trial_attrs import RESULT, START, attrs_of, held_of, key_of, pauses_of, stage_of, state_of

_OPTIMIZER = ("cma:", "sepcma:", "cmawm:")  # what CMA-ES noted of its state, which holds for the space of then


class Fitting:
    """The space of a spec, for trials that were drawn from another one."""

    def __init__(self, spec: StudySpec) -> None:
        self._space = spec.search.space
        self._parameters = self._space.ordered()
        self._fixed = spec.fixed()
        self._file = spec.setup.model_dump(mode="json")

    def values(self, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
        """The trial's values of this space; None where it is not in the space.

        It is where each value is taken, and every other place has the value of the study file.
        """
        found: dict[str, Any] = {}
        for path, part in self._parameters:
            if holds(part.when, {**self._fixed, **found}):
                if path not in parameters or not part.takes(parameters[path]):
                    return None
                found[path] = parameters[path]
        others = {path: value for path, value in parameters.items() if path not in found}
        same = all(key_of({path: value}) == key_of({path: place(self._file, path)}) for path, value in others.items())
        return found if same else None


def place(tree: Mapping[str, Any], path: str) -> Any:
    """What a mapping of mappings has at a dotted path; None where there is nothing."""
    found: Any = tree
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def has_place(tree: Mapping[str, Any], path: str) -> bool:
    """Whether a mapping of mappings has a dotted path, be it null there."""
    stem, _, last = path.rpartition(".")
    holder = place(tree, stem) if stem else tree
    return isinstance(holder, Mapping) and last in holder


@dataclass(frozen=True)
class Growth:
    """How a space differs from that of the study's record, before; trials are all that it has."""

    spec: StudySpec
    before: Mapping[str, Any]
    trials: tuple[FrozenTrial, ...]

    @cached_property
    def old(self) -> Space:
        """The space of before."""
        return Space.model_validate(self.before["spec"]["search"]["space"])

    @cached_property
    def apart(self) -> frozenset[str]:
        """The paths that only one of the two spaces has: their settings in the study file are free to differ."""
        return frozenset(set(self.old.root) ^ set(self.spec.search.space.root))

    @cached_property
    def changes(self) -> list[str]:
        """What has changed, a text for each parameter; [] where nothing has but priors and the order."""
        return [text for text, _ in self._differences()]

    @cached_property
    def harmless(self) -> bool:
        """Whether there are no trials, or only ends of ranges have changed and no trial is lost by it.

        Nor is one that runs or was interrupted, which would be tried again with its values of before.
        """
        known = set(self.before.get("outside", []))
        plain = all(plain for _, plain in self._differences()) and self.outside <= known
        return not self.trials or (plain and not self._stranded and not any(map(pauses_of, self.trials)))

    @cached_property
    def _stranded(self) -> list[FrozenTrial]:
        """The trials of the search that have not ended, and whose values are not in the space."""
        begun = [trial for trial in self.trials if stage_of(trial) is None and not trial.state.is_finished()]
        drawn = [trial for trial in begun if attrs_of(trial).parameters is not None]
        return [trial for trial in drawn if self._fitting.values(parameters_of(trial, self._grown)) is None]

    def _differences(self) -> Iterator[tuple[str, bool]]:
        new = self.spec.search.space
        for path, part in new.items():
            if path not in self.old:
                yield f"{path} is new, and was {self._held[path]!r}", False
            elif difference := _difference(self.old[path], part):
                yield f"{path}: {difference[0]}", difference[1]
        file = self.spec.setup.model_dump(mode="json")
        for path in self.old.root:
            if path not in new:
                yield f"{path} is no longer searched, and is {place(file, path)!r} now", False

    @cached_property
    def _held(self) -> dict[str, Any]:
        """What parameters that are new were fixed to."""
        new = [path for path, _ in self.spec.search.space.items() if path not in self.old]
        return {path: self._was(path) for path in new}

    def _was(self, path: str) -> Any:
        """What the study file had at a path, which may be null."""
        if has_place(self.before["spec"], path):
            return place(self.before["spec"], path)
        # A setting that is younger than the record had its default, and the new file may set another value.
        plain = self.spec.setup.model_dump(mode="json")
        stem, _, last = path.rpartition(".")
        place(plain, stem).pop(last, None)
        try:
            return place(Setup.model_validate(plain).model_dump(mode="json"), path)
        except ValidationError:  # what must be given has no default
            return place(self.spec.setup.model_dump(mode="json"), path)

    @cached_property
    def _grown(self) -> list[dict[str, Any]]:
        """The record's list of growths with this one."""
        earlier: list[dict[str, Any]] = list(self.before.get("grown", []))
        labels = dict(earlier[-1]["labels"]) if earlier else {}
        tried = {label: way for trial in self.trials for label, way in trial.distributions.items()}
        for path, part in self.spec.search.space.items():
            label, now = labels.get(path, path), distribution(part)
            try:
                check_distribution_compatibility(tried.get(label, now), now)
            except ValueError:
                labels[path] = f"{path}~{len(earlier) + 2}"
        last = max((trial.number for trial in self.trials), default=-1)
        entry = {"before": last + 1, "held": self._held, "labels": labels, "changes": self.changes}
        return [*earlier, entry]

    @cached_property
    def _ended(self) -> list[FrozenTrial]:
        known = [trial for trial in self.trials if stage_of(trial) is None and trial.state.is_finished()]
        return [trial for trial in known if state_of(trial) is not TrialState.STOPPED]

    @cached_property
    def outside(self) -> frozenset[int]:
        """The numbers of ended trials that are not in the space."""
        return frozenset(
            trial.number for trial in self._ended if self._fitting.values(parameters_of(trial, self._grown)) is None
        )

    @cached_property
    def _fitting(self) -> Fitting:
        return Fitting(self.spec)

    def __str__(self) -> str:
        count, fit, others = len(self._ended), len(self._ended) - len(self.outside), len(self._stranded)
        which = f"{fit} of {count} trials are in the new space and count" if count else "no trial has ended yet"
        which += f"; of those that have not ended {others} are not in it and will not be tried again" * bool(others)
        return f"{'; '.join(self.changes)}. {which}"

    def write(self, storage: Storage) -> dict[str, Any]:
        """Change what waits in the storage, and return the entries of the record. Raises SpecError where trials run."""
        if any(stage_of(trial) == FINAL for trial in self.trials):
            raise SpecError(
                f"{self.spec.name}: its final trainings have begun, and its space cannot change.",
                "Start a new generation with --fresh",
            )
        if any(map(pauses_of, self.trials)):
            raise SpecError(
                f"{self.spec.name}: trials are paused, and their space cannot change.",
                "Let the search come to its end with the space that it has, or start a new generation with --fresh",
            )
        if any(trial.state == optuna.trial.TrialState.RUNNING for trial in self.trials):
            raise SpecError(
                f"{self.spec.name}: trials are running, and their space cannot change.",
                f"End them first: hpo stop {self.spec.name}",
            )
        fitting, labels = self._fitting, self._grown[-1]["labels"]
        for trial in self.trials:
            if trial.state == optuna.trial.TrialState.WAITING and stage_of(trial) is None:
                values = fitting.values(parameters_of(trial, self._grown))
                if attrs_of(trial).parameters is None:
                    values = {}  # what it was to have was never drawn
                self._rewrite(storage, trial, values, labels)
        return {"grown": self._grown, "outside": sorted(self.outside)}

    def _rewrite(
        self, storage: Storage, trial: FrozenTrial, values: Mapping[str, Any] | None, labels: Mapping[str, str]
    ) -> None:
        """Give an interrupted candidate its values under their new names; end it where it is not in the space."""
        if values is not None:
            fixed = _named(self.spec.search.space, values, labels)
            storage.database.set_trial_system_attr(trial_id_of(trial), FIXED, fixed)
            return
        reason = "interrupted, and not in the space that the study has now"
        stopped = TrialResult(trial.number, TrialState.STOPPED, reason=reason, failure=FailureKind.INTERRUPTED)
        storage.database.set_trial_user_attr(trial_id_of(trial), RESULT, stopped.to_json())
        storage.end_trial(trial, optuna.trial.TrialState.FAIL, None)


def _difference(old: Float | Int | Choice, new: Float | Int | Choice) -> tuple[str, bool] | None:
    """What has changed in a parameter, and whether it is the ends of its range only."""
    before, now = (part.model_dump(mode="json", exclude={"prior"}) for part in (old, new))
    if before == now:
        return None
    if isinstance(old, Choice) and isinstance(new, Choice) and old.when == new.when:
        added = [option for option in new.choice if option not in old.choice]
        gone = [option for option in old.choice if option not in new.choice]
        words = [f"new choices {added}"] * bool(added) + [f"without {gone}"] * bool(gone)
        return " and ".join(words) or "choices in another order", False
    ends = {"float", "int"}
    if type(old) is type(new) and not isinstance(new, Choice):
        (low, high), (first, last) = old.ends(), new.ends()
        wider, narrower = first < low or last > high, first > low or last < high
        word = "moved" if wider and narrower else "wider" if wider else "narrower"
        if {key for key in now if before.get(key) != now[key]} <= ends:
            return f"[{low}, {high}] -> [{first}, {last}], {word}", True
    shown = (part.model_dump(mode="json", exclude={"prior"}, exclude_defaults=True) for part in (old, new))
    return " -> ".join(map(str, shown)), False


def parameters_of(trial: FrozenTrial, grown: list[dict[str, Any]]) -> dict[str, Any]:
    """How a trial was trained: its parameters, and what later ones were fixed to."""
    return {**held_of(grown, trial.number), **(attrs_of(trial).parameters or {})}


def _named(space: Space, values: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    return {labels.get(path, path): encode(space[path], value) for path, value in values.items()}


def times_grown(record: Mapping[str, Any]) -> int:
    """How often the space of a study has grown."""
    return len(record.get("grown", []))


def narrowed_since(own: Mapping[tuple[str, str], Sequence[float]], record: Mapping[str, Any]) -> bool:
    """Whether the record has a narrower range than a study that is run, of these ends: that needs no growth."""
    now = ends_of(record["spec"]["search"])
    return any(now[place][0] > ends[0] or now[place][1] < ends[1] for place, ends in own.items() if place in now)


def ends_of(search: Mapping[str, Any]) -> dict[tuple[str, str], Sequence[float]]:
    """(stage or "", path) -> the ends of each range of a stored search."""
    spaces = {"": search.get("space", {}), **{stage["name"]: stage["space"] for stage in search.get("stages", [])}}
    parts = ((name, path, part) for name, space in spaces.items() for path, part in space.items())
    return {(name, path): part[kind] for name, path, part in parts for kind in ("float", "int") if kind in part}


def seen_as(spec: StudySpec, record: Mapping[str, Any]) -> Callable[[FrozenTrial], FrozenTrial | None]:
    """How samplers and pruners see an ended trial of a study that has grown: None is not at all."""
    grown: list[dict[str, Any]] = record["grown"]
    fitting, outside, space = Fitting(spec), frozenset(record.get("outside", [])), spec.search.space
    labels: Mapping[str, str] = grown[-1]["labels"]

    def seen(trial: FrozenTrial) -> FrozenTrial | None:
        attrs = attrs_of(trial)
        if attrs.stage is not None or attrs.parameters is None:
            return trial
        if trial.number >= grown[-1]["before"]:
            return trial
        values = None if trial.number in outside else fitting.values(parameters_of(trial, grown))
        if values is None:
            return None
        other = copy.copy(trial)
        other.params = _named(space, values, labels)
        other.distributions = {labels.get(path, path): distribution(space[path]) for path in values}
        other.user_attrs = {**trial.user_attrs, START: replace(attrs, parameters=values).to_json()}
        other.system_attrs = {**_without_optimizer(trial), FIXED: dict(other.params)}
        return other

    return seen


def in_ranges(stage: Stage) -> Callable[[FrozenTrial], FrozenTrial | None]:
    """How the sampler of a stage sees a trial: as one of the ranges of now; None, not at all, where it is outside.

    Their ends may change without growth, and Optuna's samplers model together only what all trials have drawn from one
    range: they would draw others at random from then on.
    """
    ranges = {
        stage.label(path): (part, distribution(part))
        for path, part in stage.space.items()
        if not isinstance(part, Choice)
    }

    def seen(trial: FrozenTrial) -> FrozenTrial | None:
        moved = {
            name: ranges[name] for name, way in trial.distributions.items() if ranges.get(name, (0, way))[1] != way
        }
        if not moved:
            return trial
        if not all(part.takes(trial.params[name]) for name, (part, _) in moved.items()):
            return None
        other = copy.copy(trial)
        other.distributions = {**trial.distributions, **{name: now for name, (_, now) in moved.items()}}
        other.system_attrs = _without_optimizer(trial)
        return other

    return seen


def _without_optimizer(trial: FrozenTrial) -> dict[str, Any]:
    return {key: note for key, note in trial.system_attrs.items() if not key.startswith(_OPTIMIZER)}
