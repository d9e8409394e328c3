"""The samplers of a search: a table of Optuna's, the one that makes each resumable, and the stage it is to run."""

from __future__ import annotations

import hashlib
import inspect
import math
import random
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from hpo.errors import SpecError
from hpo.search.constraints import aims
from hpo.search.mfgp import MultiFidelityGp
from hpo.search.priors import prior_values
from hpo.search.stages import (
    Stage,
    decode,
    distribution,
    encode,
    find_origins,
    make_stage,
    stage_names,
)
from hpo.spec.automatic import chosen_sampler
from hpo.spec.grid import holds
from hpo.spec.own_code import load_function
from hpo.spec.search import SamplerSpec
from hpo.spec.space import Choice, Float, Int
from hpo.spec.study import StudySpec
from hpo.storage.optuna_private import FIXED, OrdinalQmc, at_ordinal
from hpo.storage.optuna_storage import Storage
from hpo.storage.reader import to_result
from hpo.storage.trial_attrs import STUDY, attrs_of, key_of
from hpo.storage.trial_index import TrialCounts, TrialIndex

_REDRAWS = 32
_MOST_CELLS = 100_000  # a finite space with more is searched like a continuous one


@dataclass(frozen=True)
class Sampler:
    """An entry of the table of samplers.

    build(stage, seed, ordinal) returns Optuna's sampler for one candidate; None: the cells of a grid in random order.
    learns: it samples from the results of earlier trials, so only a few should run at a time. several_objectives: it
    can search for several objectives.
    """

    build: Callable[[Stage, int, int], Any] | None
    learns: bool = False
    several_objectives: bool = True


class _Cmaes(optuna.samplers.CmaEsSampler):  # type: ignore[misc]
    """Seeded by the trial's ordinal: its number counts interrupted trials too."""

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> Any:
        return super().sample_relative(study, at_ordinal(trial), search_space)


def _random(stage: Stage, seed: int, ordinal: int) -> Any:  # noqa: ARG001
    return optuna.samplers.RandomSampler(seed=seed)


def _tpe(stage: Stage, seed: int, ordinal: int) -> Any:  # noqa: ARG001
    startup = stage.spec.search.sampler.startup_trials
    # group models the parameters of each branch of a conditional space jointly.
    return optuna.samplers.TPESampler(n_startup_trials=startup, seed=seed, group=stage.space.conditional)


def _cmaes(stage: Stage, seed: int, ordinal: int) -> Any:  # noqa: ARG001
    startup = stage.spec.search.sampler.startup_trials
    return _Cmaes(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)


def _gp(stage: Stage, seed: int, ordinal: int) -> Any:  # noqa: ARG001
    startup = stage.spec.search.sampler.startup_trials
    return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)


def _qmc(stage: Stage, seed: int, ordinal: int) -> Any:  # noqa: ARG001
    ranges = {stage.label(path): distribution(parameter) for path, parameter in stage.space.items()}
    return OrdinalQmc(seed=stage.spec.seed, ordinal=ordinal, ranges=ranges)


def _mfgp(stage: Stage, seed: int, ordinal: int) -> Any:  # noqa: ARG001
    return MultiFidelityGp(stage, seed=seed)


def _auto(stage: Stage, seed: int, ordinal: int) -> Any:
    part, _ = chosen_sampler(stage.spec)
    build = SAMPLERS[part.name].build
    assert build is not None  # noqa: S101 - for mypy: it is never the grid
    return build(stage, seed, ordinal)


# To add one: an entry here, and its name in spec.space.SAMPLER_NAMES.
SAMPLERS: dict[str, Sampler] = {
    "auto": Sampler(_auto, learns=True),
    "random": Sampler(_random),
    "grid": Sampler(None),
    "tpe": Sampler(_tpe, learns=True),
    "cmaes": Sampler(_cmaes, learns=True, several_objectives=False),
    "gp": Sampler(_gp, learns=True),
    "mfgp": Sampler(_mfgp, learns=True, several_objectives=False),
    "qmc": Sampler(_qmc),
}


def sampler_entry(part: SamplerSpec) -> Sampler:
    """The entry of the table, or one for package.module:function."""
    return SAMPLERS.get(part.name) or Sampler(lambda _, seed, __: _own(part, seed), learns=True)


def check_own(part: SamplerSpec) -> None:
    """Raise SpecError where package.module:function does not return a sampler."""
    if part.name not in SAMPLERS:
        _own(part, seed=0)


def _own(part: SamplerSpec, seed: int) -> Any:
    """What a function of the user's own returns for one candidate."""
    make = load_function(part.name, what="sampler")
    seeded = {"seed": seed} if "seed" in inspect.signature(make).parameters else {}
    return called(make, {**seeded, **part.options}, optuna.samplers.BaseSampler, name=part.name, what="sampler")


