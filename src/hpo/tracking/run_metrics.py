"""The metrics of runs: their names, which group the charts of MLflow's pages, and the way back to scores."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hpo.records import Epoch, StudyResult, TrialResult, TrialState

# Metrics are in sections: MLflow groups charts by what is before the last slash, in alphabetical order, those without
# a slash next to last and those of system/ on a page of their own. So curves come before single values.
OBJECTIVE = "objective"
BEST = "valid/best/"  # the validation scores of the best epoch
_BEST_EPOCH = f"{BEST}epoch"
_OLD_BEST, _OLD_BEST_EPOCH = "best_", "best_epoch"  # in runs of earlier versions
_SECTIONS = ("train", "valid", "test")
_OTHER = re.compile(r"[^\w\- ]")  # what a class name may hold and the name of a metric may not


def metrics_at(values: Mapping[str, float], when: float, *, step: int = 0) -> list[Any]:
    """mlflow Metrics of one step; when is in seconds since 1970."""
    from mlflow.entities import Metric

    return [Metric(name, float(value), int(when * 1000), step) for name, value in values.items()]


def metric_name(score: str) -> str:
    """The name of a score's curve, in the section of its part: valid_recall[cat] -> valid/recall/cat."""
    part, _, name = score.partition("_")
    return f"{part}/{stored_name(name)}" if part in _SECTIONS else stored_name(score)


def stored_name(score: str) -> str:
    """A score's name as MLflow takes it: valid_recall[cat] -> valid_recall/cat; other signs in hexadecimal."""
    return re.sub(
        r"\[([^\[\]]+)\](.*)",
        lambda match: (
            "/" + _OTHER.sub(lambda letter: f":{ord(letter[0]):x}:", match[1]) + (match[2] and f"/{match[2]}")
        ),
        score,
    )


def score_name(stored: str) -> str:
    """The score's name that stored_name turned into this one."""
    name, slash, rest = stored.partition("/")
    if not slash:
        return stored
    inside, _, after = rest.partition("/")
    return f"{name}[{re.sub(':([0-9a-f]+):', lambda match: chr(int(match[1], 16)), inside)}]{after}"


def epoch_metrics(epochs: Sequence[Epoch], ended: float) -> list[Any]:
    """mlflow Metrics of epochs, the last of which ended at this time (seconds since 1970); one step per epoch.

    Folds after the first have sections of their own: fold1/valid_loss, ...
    """
    found: list[Any] = []
    for epoch in reversed(epochs):
        name = partial(_fold_name, epoch.fold) if epoch.fold else metric_name
        values = {name(score): value for score, value in epoch.scores.items()}
        values |= {name("train_learning_rate"): epoch.learning_rate}
        values |= {f"system/{f'fold{epoch.fold}_' if epoch.fold else ''}epoch_seconds": epoch.seconds}
        found += metrics_at(values, ended, step=epoch.number)
        ended -= epoch.seconds
    return found[::-1]


def _fold_name(fold: int, score: str) -> str:
    return f"fold{fold}/{stored_name(score)}"


def result_metrics(result: TrialResult, ended: float) -> list[Any]:
    """mlflow Metrics of an ended trial: objective, validation scores of the best epoch, duration, size, system."""
    best = {score.removeprefix("valid_"): value for score, value in result.scores.items() if score.startswith("valid_")}
    values: dict[str, float] = {f"{BEST}{stored_name(name)}": value for name, value in best.items()}
    if "latency_ms" in result.scores:
        values["latency_ms"] = result.scores["latency_ms"]
    values |= {"system/training_seconds": result.seconds}
    if result.best_epoch:
        values[_BEST_EPOCH] = result.best_epoch
    if result.parameter_count:
        values["parameter_count"] = result.parameter_count
    if result.value is not None:
        values[OBJECTIVE] = result.value
    if result.profile is not None:
        values |= {f"profile/{phase}_seconds": seconds for phase, seconds in result.profile.seconds.items()}
    return metrics_at(values, ended) + system_metrics(result)


def system_metrics(result: TrialResult) -> list[Any]:
    """mlflow Metrics that its UI shows as system metrics; one step for each time at which they were taken."""
    times = result.system.get("time", ())
    columns = {f"system/{name}": column for name, column in result.system.items() if name != "time"}
    return [
        metric
        for step, when in enumerate(times)
        for metric in metrics_at({name: column[step] for name, column in columns.items()}, when, step=step)
    ]


def study_metrics(study: StudyResult) -> dict[str, float]:
    """Metric -> value of a study's run: the best trial and the counts. No trial has a metric of these names."""
    values = {f"study/{state.value}": float(study.count(state)) for state in TrialState if state.finished}
    if study.best is not None and study.best.value is not None:
        values |= {"study/best_value": study.best.value, "study/best_trial": study.best.number}
    return values


def scores_of(metrics: Mapping[str, float]) -> dict[str, float]:
    """The scores among a trial run's metrics: valid_accuracy, ...; also of runs of earlier versions."""
    scores: dict[str, float] = {}
    for name, value in metrics.items():
        if name in (_BEST_EPOCH, _OLD_BEST_EPOCH) or not math.isfinite(value):
            continue
        if name.startswith(BEST):
            scores[score_name(f"valid_{name.removeprefix(BEST)}")] = value
        elif name.startswith(_OLD_BEST):
            scores[score_name(name.removeprefix(_OLD_BEST))] = value
    return scores


def is_result(metric: str) -> bool:
    """True for the metrics of a trial's run that its model gets too: its objective and its best scores."""
    return metric == OBJECTIVE or metric.startswith((BEST, _OLD_BEST))
