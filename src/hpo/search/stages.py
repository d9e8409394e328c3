"""The stages of a search: what each varies, as Optuna's distributions, where it starts and how long it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hpo.errors import SpecError
from hpo.records import StudyResult, Trial, TrialState
from hpo.spec.search import SamplerSpec, StageSpec
from hpo.spec.space import Choice, Float, Int, Space
from hpo.spec.study import StudySpec
from hpo.storage.trial_attrs import key_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def distribution(parameter: Float | Int | Choice) -> BaseDistribution:
    """Optuna's distribution of a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(parameter, Choice):
        return CategoricalDistribution(_options(parameter))
    # Optuna warns of a high end that the steps miss.
    if isinstance(parameter, Int):
        first, last = parameter.int
        step = parameter.step or 1
        return IntDistribution(first, last - (last - first) % step, log=parameter.log, step=step)
    low, high = parameter.float
    if parameter.step and low < high:
        high = round(low + (parameter.count() - 1) * parameter.step, 12)
    return FloatDistribution(low, high, parameter.log, parameter.step)


def encode(parameter: Float | Int | Choice, value: Any) -> Any:
    """A value of the parameter as Optuna stores it."""
    return _options(parameter)[parameter.choice.index(value)] if isinstance(parameter, Choice) else value


def decode(parameter: Float | Int | Choice, value: Any) -> Any:
    """The value of the parameter that encode turned into this one."""
    if isinstance(parameter, Choice):
        return parameter.choice[_options(parameter).index(value)]
    return int(value) if isinstance(parameter, Int) else float(value)


def to_unit(parameter: Float | Int, value: Any) -> float:
    """The place of a value in its range, on its own scale, in [0, 1]; 0.5 where there is only one value."""
    scale = math.log if parameter.log else float
    low, high = map(scale, parameter.ends())
    return (scale(value) - low) / (high - low) if high > low else 0.5


def from_unit(parameter: Float | Int, place: float) -> Any:
    """The value at a place of the range in [0, 1], on the nearest step."""
    low, high = parameter.ends()
    value = low * (high / low) ** place if parameter.log else low + place * (high - low)
    step = parameter.step or (1 if isinstance(parameter, Int) else None)
    if step:
        value = low + min(round((value - low) / step), int(parameter.count()) - 1) * step
    return int(value) if isinstance(parameter, Int) else min(max(round(value, 12) if step else value, low), high)


def suggest(trial: Any, name: str, parameter: Float | Int | Choice) -> Any:
    """The value of a parameter for a trial of Optuna, which calls it by this name."""
    within: Any = distribution(parameter)
    if isinstance(parameter, Choice):
        return decode(parameter, trial.suggest_categorical(name, within.choices))
    method = trial.suggest_int if isinstance(parameter, Int) else trial.suggest_float
    return decode(parameter, method(name, within.low, within.high, step=within.step, log=within.log))


def _options(parameter: Choice) -> list[Any]:
    if all(option is None or isinstance(option, bool | int | float | str) for option in parameter.choice):
        return parameter.choice
    # Optuna stores plain values only. All options are encoded, so that [1] and "[1]" differ.
    return [json.dumps(option, sort_keys=True) for option in parameter.choice]


def narrowed(space: Space, centre: Mapping[str, Any], share: float) -> Space:
    """The space around one candidate: ranges shrunk to a share in (0, 1] of their width, on their own scale.

    They stay within their old ends and on their old steps, and include the neighbours of the centre at least. Options
    and conditions stay, and so do ranges of paths that the centre lacks.
    """
    return Space(
        {
            path: parameter
            if isinstance(parameter, Choice) or path not in centre
            else _shrunk(parameter, centre[path], share)
            for path, parameter in space.items()
        }
    )


def _shrunk(parameter: Float | Int, centre: Any, share: float) -> Float | Int:
    low, high = parameter.ends()
    centre = min(max(centre, low), high)
    if parameter.log:
        reach = math.exp(share * math.log(high / low) / 2)
        ends = max(low, centre / reach), min(high, centre * reach)
        if isinstance(parameter, Int):
            ends = max(low, min(math.floor(ends[0]), centre - 1)), min(high, max(math.ceil(ends[1]), centre + 1))
    elif step := parameter.step or (1 if isinstance(parameter, Int) else None):
        last, middle = math.floor((high - low) / step + 1e-9), round((centre - low) / step)
        reach = max(1, round(share * (high - low) / step / 2))
        ends = low + max(0, middle - reach) * step, low + min(last, middle + reach) * step
        if isinstance(parameter, Float):
            ends = round(ends[0], 12), round(ends[1], 12)
    else:
        reach = share * (high - low) / 2
        ends = max(low, centre - reach), min(high, centre + reach)
    return parameter.model_copy(update={"int" if isinstance(parameter, Int) else "float": ends})


