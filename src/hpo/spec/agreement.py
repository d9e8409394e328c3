"""Settings of a study file that are valid alone and cannot be meant together.

A study that is stored already is not held against these rules: it must stay readable, whatever its file said.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from hpo.metrics import METRICS, counted, direction_of, metric_of, name_of
from hpo.spec.grid import listed
from hpo.spec.own_code import is_function
from hpo.spec.search import effects_of, refusal_of
from hpo.spec.space import LIMITED, Choice, Float, Int, Space
from hpo.spec.study import Setup, StudySpec, set_place

MOST_CELLS = 100_000
"""Cells of the largest grid that is searched cell by cell: a list of more takes seconds and hundreds of megabytes."""

_TRIED_VALUES = 256  # of a range, at most, that are tried in the file


@dataclass(frozen=True)
class Conflict:
    """A setting that cannot be meant. keys lead to it in the file; message says why and what to do, without a stop."""

    keys: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class _Step:
    """The search, or one stage of it. keys lead to its space; earlier are the spaces of the stages before."""

    keys: tuple[str, ...]
    space: Space
    earlier: tuple[Space, ...] = ()

    def place(self, path: str, *more: str) -> tuple[str, ...]:
        return (*self.keys, path, *more)


def conflicts(spec: StudySpec) -> list[Conflict]:
    """Every conflict of a study, in the order of the rules below; empty for a study that can be run."""
    steps = _steps(spec)
    return list(itertools.chain.from_iterable(rule(spec, steps) for rule in _RULES))


def _steps(spec: StudySpec) -> list[_Step]:
    if not spec.search.stages:
        return [_Step(("search", "space"), spec.search.space)]
    spaces = [stage.space for stage in spec.search.stages]
    return [
        _Step(("search", "stages", str(index), "space"), space, tuple(spaces[:index]))
        for index, space in enumerate(spaces)
    ]


def _function_names(spec: StudySpec, _steps: list[_Step]) -> Iterator[Conflict]:
    if ":" in spec.data.name and not is_function(spec.data.name):
        yield Conflict(
            ("data", "name"),
            f"{spec.data.name!r} is no name of a function. Write package.module:function, in letters, digits and _",
        )


def _unsearchable(_spec: StudySpec, steps: list[_Step]) -> Iterator[Conflict]:
    for step in steps:
        for path in step.space.root:
            if why := refusal_of(path):
                yield Conflict(step.place(path), why)


def _nested(spec: StudySpec, steps: list[_Step]) -> Iterator[Conflict]:
    """One place inside another: which of the two values counts would depend on their order."""
    searched: dict[str, tuple[str, ...]] = {}
    for step in steps:
        searched |= {path: step.place(path) for path in step.space.root if path not in searched}
    for path, keys in searched.items():
        if outer := next((other for other in searched if path.startswith(f"{other}.")), None):
            yield Conflict(
                keys,
                f"lies inside {outer}, which is searched too, so one would overwrite the other. "
                f"Search {outer} or the places inside it",
            )
    for step in steps:
        for path, parameter in step.space.items():
            for asked in parameter.when:
                if other := next((one for one in searched if _overlap(asked, one)), None):
                    yield Conflict(
                        step.place(path, "when", asked),
                        f"is not the searched {other} itself, whose value decides. Name {other} in `when`",
                    )
    final = spec.final.set if spec.final else {}
    for path in final:
        if other := next((one for one in [*searched, *final] if _overlap(path, one)), None):
            yield Conflict(
                ("final", "set", path),
                f"and {other} lie inside one another, so one would overwrite the other. Name the same place in both",
            )


def _overlap(path: str, other: str) -> bool:
    """True where one of two different places lies inside the other."""
    return path.startswith(f"{other}.") or other.startswith(f"{path}.")


def _conditions(spec: StudySpec, steps: list[_Step]) -> Iterator[Conflict]:
    plain = spec.model_dump()
    for step in steps:
        for path, parameter in step.space.items():
            found = list(_impossible(step, path, parameter, plain))
            yield from found
            if not found and (clash := _clash(step, path)):
                yield Conflict(step.place(path, "when"), clash)


def _impossible(
    step: _Step, path: str, parameter: Float | Int | Choice, plain: Mapping[str, Any]
) -> Iterator[Conflict]:
    """The values of a `when` that its place never has."""
    for asked, wanted in parameter.when.items():
        takes, has = _values_of(step, asked, plain)
        never = [value for value in listed(wanted) if not any(take(value) for take in takes)]
        if never or not listed(wanted):
            shown = " or ".join(map(repr, never)) or "one of no values"
            yield Conflict(
                step.place(path, "when", asked),
                f"waits for {shown}, but {asked} {has}, so {path} would never be tried with it. Correct the value",
            )


def _values_of(step: _Step, path: str, plain: Mapping[str, Any]) -> tuple[list[Callable[[Any], bool]], str]:
    """Tests for the values that a place can have in a step, and these values in words."""
    if path in step.space:
        parameter = step.space[path]
        if isinstance(parameter, Float) and parameter.count() == float("inf"):
            return [], f"is drawn from the continuous range {_ends(parameter)}, which meets no value exactly"
        return [parameter.takes], f"is searched in {_ends(parameter)}"
    fixed = _value(plain, path)
    carried = [space[path] for space in step.earlier if path in space]
    tests: list[Callable[[Any], bool]] = [parameter.takes for parameter in carried]
    also = "".join(f" or, from an earlier stage, in {_ends(parameter)}" for parameter in carried)
    return [*tests, lambda value: bool(value == fixed)], f"is {fixed!r}{also}"


def _ends(parameter: Float | Int | Choice) -> str:
    return str(parameter.choice if isinstance(parameter, Choice) else parameter.ends())


def _clash(step: _Step, path: str) -> str:
    """Why the conditions of a parameter, and of those that it depends on, cannot all hold; "" where they can."""
    allowed: dict[str, list[Any]] = {}
    waiting, seen = [path], set()
    while waiting:
        current = waiting.pop()
        seen.add(current)
        for asked, wanted in step.space[current].when.items():
            values = listed(wanted)
            left = [value for value in allowed.get(asked, values) if value in values]
            if not left:
                return (
                    f"can never hold: {asked} would have to be both {_either(allowed[asked])} and {_either(values)}. "
                    "Remove one of the conditions"
                )
            allowed[asked] = left
            if asked in step.space and asked not in seen:
                waiting.append(asked)
    return ""


def _either(values: list[Any]) -> str:
    return " or ".join(map(repr, values))


def _without_effect(spec: StudySpec, steps: list[_Step]) -> Iterator[Conflict]:
    """Places that change nothing as long as another setting is what it is."""
    plain = spec.model_dump()
    for step in steps:
        for path, parameter in step.space.items():
            for effect in effects_of(path, spec.model.kind):
                values = [_possible(step, setting, parameter, plain) for setting in effect.settings]
                if not any(each is None or any(map(effect.acts, each)) for each in values):
                    now = [
                        f"{setting} is {_either(each or [])}"
                        for setting, each in zip(effect.settings, values, strict=True)
                    ]
                    yield Conflict(
                        step.place(path), f"changes nothing while {', '.join(now)}. {effect.advice}, or leave it out"
                    )
                    break


def _possible(step: _Step, path: str, parameter: Float | Int | Choice, plain: Mapping[str, Any]) -> list[Any] | None:
    """The values that a place can have where the parameter is tried; None for too many to list."""
    if path in parameter.when:
        return listed(parameter.when[path])
    spaces = [step.space] if path in step.space else [space for space in step.earlier if path in space]
    values = [] if path in step.space else [_value(plain, path)]
    for space in spaces:
        if space[path].count() > _TRIED_VALUES:
            return None
        values += [value for value in space[path].grid() if value not in values]
    return values


def _ranges(spec: StudySpec, steps: list[_Step]) -> Iterator[Conflict]:
    """Values between the ends of a range that do not fit their place: even kernels, 3.7 epochs."""
    plain = spec.setup.model_dump()
    for step in steps:
        for path, parameter in step.space.items():
            for value in _inner_values(parameter):
                if said := _misfit(plain, path, value):
                    yield Conflict(
                        step.place(path),
                        f"the range holds {value!r}, which does not fit: {said}. Give a step, or list the values "
                        "as a choice",
                    )
                    break


def _inner_values(parameter: Float | Int | Choice) -> list[Any]:
    if isinstance(parameter, Choice):
        return []  # the model of the file has tried each option
    if parameter.count() <= _TRIED_VALUES:
        return parameter.grid()[1:-1]
    low, high = parameter.ends()
    if isinstance(parameter, Int):
        return [low + index * (parameter.step or 1) for index in range(1, 9)]
    return [low + (high - low) * share for share in (0.3819660113, 0.6180339887)]


def _misfit(plain: dict[str, Any], path: str, value: Any) -> str:
    tree = {**plain, path.split(".")[0]: _copied(plain[path.split(".")[0]])}
    set_place(tree, path, value)
    try:
        Setup.model_validate(tree)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    return ""


def _copied(tree: Any) -> Any:
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _grids(spec: StudySpec, steps: list[_Step]) -> Iterator[Conflict]:
    samplers = [stage.sampler.name if stage.sampler else None for stage in spec.search.stages]
    grids = [
        name == "grid" if name else stage.trials is None or spec.search.sampler.name == "grid"
        for name, stage in zip(samplers, spec.search.stages, strict=True)
    ]
    for step, grid in zip(steps, grids or [spec.search.sampler.name == "grid"], strict=True):
        cells = step.space.size(spec.fixed()) if grid else None
        if cells is not None and cells > MOST_CELLS:
            yield Conflict(
                step.keys,
                f"its grid has {cells:,} cells, and at most {MOST_CELLS:,} are searched one by one. Give larger "
                "steps, or write sampler: random with duplicates: reject",
            )


def _limits(spec: StudySpec, _steps: list[_Step]) -> Iterator[Conflict]:
    ends: dict[str, dict[str, float]] = {}
    for index, text in enumerate(spec.search.constraints):
        keys = ("search", "constraints", str(index))
        name, op, number = _limit(text)
        known = [*(f"valid_{score}" for score in METRICS), *LIMITED]
        if number is None:
            yield Conflict(keys, f"{text!r} has no number. Write for example: parameters <= 200000")
        elif name not in LIMITED and not (name.startswith("valid_") and metric_of(name)):
            yield Conflict(keys, f"there is no score {name!r}. Known: {', '.join(known)}. Correct the name")
        elif (number < 0 and op == "<=" and name in _AT_LEAST_0) or (number > 1 and op == ">=" and name in _SHARES):
            within = "0 to 1" if name in _SHARES else "at least 0"
            yield Conflict(keys, f"no trial can keep {text.strip()!r}: {name} is {within}. Correct the number")
        else:
            bounds = ends.setdefault(name, {})
            tightest = min if op == "<=" else max
            bounds[op] = tightest(bounds.get(op, number), number)
            if bounds.get(">=", number) > bounds.get("<=", number):
                yield Conflict(
                    keys,
                    f"no trial can keep {name} >= {bounds['>=']:g} and {name} <= {bounds['<=']:g}. Remove one of them",
                )


_SHARES = ("valid_accuracy", "valid_balanced_accuracy", "valid_macro_f1", "valid_macro_auc")
_AT_LEAST_0 = (*_SHARES, "valid_loss", *LIMITED)


def _limit(text: str) -> tuple[str, str, float | None]:
    op = "<=" if "<=" in text else ">="
    name, _, number = (part.strip() for part in text.partition(op))
    try:
        return name, op, float(number)
    except ValueError:
        return name, op, None


def _aims(spec: StudySpec, _steps: list[_Step]) -> Iterator[Conflict]:
    names = [aim.score for aim in spec.search.objectives]
    for index, aim in enumerate(spec.search.objectives):
        keys = ("search", "objectives", str(index))
        if names.index(aim.score) < index:
            yield Conflict(keys, f"{aim.score} is listed twice. Leave one out")
        right = direction_of(aim.score)
        if aim.score not in LIMITED and aim.better != right:
            yield Conflict(keys, f"direction {aim.better} would look for the worst {aim.score}. Write {right}")
    default = type(spec.search).model_fields["objective"].default
    if names and spec.search.objective not in (*names, default):
        yield Conflict(
            ("search", "objective"),
            f"{spec.search.objective} is none of the objectives ({', '.join(names)}), which alone decide. Remove "
            "objective, or list it there",
        )


def _enough(spec: StudySpec, _steps: list[_Step]) -> Iterator[Conflict]:
    known = spec.split.kind == "kfold" or (spec.task != "multilabel" and name_of(spec.search.objective) in counted())
    if spec.search.enough == "auto" and not known:
        scores = ", ".join(f"valid_{name}" for name in counted())
        yield Conflict(
            ("search", "enough"),
            f"the standard error of {spec.search.objective} is not known: without folds it is for {scores} of images "
            "with one class each. Write {gain: NUMBER}",
        )


def _starts(spec: StudySpec, _steps: list[_Step]) -> Iterator[Conflict]:
    """Candidates to try first that are in no step's space."""
    space = spec.search.whole_space
    for index, values in enumerate(spec.search.start):
        for path, value in values.items():
            if not any(path in step.space and step.space[path].takes(value) for step in _steps):
                yield Conflict(
                    ("search", "start", str(index), path),
                    f"{value!r} is not in the space, which has {_ends(space[path])}. Correct the value, or widen the "
                    "space",
                )
                continue
            for asked, wanted in space[path].when.items():
                if asked in values and values[asked] not in listed(wanted):
                    yield Conflict(
                        ("search", "start", str(index), path),
                        f"is tried only where {asked} is {_either(listed(wanted))}, and this candidate has "
                        f"{values[asked]!r}. Remove one of the two",
                    )


