"""Studies whose training is a formula, on real SQLite storage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hpo.home import Home
from hpo.records import Candidate, TrialResult, TrialState
from hpo.search.ask import Study
from hpo.spec.load import parse_study
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


def train(study: Study, candidate: Candidate, *, epochs: int = 9) -> TrialResult:
    """Report epoch by epoch, and tell."""
    value = objective(candidate.parameters)
    for epoch in range(1, epochs + 1):
        if study.report(candidate.number, epoch, value * epoch / epochs):
            result = TrialResult(candidate.number, TrialState.PRUNED, value * epoch / epochs, epoch)
            break
    else:
        result = TrialResult(candidate.number, TrialState.COMPLETE, value, epochs)
    study.tell(result)
    return result


@pytest.fixture
def home(tmp_path: Path) -> Home:
    root = tmp_path / "mlruns"
    return Home(root, f"sqlite:///{root / 'optuna.db'}", f"sqlite:///{root / 'mlflow.db'}")


@pytest.fixture
def make_spec() -> Callable[..., StudySpec]:
    def make(
        sampler: str = "random",
        pruner: str = "none",
        space: Mapping[str, Any] = MIXED,
        *,
        startup: int = 3,
        epochs: int = 9,
        **search: Any,
    ) -> StudySpec:
        return parse_study(
            {
                "name": "study",
                "data": {"name": "digits"},
                "model": {"kind": "mlp"},
                "training": {"epochs": epochs},
                "search": {
                    "sampler": {"name": sampler, "startup_trials": startup},
                    "pruner": {"name": pruner, "startup_trials": 2, "patience": 2},
                    "space": space,
                    **search,
                },
                "seed": 3,
            }
        )

    return make
