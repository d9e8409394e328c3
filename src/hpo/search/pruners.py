"""The pruners of a search: a table of Optuna's pruners and one of our own, which extrapolates learning curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.records import Epoch, best_of
from hpo.search.constraints import aims
from hpo.search.halving import Halving
from hpo.search.samplers import called
from hpo.spec.automatic import chosen_pruner, longest_training
from hpo.spec.own_code import load_function
from hpo.spec.search import PrunerSpec
from hpo.spec.study import Setup, StudySpec
from hpo.storage.optuna_private import OrdinalHyperband
from hpo.storage.trial_attrs import RESULT

Floats = NDArray[np.float64]

_LEAST = 3  # finished trials; with fewer, a line through them says nothing
_STARTUP, _FOLDS = 5, 2  # startup_trials where it is not given; of whole folds
_PRIOR = 1.0  # weight of "nothing is known of the slopes", in trials


@dataclass(frozen=True)
class Pruner:
    """An entry of the table of pruners: build(spec) returns Optuna's pruner.

    reports says which values of a training with several folds are reported to it: every epoch, with steps that count on
    from fold to fold; the epochs of the first fold; or the best value of each fold, one step a fold.
    """

    build: Callable[[StudySpec], Any]
    reports: Literal["every_epoch", "first_fold", "whole_folds"] = "every_epoch"


def report_step(spec: StudySpec, setup: Setup, epochs: Sequence[Epoch]) -> tuple[int, float] | None:
    """The (step, value) to report after the last of these epochs of a trial; None where nothing is reported.

    setup is the trial's; steps count from 1.
    """
    epoch, objective = epochs[-1], spec.search.objective
    reports = pruner_entry(spec.search.pruner).reports
    if reports == "first_fold" and epoch.fold:
        return None
    if reports == "whole_folds" and setup.split.kind == "kfold":
        if not epoch.last:
            return None
        fold = tuple(other for other in epochs if other.fold == epoch.fold)
        return epoch.fold + 1, best_of(fold, setup.training.monitor).scores[objective]
    return epoch.fold * setup.training.epochs + epoch.number, epoch.scores[objective]


def report_values(
    spec: StudySpec, setup: Setup, epochs: Sequence[Epoch], costs: Mapping[str, float]
) -> tuple[int, float | tuple[float, ...]] | None:
    """report_step, with one value for each of several objectives; costs has those that no epoch changes."""
    reported = report_step(spec, setup, epochs)
    if reported is None or not spec.search.objectives:
        return reported
    scores = {**epochs[-1].scores, **costs}
    return reported[0], tuple(scores.get(score, math.nan) for score, _ in aims(spec))


def chance_to_beat(best: float, own: Floats, earlier: Floats, finals: Floats) -> float:
    """The chance in [0, 1] that a trial ends above `best`, from how trials with similar curves have ended.

    own (2,) is score_and_gain of the trial, earlier (n, 2) those of finished trials after the same epoch, and finals
    (n,) their final scores, n > 1; more is better. The remaining gain of a trial is regressed on score and gain (after
    Baker et al. 2017, "Accelerating Neural Architecture Search using Performance Prediction") by a Bayesian linear
    regression with conjugate priors (Bishop 2006, ch. 3.3): its forecast is a Student t distribution, wide where trials
    are few. Trials with a similar score weigh most.
    """
    from scipy.special import stdtr

    center, spread = earlier.mean(0), earlier.std(0)
    spread[spread == 0] = 1.0
    past = np.column_stack([np.ones(len(earlier)), (earlier - center) / spread])
    now = np.array([1.0, *(own - center) / spread])
    weight = np.exp(-0.5 * (past[:, 1] - now[1]) ** 2)
    gains = finals - earlier[:, 0]
    precision = (past.T * weight) @ past + np.diag([1e-3, _PRIOR, _PRIOR])
    slopes = np.linalg.solve(precision, (past.T * weight) @ gains)
    # One trial's worth of belief that forecasts err by a tenth of what separates the trials.
    freedom = 1.0 + weight.sum()
    noise = ((0.1 * finals.std()) ** 2 + weight @ (gains - past @ slopes) ** 2) / freedom
    scale = np.sqrt(noise * (1 + now @ np.linalg.solve(precision, now)))
    lead = own[0] + now @ slopes - best
    return float(stdtr(freedom, lead / scale)) if scale > 0 else float(lead > 0)


def score_and_gain(curve: Floats, epoch: int) -> tuple[float, float]:
    """The best score of a trial after an epoch, and its gain in the later half of the epochs until then.

    curve is that of running_best; a trial that ended before keeps its last score.
    """
    last = len(curve) - 1
    level = curve[min(epoch - 1, last)]
    with np.errstate(invalid="ignore"):  # infinite scores: the gain is NaN
        return level, level - curve[min((epoch - 1) // 2, last)]


def running_best(reported: Mapping[int, float], sign: float) -> Floats:
    """The best of sign * value up to each step, as (steps,), from step (counted from 1) -> value.

    Steps without a number repeat the last one; -inf before the first number.
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
    """Prunes a trial once its chance to beat the best finished trial is below a threshold.

    No trial is pruned in its first warmup_epochs, nor before startup_trials have finished. Steps count from 1.
    """

    def __init__(self, *, startup_trials: int, warmup_epochs: int, threshold: float) -> None:
        self._least = max(startup_trials, _LEAST)
        self._warmup = warmup_epochs
        self._threshold = threshold
        self._finished: dict[int, _Finished] = {}  # by number; they do not change any more

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to end the trial now."""
        step = trial.last_step
        if step is None or step <= self._warmup:
            return False
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        # A trial that reused an earlier result has no curve.
        done = [self._summary(other, sign) for other in trials if other.intermediate_values]
        best = max((other.final for other in done if other.feasible), default=np.inf)
        own = score_and_gain(running_best(trial.intermediate_values, sign), step)
        rows = [(*score_and_gain(other.curve, step), other.final) for other in done]
        past = np.array([row for row in rows if np.isfinite(row).all()])
        if len(past) < self._least or not np.isfinite([best, *own]).all():
            return False
        return chance_to_beat(best, np.array(own), past[:, :2], past[:, 2]) < self._threshold

    def _summary(self, trial: FrozenTrial, sign: float) -> _Finished:
        if trial.number not in self._finished:
            curve = running_best(trial.intermediate_values, sign)
            feasible = trial.user_attrs.get(RESULT, {}).get("feasible", True)
            self._finished[trial.number] = _Finished(curve, sign * trial.value, feasible)
        return self._finished[trial.number]


def _hyperband(spec: StudySpec) -> Any:
    most, part = longest_training(spec), spec.search.pruner
    first, factor = min(part.min_epochs or 1, most), part.reduction_factor
    return OrdinalHyperband(
        lambda bracket: Halving(first=first * factor**bracket, factor=factor),
        min_resource=first,
        max_resource=most,
        reduction_factor=factor,
    )


def _halving(spec: StudySpec) -> Any:
    part = spec.search.pruner
    return Halving(first=part.min_epochs or 1, factor=part.reduction_factor)


def _median(spec: StudySpec) -> Any:
    part = spec.search.pruner
    # Optuna's steps count from 0, epochs from 1.
    return optuna.pruners.MedianPruner(n_startup_trials=_startup(part), n_warmup_steps=part.warmup_epochs + 1)


def _wilcoxon(spec: StudySpec) -> Any:
    part = spec.search.pruner
    steps = _startup(part, default=_FOLDS if spec.split.kind == "kfold" else _STARTUP)
    return optuna.pruners.WilcoxonPruner(p_threshold=part.p_threshold, n_startup_steps=steps)


def pruner_warnings(spec: StudySpec) -> list[str]:
    """A text where the pruner can never end a trial before its last fold."""
    part, split = spec.search.pruner, spec.split
    if part.name != "wilcoxon" or split.kind != "kfold":
        return []
    before, steps = split.folds - 1, _startup(part, default=_FOLDS)
    least = 0.5**before  # every fold is worse than that of the best trial
    if before >= max(2, steps) and least < part.p_threshold:
        return []
    text = (
        f"search.pruner: wilcoxon ends no trial before the last of {split.folds} folds: after {before} its p is "
        f"{least:g} at least (p_threshold {part.p_threshold:g}, startup_trials {steps})"
    )
    return [text]


def _startup(part: PrunerSpec, *, default: int = _STARTUP) -> int:
    return default if part.startup_trials is None else part.startup_trials


def _curve(spec: StudySpec) -> Any:
    part = spec.search.pruner
    return CurvePruner(startup_trials=_startup(part), warmup_epochs=part.warmup_epochs, threshold=part.p_threshold)


def _none(spec: StudySpec) -> Any:  # noqa: ARG001
    return optuna.pruners.NopPruner()


def _patient(spec: StudySpec) -> Any:
    # Optuna looks at one epoch more than its patience says.
    return optuna.pruners.PatientPruner(None, patience=spec.search.pruner.patience - 1)


def _auto(spec: StudySpec) -> Any:
    part, _ = chosen_pruner(spec)
    return PRUNERS[part.name].build(_with_pruner(spec, part))


def _with_pruner(spec: StudySpec, part: PrunerSpec) -> StudySpec:
    return spec.model_copy(update={"search": spec.search.model_copy(update={"pruner": part})})


def _own(spec: StudySpec) -> Any:
    part = spec.search.pruner
    make = load_function(part.name, what="pruner")
    return called(make, part.options, optuna.pruners.BasePruner, name=part.name, what="pruner")


# To add one: an entry here, and its name in spec.space.PRUNER_NAMES.
PRUNERS: dict[str, Pruner] = {
    "auto": Pruner(_auto),
    "none": Pruner(_none),
    "median": Pruner(_median),
    "successive_halving": Pruner(_halving),
    "hyperband": Pruner(_hyperband),
    # Each later fold begins far below the best value of the first.
    "patient": Pruner(_patient, reports="first_fold"),
    "wilcoxon": Pruner(_wilcoxon, reports="whole_folds"),
    "curve": Pruner(_curve),
}


def pruner_entry(part: PrunerSpec) -> Pruner:
    """The entry of the table, or one for package.module:function."""
    return PRUNERS.get(part.name) or Pruner(_own)


def build_pruner(spec: StudySpec) -> Any:
    """The pruner of the study. Raises SpecError where a function of the user's own returns none."""
    return pruner_entry(spec.search.pruner).build(spec)
