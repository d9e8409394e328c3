"""How much the best trial of a search can still be beaten by: when that is little, the search may end.

After Makarova et al. 2022, "Automatic Termination for Hyperparameter Optimization": with high probability the simple
regret is at most the largest upper confidence bound over the space less the largest lower one over the trials. The rule
of optuna.terminator is the same; it is deprecated there, imports torch, and its model has all trials of a study.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from hpo.home import Home
from hpo.records import TrialResult
from hpo.search.gaussian_process import GaussianProcess, fit, one_thread
from hpo.search.mfgp import Places
from hpo.search.pruners import running_best
from hpo.search.stages import Stage, decode
from hpo.search.starter import Starter
from hpo.spec.study import StudySpec
from hpo.storage.optuna_storage import Storage
from hpo.storage.retry import store_errors
from hpo.storage.trial_attrs import STUDY, attrs_of, result_of

Floats = NDArray[np.float64]

_LEAST = 20  # trials with a score, as in the paper
_COMPLETE = 5  # of them
_MOST = 250  # in the model: the better half, and some of the others
_DRAWN, _NEAR, _BEST = 2000, 500, 5  # candidates at random, and near the best trials
_MISS = 0.1  # the probability with which the bound may be too small; the paper's delta


def due(ended: int) -> bool:
    """Whether the rule is applied after so many trials: each of the first 40, then after every 5 % of them."""
    return ended >= _LEAST and ended % max(1, ended // 20) == 0


def enough_key(spec: StudySpec) -> dict[str, Any]:
    """What a verdict holds for: the setting and the space."""
    plain = spec.search.model_dump(mode="json", include={"enough", "space"})
    return {"enough": plain["enough"], "space": plain["space"]}


@one_thread()
def gain_left(stage: Stage, trials: Sequence[FrozenTrial], *, maximize: bool) -> float | None:
    """A bound on how much better than the best trial one of the space can be, in units of the objective.

    trials are those of the stage that have ended; None where there are too few. A pruned trial counts as one that ends
    where a complete one with its rank at that epoch has ended. Scores below the median of the complete ones, and trials
    that break a constraint, count as the median: how bad they are says nothing of the best.
    """
    places, sign = Places(stage), 1.0 if maximize else -1.0
    ordered = sorted(trials, key=lambda trial: (attrs_of(trial).ordinal, trial.number))
    scored = [(trial, score) for trial, score in zip(ordered, _scores(ordered, sign), strict=True) if score is not None]
    complete = [score for trial, score in scored if trial.state is TrialState.COMPLETE and math.isfinite(score)]
    if len(scored) < _LEAST or len(complete) < _COMPLETE:
        return None
    scores = np.maximum([score for _, score in scored], np.median(complete))
    spread = float(scores.std())
    if not spread:
        return 0.0
    rows = np.array([places.of(_values(stage, trial)) for trial, _ in scored])
    kept = _kept(scores)
    bound = _regret_bound(places, rows[kept], (scores[kept] - scores.mean()) / spread, len(scored), stage.spec.seed)
    return bound * spread


def _scores(trials: Sequence[FrozenTrial], sign: float) -> list[float | None]:
    """The score of each trial, higher is better; -inf where a constraint is broken, None where there is none."""
    done = [trial for trial in trials if trial.state is TrialState.COMPLETE and _fits(trial)]
    finals = np.sort([sign * trial.value for trial in done])
    curves = [running_best(trial.intermediate_values, sign) for trial in done if trial.intermediate_values]

    def forecast(trial: FrozenTrial) -> float | None:
        own = running_best(trial.intermediate_values, sign)
        same = np.sort([curve[min(len(own), len(curve)) - 1] for curve in curves])
        if not len(same) or not np.isfinite([own[-1], *same]).all():
            return -math.inf
        return float(np.quantile(finals, np.searchsorted(same, own[-1]) / len(same)))

    def score(trial: FrozenTrial) -> float | None:
        if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
            return None
        if not _fits(trial):
            return -math.inf
        if trial.state is TrialState.COMPLETE:
            return sign * float(trial.value)
        return forecast(trial) if trial.intermediate_values else -math.inf

    return [score(trial) for trial in trials]


def _fits(trial: FrozenTrial) -> bool:
    return all(amount <= 0 for amount in trial.constraints.values())


def _values(stage: Stage, trial: FrozenTrial) -> dict[str, Any]:
    named = ((path, part, stage.label(path)) for path, part in stage.space.items())
    return {path: decode(part, trial.params[name]) for path, part, name in named if name in trial.params}


def _kept(scores: Floats) -> NDArray[np.intp]:
    order = np.argsort(-scores, kind="stable")
    better, others = order[: _MOST // 2], order[_MOST // 2 :]
    return np.concatenate([better, others[:: max(1, math.ceil(len(others) / (_MOST // 2)))]])


def _regret_bound(places: Places, rows: Floats, scores: Floats, count: int, seed: int) -> float:
    """The bound for standardised scores; count is the number of trials, of which rows may be a part."""
    points = places.features(rows)
    model = GaussianProcess(points, scores, fit(points, scores))
    # As in the paper: Theorem 1 with the number of parameters, divided by 5.
    width = math.sqrt(2 * math.log(rows.shape[1] * count**2 * math.pi**2 / (6 * _MISS)) / 5)
    rng = np.random.default_rng([seed, count])
    best = rows[np.argsort(-scores, kind="stable")[:_BEST]]
    drawn = np.vstack([places.draw(rng, _DRAWN), places.near(rng, best[rng.integers(len(best), size=_NEAR)])])
    mean, deviation = model(np.vstack([points, places.features(drawn)]))
    tried = len(points)
    return float((mean + width * deviation).max() - (mean - width * deviation)[:tried].max())


class Verdict:
    """Whether a study has found enough, in its storage; study_id is Optuna's. All raise StoreError as Study does."""

    def __init__(self, home: Home, spec: StudySpec, storage: Storage, study_id: int, starter: Starter) -> None:
        self._home, self._spec, self._storage, self._id, self._starter = home, spec, storage, study_id, starter

    @property
    def told(self) -> str:
        """Why search.enough has ended the search, in a sentence; "" where it has not.

        A supervisor with another setting or space of the study may have found enough for those.
        """
        with store_errors(self._home):
            told = self._record().get("enough", {})
            return str(told["text"]) if told.items() >= enough_key(self._spec).items() else ""

    def gain_left(self) -> tuple[float, TrialResult, int] | None:
        """(how much the best trial can still be beaten by, its result, the trials that ended).

        None where there are too few trials, or the rule is not applied after so many.
        """
        with store_errors(self._home):
            index = self._storage.index(self._id)
            ended = index.ended(None)
            best = result_of(ended.best) if ended.best is not None and due(len(ended.visible)) else None
            step = self._starter.progress.current(index) if best is not None else None
        if best is None or step is None:
            return None
        gain = gain_left(step.stage, ended.sample(), maximize=self._spec.search.better == "maximize")
        return (gain, best, len(ended.visible)) if gain is not None else None

    def conclude(self, text: str) -> None:
        """Record why search.enough ends the search. Raises StoreError where the space has changed meanwhile."""

        def write() -> None:
            self._starter.check_space()
            record = {**self._record(), "enough": {"text": text, **enough_key(self._spec)}}
            self._storage.database.set_study_user_attr(self._id, STUDY, record)

        with store_errors(self._home):
            self._storage.transact(write, lock="studies")

    def _record(self) -> dict[str, Any]:
        record: dict[str, Any] = self._storage.database.get_study_user_attrs(self._id)[STUDY]
        return record