def _race(spec: StudySpec, _steps: list[_Step]) -> Iterator[Conflict]:
    final = spec.final
    if final and final.split and final.split.kind == "none" and final.finalists > 1:
        yield Conflict(
            ("final", "split"),
            "kind none leaves a race of finalists without validation images. Write another kind, or finalists: 1",
        )


_OTHER_MODELS = {
    "training.teacher": "is not looked up there. Write final.teacher",
    "model.from_model": "is not looked up there: all trainings start from one model. Change model, or run a study",
}


def _final_models(spec: StudySpec, _steps: list[_Step]) -> Iterator[Conflict]:
    """Models by name are fetched before anything trains, and final.set is applied long after that."""
    for path, value in (spec.final.set if spec.final else {}).items():
        for place, why in _OTHER_MODELS.items():
            inside = place.startswith(f"{path}.") and _value(value, place.removeprefix(f"{path}."))
            if named := value if path == place else inside:
                yield Conflict(("final", "set", path), f"{place} {named!r} {why}")


def _value(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


_RULES: tuple[Callable[[StudySpec, list[_Step]], Iterator[Conflict]], ...] = (
    _function_names,
    _unsearchable,
    _nested,
    _conditions,
    _without_effect,
    _ranges,
    _grids,
    _limits,
    _aims,
    _enough,
    _starts,
    _race,
    _final_models,
)
