"""Who proposes candidates and who ends poor trials: tables of Optuna's samplers and pruners, made resumable."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import random
from collections.abc import Callable, Container, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from hpo.search.curve_pruner import CurvePruner
from hpo.search.stages import Stage
from hpo.spec.space import Choice, Float, Int, holds
from hpo.spec.study import StudySpec
from hpo.storage.optuna_storage import start_of
from hpo.storage.trial_attrs import key_of
from hpo.storage.trial_index import Books

_REDRAWS = 32
_MOST_CELLS = 100_000  # beyond, a finite space is searched like a continuous one


def distribution(parameter: Float | Int | Choice) -> BaseDistribution:
    """Optuna's word for a parameter of the space."""
    if isinstance(parameter, Choice):
        return CategoricalDistribution(_options(parameter))
    # Optuna warns of a high end that the steps miss.
    if isinstance(parameter, Int):
        first, last = parameter.int
        step = parameter.step or 1
        return IntDistribution(first, last - (last - first) % step, log=parameter.log, step=step)
    low, high = parameter.float
    return FloatDistribution(low, parameter.grid()[-1] if parameter.step else high, parameter.log, parameter.step)


def encode(parameter: Float | Int | Choice, value: Any) -> Any:
    """A real value as Optuna stores it."""
    return _options(parameter)[parameter.choice.index(value)] if isinstance(parameter, Choice) else value


def decode(parameter: Float | Int | Choice, value: Any) -> Any:
    """The real value of what encode made."""
    if isinstance(parameter, Choice):
        return parameter.choice[_options(parameter).index(value)]
    return int(value) if isinstance(parameter, Int) else float(value)


def _options(parameter: Choice) -> list[Any]:
    if all(option is None or isinstance(option, bool | int | float | str) for option in parameter.choice):
        return parameter.choice
    # Optuna stores plain values only. All options are encoded, lest [1] meet "[1]".
    return [json.dumps(option, sort_keys=True) for option in parameter.choice]


def _count(parameter: Float | Int | Choice) -> float:
    """How many values there are; inf for a continuous range."""
    if isinstance(parameter, Choice):
        return len(parameter.choice)
    low, high = parameter.ends()
    step = parameter.step or (1 if isinstance(parameter, Int) else 0)
    if low == high:
        return 1
    return math.floor((high - low) / step + 1e-9) + 1 if step else math.inf


class _Cmaes(optuna.samplers.CmaEsSampler):  # type: ignore[misc]
    """Seeded by the trial's place in the study: its number counts interrupted trials too."""

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> Any:
        placed = copy.copy(trial)
        placed.number = start_of(trial).ordinal
        return super().sample_relative(study, placed, search_space)


class _Qmc(optuna.samplers.QMCSampler):  # type: ignore[misc]
    """The point of the Sobol sequence is the trial's place in the study, and every parameter has its coordinate."""

    def __init__(self, stage: Stage, ordinal: int) -> None:
        super().__init__(scramble=True, seed=stage.spec.seed, warn_independent_sampling=False)
        self._ordinal = ordinal
        ranges = {stage.label(path): distribution(parameter) for path, parameter in stage.space.items()}
        self._ranges = {name: found for name, found in ranges.items() if not found.single()}

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        return self._ranges

    def _find_sample_id(self, study: Any, search_space: Any) -> int:  # noqa: ARG002
        return self._ordinal


def _tpe(stage: Stage, seed: int, ordinal: int) -> Any:  # noqa: ARG001
    startup = stage.spec.search.sampler.startup_trials
    # group models the parameters of each branch of a conditional space jointly.
    return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, group=stage.space.conditional)


def _options_of(stage: Stage) -> dict[str, Any]:
    return {"n_startup_trials": stage.spec.search.sampler.startup_trials, "warn_independent_sampling": False}


# name -> (stage, sampler's seed for this candidate, its ordinal) -> sampler. Grid is Proposer's own.
SAMPLERS: Mapping[str, Callable[[Stage, int, int], Any]] = {
    "random": lambda _stage, seed, _ordinal: optuna.samplers.RandomSampler(seed=seed),
    "tpe": _tpe,
    "cmaes": lambda stage, seed, _ordinal: _Cmaes(seed=seed, **_options_of(stage)),
    "gp": lambda stage, seed, _ordinal: optuna.samplers.GPSampler(seed=seed, **_options_of(stage)),
    "qmc": lambda stage, _seed, ordinal: _Qmc(stage, ordinal),
}


