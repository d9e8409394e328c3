"""A sampler that models scores over parameters and epochs by a Gaussian process.

Pruned trials count with what they had reached, as in Kandasamy et al. 2017, "Multi-fidelity Bayesian Optimisation with
Continuous Approximations": the epoch is one more input of the model. The candidate with the largest expected
improvement of the score after all epochs (Jones et al. 1998) is tried next. Scores are replaced by normal quantiles of
their ranks (Salinas et al. 2020, "A Quantile-based Approach for Hyperparameter Transfer Learning"): a few trainings
that diverge do not flatten the differences among good ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.search.gaussian_process import GaussianProcess, expected_improvement, fit
from hpo.search.stages import Stage, decode, distribution, encode, from_unit, to_unit
from hpo.spec.automatic import longest_training
from hpo.spec.grid import holds
from hpo.spec.space import Choice, Float, Int
from hpo.storage.optuna_private import OrdinalQmc
from hpo.storage.trial_attrs import attrs_of, ordinal_of
from hpo.storage.trial_index import LATEST, MOST

Floats = NDArray[np.float64]

_RUNGS = 3  # scores after 1, 3, 9, ... epochs, and the last one, enter the model
_SCORES = 250  # scores in the model: the best half, and a sample of the others
_REFIT = 1.15  # length scales are learned again when there are 15 % more trials, from those before
_CANDIDATES = 400  # among which the expected improvement is maximised: half at random, half near the best trials
_BEST = 5  # trials near which candidates are drawn


class Places:
    """The parameters of a stage as coordinates.

    places (n, parameters) has the place of each number in its range, in [0, 1], and the index of each option; NaN where
    a parameter is not active. features (n, dimensions) are the inputs of the model.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self.parameters = stage.space.ordered()
        self._conditional = stage.space.conditional

    def of(self, values: Mapping[str, Any]) -> list[float]:
        """The places of one candidate."""
        return [self._place(part, values[path]) if path in values else math.nan for path, part in self.parameters]

    def _place(self, part: Float | Int | Choice, value: Any) -> float:
        return float(part.choice.index(value)) if isinstance(part, Choice) else to_unit(part, value)

    def values(self, places: Floats) -> dict[str, Any]:
        """The active parameters of one candidate."""
        found: dict[str, Any] = {}
        for (path, part), place in zip(self.parameters, places, strict=True):
            if not self._conditional or holds(part.when, self._stage.context(found)):
                found[path] = part.choice[int(place)] if isinstance(part, Choice) else from_unit(part, float(place))
        return found

    def draw(self, rng: np.random.Generator, count: int) -> Floats:
        """Random candidates."""
        places = rng.random((count, len(self.parameters)))
        for column, (_, part) in enumerate(self.parameters):
            if isinstance(part, Choice):
                places[:, column] = np.floor(places[:, column] * len(part.choice))
        return places

    def near(self, rng: np.random.Generator, centres: Floats) -> Floats:
        """A candidate near each centre: some of its parameters changed, numbers by 0.01 to 0.3 of their range."""
        drawn = self.draw(rng, len(centres))
        width = np.exp(rng.uniform(math.log(0.01), math.log(0.3), (len(centres), 1)))
        moved = centres + width * rng.normal(size=centres.shape)
        moved = np.abs(moved)
        moved = np.clip(np.where(moved > 1, 2 - moved, moved), 0, 1)
        options = np.array([isinstance(part, Choice) for _, part in self.parameters])
        moved = np.where(options | np.isnan(centres), drawn, moved)
        share = np.maximum(rng.random((len(centres), 1)), 1 / len(self.parameters))
        change = (rng.random(centres.shape) < share) | np.isnan(centres)
        return np.where(change, moved, centres)

    def features(self, places: Floats) -> Floats:
        """Inputs of the model: places of numbers on their steps, one column for each of three or more options."""
        columns = []
        if self._conditional:
            places = np.array([self.of(self.values(row)) if not np.isnan(row).any() else row for row in places])
        for (_, part), column in zip(self.parameters, places.T, strict=True):
            if isinstance(part, Choice):
                only = [1] if len(part.choice) == 2 else range(len(part.choice))
                columns += [np.where(np.isnan(column), 0.5, column == option) for option in only]
            else:
                columns.append(np.where(np.isnan(column), 0.5, column))
        return np.column_stack(columns).astype(float)


class Observation(NamedTuple):
    """A trial with a score: its ordinal, places, and share of the epochs on a log scale -> score, higher is better."""

    ordinal: int
    places: list[float]
    curve: Mapping[float, float]


