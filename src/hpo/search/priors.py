"""Priors of parameters: how often a candidate is drawn from them, and how.

After PriorBand (Mallik et al. 2023, "PriorBand: Practical Hyperparameter Optimization in the Age of Deep Learning"):
the prior is trusted as long as it explains the best trials as well as the neighbourhood of the best one does. In place
of that neighbourhood, candidates that are not from the prior are the sampler's own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from hpo.search.stages import Stage, decode, from_unit, to_unit
from hpo.spec.space import Choice, Float, Int

_WIDTHS = {"low": 0.5, "medium": 0.25, "high": 0.125}  # standard deviations in the unit interval, as in NePS
_WEIGHTS = {"low": 2.0, "medium": 4.0, "high": 8.0}  # of the named option; each other one has 1
_MOST = 0.75  # of the candidates come from a prior: 1 - 1 / (1 + 3), PriorBand's at its lowest rung
_TOP = 3  # one in this many trials counts as good
_GOOD = 5  # at most
_LEAST = 3  # trials before a prior is judged


def prior_values(stage: Stage, trials: Sequence[FrozenTrial], *, maximize: bool, seed: int) -> dict[str, Any]:
    """Values of the parameters with a prior, drawn from it; {} where the sampler is to choose them.

    trials are those of the stage that have ended. maximize: the first objective is to be large.
    """
    parts = {path: part for path, part in stage.space.items() if part.prior is not None}
    chance = random.Random(seed)  # noqa: S311
    if not parts or chance.random() >= prior_share(stage, trials, maximize=maximize):
        return {}
    return {path: _drawn(part, chance) for path, part in parts.items()}


def prior_share(stage: Stage, trials: Sequence[FrozenTrial], *, maximize: bool) -> float:
    """The share in [0, 0.75] of candidates that are to come from the priors.

    Of the best third of the trials, at most five, the geometric mean of their densities under the priors is compared
    with that of their densities around the best trial; better trials weigh more.
    """
    parts = {path: part for path, part in stage.space.items() if part.prior is not None}
    ranked = _best_first(trials, maximize=maximize)
    if len(ranked) < _LEAST:
        return _MOST
    top = [_values(stage, trial) for trial in ranked[: min(_GOOD, math.ceil(len(ranked) / _TOP))]]
    lead, total = 0.0, 0.0  # logarithm of the ratio of both means, times the sum of the weights
    for place, values in enumerate(top):
        weight = 1 / (1 + place)
        total += weight
        for path, part in parts.items():
            if part.prior is not None and path in values and path in top[0]:
                prior = _log_density(part, part.prior.value, values[path], part.prior.confidence)
                lead += weight * (prior - _log_density(part, top[0][path], values[path], "medium"))
    return _MOST / (1 + math.exp(min(-lead / total, 700.0)))


def _best_first(trials: Sequence[FrozenTrial], *, maximize: bool) -> list[FrozenTrial]:
    """Complete trials before pruned ones, those that were pruned later first; each by value. Others are left out.

    With several objectives the first is the value.
    """
    sign = -1.0 if maximize else 1.0

    def key(trial: FrozenTrial) -> tuple[float, float, int]:
        complete = trial.state is TrialState.COMPLETE
        return -math.inf if complete else -(trial.last_step or 0), sign * trial.values[0], trial.number

    known = [
        trial
        for trial in trials
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        and trial.values
        and math.isfinite(trial.values[0])
        and all(amount <= 0 for amount in trial.constraints.values())
    ]
    return sorted(known, key=key)


def _values(stage: Stage, trial: FrozenTrial) -> Mapping[str, Any]:
    named = {path: stage.label(path) for path, _ in stage.space.items()}
    return {path: decode(stage.space[path], trial.params[name]) for path, name in named.items() if name in trial.params}


def _log_density(parameter: Float | Int | Choice, centre: Any, value: Any, confidence: str) -> float:
    """The logarithm of the density in the unit interval, or of an option's share times their number; 0 is uniform."""
    if isinstance(parameter, Choice):
        weight, count = _WEIGHTS[confidence], len(parameter.choice)
        return math.log(count * (weight if value == centre else 1.0) / (weight + count - 1))
    width, middle = _WIDTHS[confidence], to_unit(parameter, centre)
    mass = (math.erf((1 - middle) / width / math.sqrt(2)) + math.erf(middle / width / math.sqrt(2))) / 2
    away = (to_unit(parameter, value) - middle) / width
    return -away * away / 2 - math.log(width * math.sqrt(2 * math.pi) * mass)


def _drawn(parameter: Float | Int | Choice, chance: random.Random) -> Any:
    prior = parameter.prior
    assert prior is not None  # noqa: S101 - for mypy
    if isinstance(parameter, Choice):
        weights = [_WEIGHTS[prior.confidence] if option == prior.value else 1.0 for option in parameter.choice]
        return chance.choices(parameter.choice, weights)[0]
    middle, width = to_unit(parameter, prior.value), _WIDTHS[prior.confidence]
    while not 0 <= (place := chance.gauss(middle, width)) <= 1:
        pass
    return from_unit(parameter, place)