class Proposer(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """Draws whole candidates, each from a sampler of its own that is seeded by the study's seed and the ordinal.

    So a study resumed in a new process draws what it would have drawn without the break. books gives all trials of
    the study as they stand.
    """

    def __init__(self, stage: Stage, books: Callable[[], Books]) -> None:
        self._stage = stage
        self._books = books
        self._parameters = stage.space.ordered()
        cells = math.prod(_count(parameter) for _, parameter in self._parameters)
        self._finite = cells < math.inf
        self._grid = stage.spec.search.sampler.name == "grid"
        self._rejects = stage.spec.search.duplicates == "reject"
        # Whoever trains no candidate twice has to know when there is no other.
        counts = cells <= _MOST_CELLS and stage.spec.search.duplicates != "reseed"
        self._cells = list(stage.cells().items()) if self._grid or counts else []
        self._spent = 0  # so many cells at the front are those of trials that have ended
        random.Random(stage.spec.seed).shuffle(self._cells)  # noqa: S311

    @property
    def exhausted(self) -> bool:
        """Whether a grid, or a finite space that is not to be searched twice, has no candidate left to hand out."""
        if not self._cells:
            return False
        undrawn = self.undrawn
        return len(list(islice(self._free_cells(), undrawn + 1))) <= undrawn

    @property
    def undrawn(self) -> int:
        """How many candidates have begun and are still to be drawn: their process died, each has a claim to a cell."""
        starts = map(start_of, self._books().under_way(self._stage.name))
        return sum(start.parameters is None for start in starts)

    def free_cell(self, fixed: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """A cell that was not handed out, of those that have the fixed values."""
        return next(self._free_cells(fixed), None)

    def _free_cells(self, fixed: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        wanted = {path: key_of({path: value}) for path, value in (fixed or {}).items()}
        shelf, running = self._books().shelf(self._stage.name), self._running()
        while self._spent < len(self._cells) and shelf.same(self._cells[self._spent][0]):
            self._spent += 1
        for key, cell in islice(self._cells, self._spent, None):
            fitting = all(path in cell and key_of({path: cell[path]}) == one for path, one in wanted.items())
            if fitting and key not in running and not shelf.same(key):
                yield cell

    def takes(self, fixed: Mapping[str, Any]) -> bool:
        """Whether a new candidate can have these values: a grid may have handed them out."""
        return not self._grid or self.free_cell(fixed) is not None

    def active(self, values: Mapping[str, Any]) -> list[tuple[str, Float | Int | Choice]]:
        """Parameters that values lacks and whose conditions hold now; empty once the candidate is whole."""
        known = self._stage.known(values)
        return [(path, part) for path, part in self._parameters if path not in values and holds(part.when, known)]

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        """Every parameter: sample_relative draws them together."""
        return {self._stage.label(path): distribution(parameter) for path, parameter in self._parameters}

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:  # noqa: ARG002
        """Name -> encoded value of one candidate.

        In a finite space not one that runs now, and where duplicates are rejected none that was handed out before, if
        that can be had.
        """
        ordinal = start_of(trial).ordinal
        fixed = self._fixed(trial)
        if self._grid:
            cell = self.free_cell(fixed) or self.free_cell() or self._cells[ordinal % len(self._cells)][1]
            return self._encoded(cell)
        build = SAMPLERS[self._stage.spec.search.sampler.name]
        drawn = self._draw(study, trial, build(self._stage, self._seed(ordinal), ordinal), fixed)
        if self._rejects or self._finite:
            running = self._running(but=ordinal)
            # A model that has made up its mind would propose the same again and again.
            chance = optuna.samplers.RandomSampler(seed=self._seed(ordinal))
            redrawn = (self._draw(study, trial, chance, fixed) for _ in range(_REDRAWS))
            new = next((new for new in chain([drawn], redrawn) if not self._met(new, ordinal, running)), None)
            drawn = new or (self.free_cell(fixed) if self._rejects else None) or drawn
        return self._encoded(drawn)

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """For a parameter that a retried candidate has not, because the space grew since."""
        sampler = optuna.samplers.RandomSampler(seed=self._seed(start_of(trial).ordinal))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _draw(self, study: Any, trial: FrozenTrial, sampler: Any, fixed: Mapping[str, Any]) -> dict[str, Any]:
        together = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        values: dict[str, Any] = {}
        while parameters := self.active(values):
            path, parameter = parameters[0]
            name, within = self._stage.label(path), distribution(parameter)
            if path in fixed:
                values[path] = fixed[path]
            elif name in together and within._contains(within.to_internal_repr(together[name])):
                values[path] = decode(parameter, together[name])
            else:
                values[path] = decode(parameter, sampler.sample_independent(study, trial, name, within))
        return values

    def _fixed(self, trial: FrozenTrial) -> dict[str, Any]:
        """What the trial was enqueued with."""
        given = trial.system_attrs.get("fixed_params", {})
        named = ((path, parameter, self._stage.label(path)) for path, parameter in self._parameters)
        return {path: decode(parameter, given[name]) for path, parameter, name in named if name in given}

    def _encoded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        space = self._stage.space
        return {self._stage.label(path): encode(space[path], value) for path, value in values.items()}

    def _running(self, *, but: int | None = None) -> set[str]:
        """Keys of the candidates of the stage that have not ended, but for the one at this place."""
        starts = map(start_of, self._books().under_way(self._stage.name))
        return {key_of(one.parameters) for one in starts if one.parameters is not None and one.ordinal != but}

    def _met(self, values: Mapping[str, Any], ordinal: int, running: Container[str]) -> bool:
        """Whether another trial than the one at this place has the candidate, so that it should not be repeated."""
        key = key_of(self._stage.parameters(values))
        ended = self._books().shelf(self._stage.name).same(key) if self._rejects else ()
        return key in running or any(start_of(trial).ordinal != ordinal for trial in ended)

    def _seed(self, ordinal: int) -> int:
        digest = hashlib.sha256(f"{self._stage.spec.seed}/sampler/{ordinal}".encode()).digest()
        return int.from_bytes(digest[:4], "big")


class _Hyperband(optuna.pruners.HyperbandPruner):  # type: ignore[misc]
    """Brackets follow the trial's place in the study, from the first trial on."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        # Optuna fills the brackets at the first report, and samples by other brackets until then.
        self._try_initialization(None)

    def _get_bracket_id(self, study: Any, trial: FrozenTrial) -> int:
        placed = copy.copy(trial)
        placed.number = start_of(trial).ordinal
        return int(super()._get_bracket_id(study, placed))


def _most_epochs(spec: StudySpec) -> int:
    path = "training.epochs"
    if path in spec.search.space:
        return int(max(spec.search.space[path].ends()))
    ends = [end for stage in spec.search.stages if path in stage.space for end in stage.space[path].ends()]
    return int(max([spec.training.epochs, *ends]))


def _hyperband(spec: StudySpec) -> Any:
    most, part = _most_epochs(spec), spec.search.pruner
    return _Hyperband(
        min_resource=min(part.min_epochs, most), max_resource=most, reduction_factor=part.reduction_factor
    )


def _halving(spec: StudySpec) -> Any:
    part = spec.search.pruner
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=part.min_epochs, reduction_factor=part.reduction_factor)


def _median(spec: StudySpec) -> Any:
    part = spec.search.pruner
    # Optuna's steps count from 0, epochs from 1.
    return optuna.pruners.MedianPruner(n_startup_trials=part.startup_trials, n_warmup_steps=part.warmup_epochs + 1)


def _wilcoxon(spec: StudySpec) -> Any:
    part = spec.search.pruner
    return optuna.pruners.WilcoxonPruner(p_threshold=part.p_threshold, n_startup_steps=part.startup_trials)


def _curve(spec: StudySpec) -> Any:
    part = spec.search.pruner
    return CurvePruner(startup_trials=part.startup_trials, warmup_epochs=part.warmup_epochs, threshold=part.p_threshold)


PRUNERS: Mapping[str, Callable[[StudySpec], Any]] = {
    "none": lambda _spec: optuna.pruners.NopPruner(),
    "median": _median,
    "successive_halving": _halving,
    "hyperband": _hyperband,
    # Optuna looks at one epoch more than its patience says.
    "patient": lambda spec: optuna.pruners.PatientPruner(None, patience=spec.search.pruner.patience - 1),
    "wilcoxon": _wilcoxon,
    "curve": _curve,
}


def build_pruner(spec: StudySpec) -> Any:
    """The spec's pruner."""
    return PRUNERS[spec.search.pruner.name](spec)
