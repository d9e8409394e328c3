"""Studies whose training is a formula."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpo.home import Home
from hpo.records import FINAL, Candidate, StudyResult, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.search.study import Study
from hpo.spec.study import StudySpec

MIXED = {
    "training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True},
    "model.dropout": {"float": [0, 0.5], "step": 0.1},
    "model.hidden": {"choice": [32, [64, 32], []]},
    "training.optimizer.name": {"choice": ["sgd", "adam"]},
    "training.optimizer.momentum": {"float": [0, 0.9], "when": {"training.optimizer.name": "sgd"}},
    "training.batch_size": {"int": [16, 256], "log": True},
}
NUMERIC = {path: MIXED[path] for path in ("training.optimizer.lr", "model.dropout", "training.batch_size")}
FINITE = {
    "model.hidden": {"choice": [32, [64, 32], []]},
    "training.optimizer.name": {"choice": ["sgd", "adam"]},
    "training.optimizer.momentum": {"float": [0, 0.9], "step": 0.3, "when": {"training.optimizer.name": "sgd"}},
}
FINITE_CELLS = 3 * (4 + 1)


def objective(parameters: Mapping[str, Any]) -> float:
    """Best at lr 0.01, no dropout, much momentum."""
    lr = parameters.get("training.optimizer.lr", 0.01)
    lag = 0.9 - parameters.get("training.optimizer.momentum", 0.9)
    return 1 - (math.log10(lr) + 2) ** 2 / 8 - parameters.get("model.dropout", 0.0) / 4 - lag / 4


def train(study: Study, candidate: Candidate, *, epochs: int = 9, worth=objective) -> TrialResult:
    """Report epoch by epoch, and tell."""
    value = worth(candidate.parameters)
    for epoch in range(1, epochs + 1):
        if study.report(candidate.number, epoch, value * epoch / epochs):
            result = TrialResult(candidate.number, TrialState.PRUNED, value * epoch / epochs, epoch)
            break
    else:
        result = TrialResult(candidate.number, TrialState.COMPLETE, value, epochs)
    study.tell(result)
    return result


def run_all(study: Study, budget: int = 1000, epochs: int = 1, worth=objective) -> None:
    """Ask, train and tell until there is nothing more."""
    while candidate := study.ask(budget=budget, worker="w"):
        train(study, candidate, epochs=epochs, worth=worth)


def sequence(result: StudyResult) -> list[tuple[Any, ...]]:
    """What was searched, in the study's own order, and how it ended."""
    done = [trial for trial in result.trials if trial.state.finished and trial.candidate.stage != FINAL]
    done.sort(key=lambda trial: trial.candidate.ordinal)
    parts = [(trial.candidate, trial.state) for trial in done]
    return [(one.stage, one.ordinal, one.seed, one.parameters, state) for one, state in parts]


def run_in_pieces(home: Home, spec: StudySpec, budget: int, *, epochs: int = 1) -> StudyResult:
    """A study that is resumed four times, each time after a trial that was killed or stopped."""
    for piece in range(4):
        study = open_study(home, spec, data_digest="d")
        study.reap()
        for _ in range(2):
            train(study, study.ask(budget=budget, worker="w"), epochs=epochs)
        broken = study.ask(budget=budget, worker="w")
        # Rungs that it reached, and what samplers noted of it, must not count twice.
        for epoch in range(1, epochs):
            study.report(broken.number, epoch, objective(broken.parameters) * epoch / epochs)
        if piece % 2:
            study.tell(TrialResult(broken.number, TrialState.STOPPED))
        study.close()
    study = open_study(home, spec, data_digest="d")
    study.reap()
    run_all(study, budget, epochs)
    result = study.result()
    study.close()
    return result


def run_whole(home: Home, spec: StudySpec, budget: int, *, epochs: int = 1) -> StudyResult:
    """A study that is run without interruption."""
    study = open_study(home, spec, data_digest="d")
    run_all(study, budget, epochs)
    result = study.result()
    study.close()
    return result
