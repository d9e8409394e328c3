"""End trials whose learning curve says that they will not beat the best: curves of this study foretell each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.search.storage import RESULT

Floats = NDArray[np.float64]

_LEAST = 3  # finished trials that a line through them says something about
_PRIOR = 1.0  # weight of "nothing is known of the slopes", in trials


def chance_to_beat(best: float, curve: Floats, earlier: Floats, finals: Floats) -> float:
    """The chance in [0, 1] that a trial ends above best, from how trials that stood like it have ended.

    curve (epochs,) is its best score so far after each epoch; earlier (n, epochs) those of finished trials after the
    same epochs and finals (n,) what they ended with, n > 1; more is better. What a trial still gains is regressed on
    its level and on what it gained in the later half of its epochs (after Baker et al. 2017, "Accelerating Neural
    Architecture Search using Performance Prediction"), by a Bayesian linear regression with conjugate priors (Bishop
    2006, ch. 3.3), so that few trials make a wide forecast: a Student t. Trials at a like level count most.
    """
    from scipy.special import stdtr

    curves = np.vstack([earlier, curve])
    level = curves[:, -1]
    features = np.column_stack([level, level - curves[:, (curves.shape[1] - 1) // 2]])
    center, spread = features[:-1].mean(0), features[:-1].std(0)
    features = (features - center) / np.where(spread > 0, spread, 1.0)
    known = np.column_stack([np.ones(len(features)), features])
    past, own = known[:-1], known[-1]
    like = np.exp(-0.5 * (features[:-1, 0] - features[-1, 0]) ** 2)
    gains = finals - level[:-1]
    precision = (past.T * like) @ past + np.diag([1e-3, _PRIOR, _PRIOR])
    weights = np.linalg.solve(precision, (past.T * like) @ gains)
    # One trial's worth of belief that forecasts err by a tenth of what separates the trials.
    freedom = 1.0 + like.sum()
    noise = ((0.1 * finals.std()) ** 2 + like @ (gains - past @ weights) ** 2) / freedom
    scale = np.sqrt(noise * (1 + own @ np.linalg.solve(precision, own)))
    lead = level[-1] + own @ weights - best
    return float(stdtr(freedom, lead / scale)) if scale > 0 else float(lead > 0)


class CurvePruner(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Prunes a trial once its chance to beat the best finished one is under a threshold.

    None is pruned in the first warmup_epochs, nor before startup_trials have finished. Steps count from 1.
    """

    def __init__(self, *, startup_trials: int, warmup_epochs: int, threshold: float) -> None:
        self._least = max(startup_trials, _LEAST)
        self._warmup = warmup_epochs
        self._threshold = threshold
        self._curves: dict[int, Floats] = {}  # those of finished trials do not change

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to end the trial after what it has reported."""
        step = trial.last_step
        if step is None or step <= self._warmup:
            return False
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        done = [other for other in done if other.intermediate_values]  # one that was not trained has no curve
        values = [sign * other.value for other in done if _feasible(other)]
        if len(done) < self._least or not values:
            return False
        for other in done:
            if other.number not in self._curves:
                self._curves[other.number] = running_best(other.intermediate_values, sign)
        # One that ended early stays where it was.
        steps = np.arange(step)
        earlier = np.array([curve[np.minimum(steps, len(curve) - 1)] for curve in map(self._of, done)])
        curve, finals = running_best(trial.intermediate_values, sign), np.array([sign * other.value for other in done])
        if not np.isfinite(curve).all():
            return False
        return chance_to_beat(max(values), curve, earlier, finals) < self._threshold

    def _of(self, trial: FrozenTrial) -> Floats:
        return self._curves[trial.number]


def running_best(reported: dict[int, float], sign: float) -> Floats:
    """Step (from 1) -> value, as (steps,) the best of sign * value so far; steps without a number repeat the last.

    -inf before the first number.
    """
    values = np.full(max(reported), -np.inf)
    for step, value in reported.items():
        values[step - 1] = sign * value
    return np.fmax.accumulate(values)


def _feasible(trial: FrozenTrial) -> Any:
    return trial.user_attrs.get(RESULT, {}).get("feasible", True)
