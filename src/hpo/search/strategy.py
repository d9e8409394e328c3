"""Who proposes candidates and who ends poor trials: tables of Optuna's samplers and pruners, made resumable."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from hpo.search.storage import start_of
from hpo.spec.space import Choice, Float, Int, holds
from hpo.spec.study import SamplerSpec, StudySpec

_REDRAWS = 32


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
    return parameter.choice[_options(parameter).index(value)] if isinstance(parameter, Choice) else value


def _options(parameter: Choice) -> list[Any]:
    if all(option is None or isinstance(option, bool | int | float | str) for option in parameter.choice):
        return parameter.choice
    # Optuna stores plain values only. All options are encoded, lest [1] meet "[1]".
    return [json.dumps(option, sort_keys=True) for option in parameter.choice]


def _continuous(parameter: Float | Int | Choice) -> bool:
    return isinstance(parameter, Float) and parameter.step is None


def _key(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True)


class _Cmaes(optuna.samplers.CmaEsSampler):  # type: ignore[misc]
    """Seeded by the trial's place in the study: its number counts interrupted trials too."""

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> Any:
        placed = copy.copy(trial)
        placed.number = start_of(trial).ordinal
        return super().sample_relative(study, placed, search_space)


class _Qmc(optuna.samplers.QMCSampler):  # type: ignore[misc]
    """The point of the Sobol sequence is the trial's place in the study, and every parameter has its coordinate."""

    def __init__(self, spec: StudySpec, ordinal: int) -> None:
        super().__init__(scramble=True, seed=spec.seed, warn_independent_sampling=False)
        self._ordinal = ordinal
        ranges = {path: distribution(parameter) for path, parameter in spec.search.space.items()}
        self._ranges = {path: found for path, found in ranges.items() if not found.single()}

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        return self._ranges

    def _find_sample_id(self, study: Any, search_space: Any) -> int:  # noqa: ARG002
        return self._ordinal


def _tpe(spec: StudySpec, seed: int, ordinal: int) -> Any:  # noqa: ARG001
    startup = spec.search.sampler.startup_trials
    # group models the parameters of each branch of a conditional space jointly.
    return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, group=spec.search.space.conditional)


def _options_of(sampler: SamplerSpec) -> dict[str, Any]:
    return {"n_startup_trials": sampler.startup_trials, "warn_independent_sampling": False}


# name -> (spec, sampler's seed for this candidate, its ordinal) -> sampler. Grid is Proposer's own.
SAMPLERS: Mapping[str, Callable[[StudySpec, int, int], Any]] = {
    "random": lambda _spec, seed, _ordinal: optuna.samplers.RandomSampler(seed=seed),
    "tpe": _tpe,
    "cmaes": lambda spec, seed, _ordinal: _Cmaes(seed=seed, **_options_of(spec.search.sampler)),
    "gp": lambda spec, seed, _ordinal: optuna.samplers.GPSampler(seed=seed, **_options_of(spec.search.sampler)),
    "qmc": lambda spec, _seed, ordinal: _Qmc(spec, ordinal),
}


class Proposer(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """Draws whole candidates, each from a sampler of its own that is seeded by the study's seed and the ordinal.

    So a study resumed in a new process draws what it would have drawn without the break. trials gives all trials of
    the study, interrupted ones too.
    """

    def __init__(self, spec: StudySpec, trials: Callable[[], Sequence[FrozenTrial]]) -> None:
        self._spec = spec
        self._trials = trials
        self._parameters = spec.search.space.ordered()
        self._fixed = spec.fixed()
        self._finite = all(distribution(part).single() or not _continuous(part) for _, part in self._parameters)
        self._cells: list[dict[str, Any]] = []
        if spec.search.sampler.name == "grid":
            self._cells = list(spec.search.space.cells(self._fixed))
            random.Random(spec.seed).shuffle(self._cells)  # noqa: S311

    @property
    def exhausted(self) -> bool:
        """Whether a grid has no cell left that was not handed out."""
        return bool(self._cells) and self._free_cell() is None

    def active(self, values: Mapping[str, Any]) -> list[tuple[str, Float | Int | Choice]]:
        """Parameters that values lacks and whose conditions hold now; empty once the candidate is whole."""
        known = {**self._fixed, **values}
        return [(path, part) for path, part in self._parameters if path not in values and holds(part.when, known)]

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        """Every parameter: sample_relative draws them together."""
        return {path: distribution(parameter) for path, parameter in self._parameters}

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:  # noqa: ARG002
        """Path -> encoded value of one candidate; not one that runs now, if the space is finite and that can be had."""
        ordinal = start_of(trial).ordinal
        if self._cells:
            cell = self._free_cell() or self._cells[ordinal % len(self._cells)]
            return {path: encode(self._spec.search.space[path], value) for path, value in cell.items()}
        build = SAMPLERS[self._spec.search.sampler.name]
        drawn = self._draw(study, trial, build(self._spec, self._seed(ordinal), ordinal))
        if self._finite:
            busy = {_key(other.params) for other in self._unfinished() if other.number != trial.number}
            # A model that has made up its mind would propose the same again and again.
            chance = optuna.samplers.RandomSampler(seed=self._seed(ordinal))
            redrawn = (self._draw(study, trial, chance) for _ in range(_REDRAWS))
            drawn = next((new for new in chain([drawn], redrawn) if _key(new) not in busy), drawn)
        return drawn

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """For a parameter that a retried candidate has not, because the space grew since."""
        sampler = optuna.samplers.RandomSampler(seed=self._seed(start_of(trial).ordinal))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _draw(self, study: Any, trial: FrozenTrial, sampler: Any) -> dict[str, Any]:
        together = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        encoded: dict[str, Any] = {}
        values: dict[str, Any] = {}
        while parameters := self.active(values):
            path, parameter = parameters[0]
            within = distribution(parameter)
            if path in together and within._contains(within.to_internal_repr(together[path])):
                encoded[path] = together[path]
            else:
                encoded[path] = sampler.sample_independent(study, trial, path, within)
            values[path] = decode(parameter, encoded[path])
        return encoded

    def _seed(self, ordinal: int) -> int:
        digest = hashlib.sha256(f"{self._spec.seed}/sampler/{ordinal}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def _free_cell(self) -> dict[str, Any] | None:
        taken = {_key(start_of(trial).parameters or {}) for trial in self._trials()}
        return next((cell for cell in self._cells if _key(cell) not in taken), None)

    def _unfinished(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if not trial.state.is_finished()]


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
    space = spec.search.space
    return int(max(space["training.epochs"].ends())) if "training.epochs" in space else spec.training.epochs


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


PRUNERS: Mapping[str, Callable[[StudySpec], Any]] = {
    "none": lambda _spec: optuna.pruners.NopPruner(),
    "median": _median,
    "successive_halving": _halving,
    "hyperband": _hyperband,
    # Optuna looks at one epoch more than its patience says.
    "patient": lambda spec: optuna.pruners.PatientPruner(None, patience=spec.search.pruner.patience - 1),
    "wilcoxon": _wilcoxon,
}


def build_pruner(spec: StudySpec) -> Any:
    """The spec's pruner."""
    return PRUNERS[spec.search.pruner.name](spec)