class MultiFidelityGp(optuna.samplers.BaseSampler):  # type: ignore[misc]
    """The sampler of one candidate; seed decides all its draws."""

    def __init__(self, stage: Stage, *, seed: int) -> None:
        self._stage = stage
        self._seed = seed
        self._places = Places(stage)
        self._named = [(path, part, stage.label(path)) for path, part in self._places.parameters]
        folds = stage.spec.split.folds if stage.spec.split.kind == "kfold" else 1
        self._steps = max(2, longest_training(stage.spec) * folds)
        self._random = optuna.samplers.RandomSampler(seed=seed)

    def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002
        """Every parameter."""
        return {name: distribution(part) for _, part, name in self._named}

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        """A random value."""
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def sample_relative(self, study: Any, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:
        """Name -> encoded value; points of a Sobol sequence for the first trials."""
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        others.sort(key=lambda other: (ordinal_of(other), other.number))
        ordinal = ordinal_of(trial)
        known = self._observations(study, others)
        if len(known) < max(2, self._stage.spec.search.sampler.startup_trials):
            design = OrdinalQmc(seed=self._stage.spec.seed, ordinal=ordinal, ranges=search_space)
            found: dict[str, Any] = design.sample_relative(
                study, trial, design.infer_relative_search_space(study, trial)
            )
            return found
        rng = np.random.default_rng(self._seed)
        running = [self._parameters_of(other) for other in others if other.state is TrialState.RUNNING]
        places = propose(self._places, known, [values for values in running if values], rng)
        values = self._places.values(places)
        return {self._stage.label(path): encode(self._stage.space[path], value) for path, value in values.items()}

    def _parameters_of(self, trial: FrozenTrial) -> dict[str, Any]:
        if not trial.state.is_finished():
            return dict(attrs_of(trial).parameters or {})
        params = trial.params
        return {path: decode(part, params[name]) for path, part, name in self._named if name in params}

    def _observations(self, study: Any, trials: Sequence[FrozenTrial]) -> list[Observation]:
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        found = []
        scored = {ordinal_of(trial) for trial in trials if trial.state is not TrialState.FAIL}
        for trial in trials:
            if trial.state is TrialState.FAIL and ordinal_of(trial) in scored:
                continue  # it was tried again
            curve = self._curve(trial, sign)
            if curve:
                found.append(Observation(ordinal_of(trial), self._places.of(self._parameters_of(trial)), curve))
        return found

    def _curve(self, trial: FrozenTrial, sign: float) -> dict[float, float]:
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL):
            return {}
        # What failed, or was refused before its first epoch, is as bad as can be: without that it was proposed again.
        refused = trial.state is TrialState.PRUNED and not any(map(math.isfinite, trial.intermediate_values.values()))
        if trial.state is TrialState.FAIL or refused or any(amount > 0 for amount in trial.constraints.values()):
            return {1.0: -math.inf}
        curve: dict[float, float] = {}
        best, rung, last = -math.inf, 1, 0
        for step, value in sorted(trial.intermediate_values.items()):
            if not math.isfinite(value):
                continue
            if step > rung and best > -math.inf:
                curve[self._share(rung)] = best
                while rung < step:
                    rung *= _RUNGS
            best, last = max(best, sign * value), step
            if step == rung:
                curve[self._share(rung)] = best
                rung *= _RUNGS
        if last:
            curve[self._share(last)] = best
        if trial.state is TrialState.COMPLETE:
            curve.pop(self._share(last), None)
            curve[1.0] = sign * trial.value
        return curve

    def _share(self, step: int) -> float:
        return min(1.0, math.log(max(step, 1)) / math.log(self._steps))


def propose(
    places: Places,
    known: Sequence[Observation],
    running: Sequence[Mapping[str, Any]],
    rng: np.random.Generator,
) -> Floats:
    """The places of the candidate with the largest expected improvement.

    known are in the order of their ordinals; running are the values of the trials without a score, which are taken to
    end as the model forecasts.
    """
    points = places.features(np.array([each.places for each in known]))
    owners = np.array([owner for owner, each in enumerate(known) for _ in each.curve])
    shares = np.array([share for each in known for share in each.curve])
    scores = np.array([score for each in known for score in each.curve.values()])
    # Of a long study a sample is known, of which the latest trials change each time.
    ordinals = np.array([each.ordinal for each in known])[owners]
    lasting = ordinals[-1] + 1 if ordinals[-1] < MOST else ordinals[-1] + 1 - LATEST
    early = ordinals < _REFIT ** math.floor(math.log(lasting) / math.log(_REFIT) + 1e-9)
    early |= owners < 2
    lengths = fit(np.column_stack([points[owners], shares])[early], normal_ranks(scores[early]))
    scores = normal_ranks(scores)
    if len(scores) > _SCORES:
        order = np.argsort(-scores, kind="stable")
        kept = np.concatenate([order[: _SCORES // 2], rng.permutation(order[_SCORES // 2 :])[: _SCORES // 2]])
        owners, shares, scores = owners[kept], shares[kept], scores[kept]
    inputs = np.column_stack([points[owners], shares])
    model = GaussianProcess(inputs, scores, lengths)
    if running:
        pending = _at_end(places.features(np.array([places.of(values) for values in running])))
        forecast, _ = model(pending)
        model = GaussianProcess(np.vstack([inputs, pending]), np.concatenate([scores, forecast]), lengths)
    best = list(dict.fromkeys(owners[np.argsort(-scores, kind="stable")]))[:_BEST]
    centres = np.array([known[owner].places for owner in rng.choice(best, _CANDIDATES // 2)])
    candidates = np.vstack([places.draw(rng, _CANDIDATES // 2), places.near(rng, centres)])
    mean, deviation = model(_at_end(places.features(candidates)))
    tried, _ = model(_at_end(points))
    chosen: Floats = candidates[int(np.argmax(expected_improvement(mean, deviation, float(tried.max()))))]
    return chosen


def normal_ranks(values: Floats) -> Floats:
    """The normal quantiles of the ranks of the values; equal values have equal ones."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    quantiles: Floats = ndtri((rankdata(values) - 0.5) / len(values))
    return quantiles


def _at_end(points: Floats) -> Floats:
    return np.column_stack([points, np.ones(len(points))])