def called(make: Callable[..., Any], options: Mapping[str, Any], kind: type, *, name: str, what: str) -> Any:
    """make(**options), which must be of this kind. Raises SpecError; what is "sampler" or "pruner"."""
    try:
        made = make(**options)
    except Exception as error:
        raise SpecError(
            f"{what} {name}: calling it fails: {type(error).__name__}: {error}.",
            f"Mend it, or correct search.{what}.options: {dict(options)}.",
        ) from error
    if not isinstance(made, kind):
        raise SpecError(
            f"{what} {name}: it returns {type(made).__name__}, which is no {what} of Optuna.",
            f"Return an object of a class derived from optuna.{what}s.{kind.__name__}.",
        )
    return made


class StageSampler(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """The sampler of one stage: it samples all parameters of a candidate together, and the same ones after a resume.

    Each candidate has a sampler of Optuna of its own, seeded by the study's seed and its ordinal, which sees no
    interrupted trials: an interrupted candidate is sampled as it would have been without the interruption. index gives
    all trials of the study as they are now.
    """

    def __init__(self, stage: Stage, index: Callable[[], TrialIndex]) -> None:
        self._stage = stage
        self._index = index
        self._parameters = stage.space.ordered()
        cells = math.prod(parameter.count() for _, parameter in self._parameters)
        self._finite = cells < math.inf
        self._build = sampler_entry(stage.spec.search.sampler).build
        self._maximize = aims(stage.spec)[0][1] == "maximize"
        self._guided = any(part.prior for _, part in self._parameters)
        self._rejects = stage.spec.search.duplicates == "reject"
        # To train no candidate twice, the sampler must know when there is no other.
        counts = cells <= _MOST_CELLS and stage.spec.search.duplicates != "reseed"
        self._cells = list(stage.cells().items()) if self._build is None or counts else []
        self._spent = 0  # the number of cells at the front whose trials have ended
        random.Random(stage.spec.seed).shuffle(self._cells)  # noqa: S311

    @property
    def exhausted(self) -> bool:
        """Whether a grid, or a finite space in which no candidate is repeated, has no further candidate."""
        if not self._cells:
            return False
        undrawn = self.undrawn
        return len(list(islice(self._free_cells(), undrawn + 1))) <= undrawn

    @property
    def undrawn(self) -> int:
        """The number of candidates without parameters: their process died early, and each needs a cell."""
        candidates = map(attrs_of, self._index().unfinished(self._stage.name))
        return sum(candidate.parameters is None for candidate in candidates)

    def free_cell(self, fixed: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """A cell without a trial that has the fixed values."""
        return next(self._free_cells(fixed), None)

    def _free_cells(self, fixed: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        wanted = {path: key_of({path: value}) for path, value in (fixed or {}).items()}
        ended, running = self._index().ended(self._stage.name), self._running()
        while self._spent < len(self._cells) and ended.with_key(self._cells[self._spent][0]):
            self._spent += 1
        for key, cell in islice(self._cells, self._spent, None):
            fitting = all(path in cell and key_of({path: cell[path]}) == value for path, value in wanted.items())
            if fitting and key not in running and not ended.with_key(key):
                yield cell

    def accepts(self, fixed: Mapping[str, Any]) -> bool:
        """Whether a new candidate can have these values: all such cells of a grid may have their trials."""
        return self._build is not None or self.free_cell(fixed) is not None

    def active(self, values: Mapping[str, Any]) -> list[tuple[str, Float | Int | Choice]]:
        """The parameters that values lacks and whose conditions hold; none once the candidate is complete."""
        context = self._stage.context(values)
        return [(path, part) for path, part in self._parameters if path not in values and holds(part.when, context)]

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        """Every parameter: sample_relative samples them together."""
        return {self._stage.label(path): distribution(parameter) for path, parameter in self._parameters}

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:  # noqa: ARG002
        """Name -> encoded value of one candidate.

        If possible, it is not one that runs now (in a finite space), nor one of an earlier trial (where duplicates are
        rejected).
        """
        ordinal = attrs_of(trial).ordinal
        fixed = self._fixed(trial)
        if self._build is None:
            cell = self.free_cell(fixed) or self.free_cell() or self._cells[ordinal % len(self._cells)][1]
            return self._encoded(cell)
        given = fixed
        if self._guided:
            fixed = {**self._from_priors(ordinal), **given}
        drawn = self._draw(study, trial, self._build(self._stage, self._seed_of(ordinal), ordinal), fixed)
        if self._rejects or self._finite:
            running = self._running(but=ordinal)
            # A model of the results would propose the same candidate again and again.
            random_sampler = optuna.samplers.RandomSampler(seed=self._seed_of(ordinal))
            redrawn = (self._draw(study, trial, random_sampler, fixed) for _ in range(_REDRAWS))
            new = next((new for new in chain([drawn], redrawn) if not self._is_taken(new, ordinal, running)), None)
            if new is None and self._rejects:
                # All with these values of the priors may have been tried; a prior is no reason to repeat one.
                new = self.free_cell(fixed) or self.free_cell(given)
            drawn = new or drawn
        return self._encoded(drawn)

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """The value of a parameter that a retried candidate lacks, because the space has grown since."""
        sampler = optuna.samplers.RandomSampler(seed=self._seed_of(attrs_of(trial).ordinal))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _draw(self, study: Any, trial: FrozenTrial, sampler: Any, fixed: Mapping[str, Any]) -> dict[str, Any]:
        together = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        values: dict[str, Any] = {}
        while parameters := self.active(values):
            path, parameter = parameters[0]
            name = self._stage.label(path)
            if path in fixed:
                values[path] = fixed[path]
            elif name in together and parameter.takes(value := decode(parameter, together[name])):
                values[path] = value
            else:
                drawn = sampler.sample_independent(study, trial, name, distribution(parameter))
                values[path] = decode(parameter, drawn)
        return values

    def _from_priors(self, ordinal: int) -> dict[str, Any]:
        ended = self._index().ended(self._stage.name).sample()
        seed = self._seed_of(ordinal) ^ 1
        return prior_values(self._stage, ended, maximize=self._maximize, seed=seed)

    def _fixed(self, trial: FrozenTrial) -> dict[str, Any]:
        """The values that the trial was enqueued with."""
        given = trial.system_attrs.get(FIXED, {})
        named = ((path, parameter, self._stage.label(path)) for path, parameter in self._parameters)
        return {path: decode(parameter, given[name]) for path, parameter, name in named if name in given}

    def _encoded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        space = self._stage.space
        return {self._stage.label(path): encode(space[path], value) for path, value in values.items()}

    def _running(self, *, but: int | None = None) -> set[str]:
        """Keys of the unfinished candidates of the stage, except the one with the ordinal `but`."""
        candidates = map(attrs_of, self._index().unfinished(self._stage.name))
        return {key_of(each.parameters) for each in candidates if each.parameters is not None and each.ordinal != but}

    def _is_taken(self, values: Mapping[str, Any], ordinal: int, running: Container[str]) -> bool:
        """Whether a trial of another ordinal has this candidate already, and it should not be repeated."""
        key = key_of(self._stage.parameters(values))
        ended = self._index().ended(self._stage.name).with_key(key) if self._rejects else ()
        return key in running or any(attrs_of(trial).ordinal != ordinal for trial in ended)

    def _seed_of(self, ordinal: int) -> int:
        digest = hashlib.sha256(f"{self._stage.spec.seed}/sampler/{ordinal}".encode()).digest()
        return int.from_bytes(digest[:4], "big")


_STAGE = "hpo.stage."  # + name, a key of the study's attributes: the origins of a stage that has started


@dataclass(frozen=True)
class Step:
    """A stage being run, and its sampler; last: no stage follows."""

    stage: Stage
    sampler: StageSampler
    last: bool

    def is_full(self, counts: TrialCounts) -> bool:
        """Whether there is no new candidate; counts are the stage's."""
        spent = self.stage.limit is not None and counts.total >= self.stage.limit
        return spent or self.sampler.exhausted


class StageProgress:
    """The stages of one study in the storage; study_id is Optuna's."""

    def __init__(self, spec: StudySpec, storage: Storage, study_id: int) -> None:
        self._spec = spec
        self._storage = storage
        self._id = study_id
        self._names = stage_names(spec)
        self._steps: dict[int, Step] = {}
        self._rollbacks = storage.rollbacks

    def count(self, index: TrialIndex) -> TrialCounts:
        """The number of trials of the search that count."""
        return index.count(self._names)

    def current(self, index: TrialIndex) -> Step | None:
        """The first stage that is not complete; None after the last. Raises SpecError where one cannot start."""
        if self._rollbacks != self._storage.rollbacks:
            self._steps, self._rollbacks = {}, self._storage.rollbacks
        for position in range(len(self._names)):
            step = self._step(position)
            counts = index.count([step.stage.name])
            if counts.waiting or counts.running or not step.is_full(counts):
                return step
        return None

    def _step(self, position: int) -> Step:
        """A stage, once those before it are complete. Its origins are chosen once and stored."""
        if position not in self._steps:
            attributes = self._storage.database.get_study_user_attrs(self._id)
            key = f"{_STAGE}{self._names[position]}"
            if position and key not in attributes:
                study = to_result(attributes[STUDY], self._storage.records(self._id))
                attributes[key] = {"origins": list(find_origins(self._spec, position, study).items())}
                self._storage.database.set_study_user_attr(self._id, key, attributes[key])
            origins = dict(attributes[key]["origins"]) if position else {}
            record = attributes[STUDY]
            labels = record["grown"][-1]["labels"] if "grown" in record else {}
            stage = make_stage(self._spec, position, origins=origins, warm=record.get("start", []), labels=labels)
            sampler = StageSampler(stage, partial(self._storage.index, self._id))
            self._steps[position] = Step(stage, sampler, last=position == len(self._names) - 1)
        return self._steps[position]
