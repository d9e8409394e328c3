"""End trials whose learning curve says that they will not beat the best: curves of this study foretell each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.storage.optuna_storage import RESULT

Floats = NDArray[np.float64]

_LEAST = 3  # finished trials that a line through them says something about
_PRIOR = 1.0  # weight of "nothing is known of the slopes", in trials


def chance_to_beat(best: float, own: Floats, earlier: Floats, finals: Floats) -> float:
    """The chance in [0, 1] that a trial ends above best, from how trials that stood like it have ended.

    own (2,) is the standing of the trial, earlier (n, 2) those of finished trials after the same epoch and finals (n,)
    what they ended with, n > 1; more is better. What a trial still gains is regressed on its standing (after Baker et
    al. 2017, "Accelerating Neural Architecture Search using Performance Prediction") by a Bayesian linear regression
    with conjugate priors (Bishop 2006, ch. 3.3), so that few trials make a wide forecast: a Student t. Trials at a like
    level count most.
    """
    from scipy.special import stdtr

    center, spread = earlier.mean(0), earlier.std(0)
    spread[spread == 0] = 1.0
    past = np.column_stack([np.ones(len(earlier)), (earlier - center) / spread])
    now = np.array([1.0, *(own - center) / spread])
    like = np.exp(-0.5 * (past[:, 1] - now[1]) ** 2)
    gains = finals - earlier[:, 0]
    precision = (past.T * like) @ past + np.diag([1e-3, _PRIOR, _PRIOR])
    weights = np.linalg.solve(precision, (past.T * like) @ gains)
    # One trial's worth of belief that forecasts err by a tenth of what separates the trials.
    freedom = 1.0 + like.sum()
    noise = ((0.1 * finals.std()) ** 2 + like @ (gains - past @ weights) ** 2) / freedom
    scale = np.sqrt(noise * (1 + now @ np.linalg.solve(precision, now)))
    lead = own[0] + now @ weights - best
    return float(stdtr(freedom, lead / scale)) if scale > 0 else float(lead > 0)


def standing(curve: Floats, epoch: int) -> tuple[float, float]:
    """How a trial stands after an epoch: its best score so far, and how much of that the later half of its epochs gave.

    curve is that of running_best; a trial that ended before stays where it was.
    """
    last = len(curve) - 1
    level = curve[min(epoch - 1, last)]
    return level, level - curve[min((epoch - 1) // 2, last)]


def running_best(reported: Mapping[int, float], sign: float) -> Floats:
    """Step (from 1) -> value, as (steps,) the best of sign * value so far; steps without a number repeat the last.

    -inf before the first number.
    """
    values = np.full(max(reported), -np.inf)
    for step, value in reported.items():
        values[step - 1] = sign * value
    return np.fmax.accumulate(values)


class _Finished(NamedTuple):
    curve: Floats
    final: float
    feasible: bool


class CurvePruner(optuna.pruners.BasePruner):  # type: ignore[misc]
    """Prunes a trial once its chance to beat the best finished one is under a threshold.

    None is pruned in the first warmup_epochs, nor before startup_trials have finished. Steps count from 1.
    """

    def __init__(self, *, startup_trials: int, warmup_epochs: int, threshold: float) -> None:
        self._least = max(startup_trials, _LEAST)
        self._warmup = warmup_epochs
        self._threshold = threshold
        self._finished: dict[int, _Finished] = {}  # by number: these do not change any more

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to end the trial after what it has reported."""
        step = trial.last_step
        if step is None or step <= self._warmup:
            return False
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        # One that was answered with an earlier result has no curve.
        done = [self._known(other, sign) for other in trials if other.intermediate_values]
        best = max((other.final for other in done if other.feasible), default=np.inf)
        own = standing(running_best(trial.intermediate_values, sign), step)
        known = [(*standing(other.curve, step), other.final) for other in done]
        past = np.array([row for row in known if np.isfinite(row).all()])
        if len(past) < self._least or not np.isfinite([best, *own]).all():
            return False
        return chance_to_beat(best, np.array(own), past[:, :2], past[:, 2]) < self._threshold

    def _known(self, trial: FrozenTrial, sign: float) -> _Finished:
        if trial.number not in self._finished:
            curve = running_best(trial.intermediate_values, sign)
            feasible = trial.user_attrs.get(RESULT, {}).get("feasible", True)
            self._finished[trial.number] = _Finished(curve, sign * trial.value, feasible)
        return self._finished[trial.number]