# The parameter that says which of several earlier trials a candidate starts from: its options are their numbers.
CARRIED = "carried"


@dataclass(frozen=True)
class Stage:
    """One stage of a search as it is run.

    name is None for a search without stages. spec is the study's, with the stage's space and sampler in place of the
    search's. limit is its number of trials; None: until its space, or the study's budget, is spent. origins maps
    numbers of earlier trials to the parameters that are carried on; it is empty for a first stage. first are the first
    candidates to try, as values of some or all parameters. labels are names that parameters have in Optuna's storage
    since the space has changed.
    """

    name: str | None
    spec: StudySpec
    limit: int | None = None
    origins: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    first: Sequence[Mapping[str, Any]] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def space(self) -> Space:
        """The parameters of the stage; with several origins, one of them is the origin."""
        return self.spec.search.space

    def label(self, path: str) -> str:
        """The name of a parameter in Optuna's storage: stages may give one path different options."""
        return self.labels.get(path, path) if self.name is None else f"{self.name}/{path}"

    def parameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All parameters of a candidate: those carried on, and the stage's own values over them."""
        own = {path: value for path, value in values.items() if path != CARRIED}
        return {**self._carried(values), **own}

    def context(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All values that a condition of the stage's space may depend on."""
        return {**self._fixed, **self._carried(values), **values}

    def cells(self) -> dict[str, dict[str, Any]]:
        """Key -> the stage's own values, of each different candidate of a finite space; ValueError otherwise."""
        own = Space({path: parameter for path, parameter in self.space.items() if path != CARRIED})
        different: dict[str, dict[str, Any]] = {}
        for number in self.origins or [None]:
            start = {CARRIED: number} if CARRIED in self.space else {}
            for cell in own.cells(self.context(start)):
                different.setdefault(key_of(self.parameters({**start, **cell})), {**start, **cell})
        return different

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        return self.spec.fixed()

    def _carried(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.origins[values.get(CARRIED, next(iter(self.origins)))] if self.origins else {}


def stage_names(spec: StudySpec) -> list[str | None]:
    """The stages in order; [None] for a search without."""
    return [stage.name for stage in spec.search.stages] or [None]


def make_stage(
    spec: StudySpec,
    index: int,
    *,
    origins: Mapping[int, Mapping[str, Any]],
    warm: Sequence[Mapping[str, Any]] = (),
    labels: Mapping[str, str] | None = None,
) -> Stage:
    """The stage with this index. warm are candidates to try first: each stage takes the values that it varies."""
    if not spec.search.stages:
        first = _first(spec.search.space, [*warm, _priors(spec.search.space)])
        return Stage(None, spec, first=first, labels=labels or {})
    part = spec.search.stages[index]
    space = _space(spec, index)
    if part.refine is not None:
        space = narrowed(space, next(iter(origins.values())), part.refine)
    first = _first(space, [*warm, _priors(space)])
    if len(origins) > 1:
        space = Space({CARRIED: Choice(choice=list(origins)), **dict(space.items())})
    search = {"space": space, "stages": [], "sampler": sampler_of(spec, part)}
    view = spec.model_copy(update={"search": spec.search.model_copy(update=search)})
    return Stage(part.name, view, part.trials, origins, first)


def sampler_of(spec: StudySpec, part: StageSpec) -> SamplerSpec:
    """A stage's sampler: its own; else the full grid where no number of trials is given; else the search's."""
    return part.sampler or (SamplerSpec(name="grid") if part.trials is None else spec.search.sampler)


def check_stages(spec: StudySpec) -> None:
    """Raises SpecError where a stage's sampler is a grid and its space has none."""
    for index, part in enumerate(spec.search.stages):
        for path, parameter in _space(spec, index).items():
            try:
                if sampler_of(spec, part).name == "grid":
                    parameter.check_finite()
            except ValueError as error:
                raise SpecError(f"search.stages.{part.name}.{path}, sampler grid: {error}.") from None


def find_origins(spec: StudySpec, index: int, study: StudyResult) -> dict[int, Mapping[str, Any]]:
    """The trials that the stage with this index starts from: number -> parameters.

    They are the best different trials of the stage before, as many as its `carry` says. A refinement starts from the
    best trial of all stages before. Raises SpecError where there is none.
    """
    if index == 0:
        return {}
    earlier = [stage.name for stage in spec.search.stages[:index]]
    before = spec.search.stages[index - 1]
    if spec.search.stages[index].refine is not None:
        ranked, most = [trial for trial in study.ranked() if trial.candidate.stage in earlier], 1
    else:
        ranked, most = study.ranked(before.name), before.carry
    different: dict[str, Trial] = {}
    for trial in ranked:
        different.setdefault(key_of(trial.candidate.parameters), trial)
    if not different:
        raise _nothing_to_carry(before.name, study)
    return {trial.number: trial.candidate.parameters for trial in list(different.values())[:most]}


def _nothing_to_carry(name: str, study: StudyResult) -> SpecError:
    ended = [trial for trial in study.counted if trial.candidate.stage == name]
    reasons = [trial.result.reason for trial in ended if trial.result and trial.result.reason]
    if all(trial.state is TrialState.FAILED for trial in ended):
        problem = "every trial failed"
    else:
        problem = "no trial is complete within the constraints"
    first = f": {reasons[0]}" if reasons else ""
    return SpecError(
        f"stage {name}: {problem}{first.rstrip('.')}.",
        "Later stages have nothing to start from: mend the cause and run the failed trials again, or give more trials.",
    )


def total_trials(spec: StudySpec) -> int:
    """The study's total number of trials, or the sum over its stages; a full grid counts once a trial carried on.

    It is an upper limit where conditions depend on the result of an earlier stage.
    """
    if not spec.search.stages:
        return spec.search.trials
    total, starts = 0, 1
    for index, part in enumerate(spec.search.stages):
        trials: float = math.inf if part.trials is None else part.trials
        cells = _most_cells(spec, index)
        if sampler_of(spec, part).name == "grid" and cells is not None:
            trials = min(trials, cells * (1 if part.refine is not None else starts))
        total += int(trials)
        starts = min(part.carry, int(trials))
    return total


def budget_of(spec: StudySpec, trials: int | None) -> int:
    """The total number of trials to run: `trials`, at most the study's own total."""
    return min(trials or total_trials(spec), total_trials(spec))


def stage_warnings(study: StudyResult) -> list[str]:
    """One line for each path at which the best trial differs from the choice of a stage: the stages interact.

    The winner of the last stage is compared too. Numbers differ if more than a tenth of the stage's range lies between
    them.
    """
    stages = study.spec.get("search", {}).get("stages", ())
    winners = {stage["name"]: study.ranked(stage["name"])[:1] for stage in stages}
    ends = [("the best trial", study.best)]
    ends += [(f"the winner of stage {name}", winner) for name, first in list(winners.items())[-1:] for winner in first]
    lines: dict[tuple[str, str], str] = {}
    for stage in stages:
        for path, parameter in Space.model_validate(stage["space"]).items():
            for chosen in (trial.candidate.parameters for trial in winners[stage["name"]]):
                for label, end in ends:
                    last = end.candidate.parameters if end else {}
                    if path in chosen and path in last and _moved(parameter, chosen[path], last[path]):
                        line = f"stage {stage['name']} chose {path}={chosen[path]}, {label} has {last[path]}"
                        lines.setdefault((stage["name"], path), f"{line}: the stages interact")
    return list(lines.values())


def _moved(parameter: Float | Int | Choice, chosen: Any, last: Any) -> bool:
    if isinstance(parameter, Choice) or not isinstance(last, int | float):
        return bool(chosen != last)
    scale = math.log if parameter.log else float
    low, high = (scale(end) for end in parameter.ends())
    return abs(scale(chosen) - scale(last)) > 0.1 * (high - low) + 1e-12


def _space(spec: StudySpec, index: int) -> Space:
    """The space of the stage, before a refinement shrinks it."""
    part = spec.search.stages[index]
    if part.refine is None:
        return part.space
    return Space({path: part for stage in spec.search.stages[:index] for path, part in stage.space.items()})


def _most_cells(spec: StudySpec, index: int) -> int | None:
    space = _space(spec, index)
    earlier = {path for stage in spec.search.stages[:index] for path, _ in stage.space.items()} - set(
        dict(space.items())
    )
    free = {}
    for path, parameter in space.items():
        when = {asked: wanted for asked, wanted in parameter.when.items() if asked not in earlier}
        free[path] = parameter.model_copy(update={"when": when})
    view = spec.search.model_copy(update={"space": Space(free), "stages": []})
    return Space(free).size(spec.model_copy(update={"search": view}).fixed())


def _priors(space: Space) -> dict[str, Any]:
    return {path: part.prior.value for path, part in space.items() if part.prior is not None}


def _first(space: Space, warm: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The values of each candidate that fit the space, without duplicates.

    A candidate that no longer fits a space that has changed keeps its place: those after it count their trials.
    """
    found: list[Mapping[str, Any]] = []
    for values in warm:
        own = {path: value for path, value in values.items() if path in space}
        part = {path: value for path, value in own.items() if space[path].takes(value)}
        if own and not (part and key_of(part) in map(key_of, found)):
            found.append(part)
    return found
