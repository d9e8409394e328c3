"""Real SQLite storage in an empty folder, and studies to run on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from formula import MIXED
from hpo.home import Home
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec


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
        name: str = "study",
        final: Mapping[str, Any] | None = None,
        **search: Any,
    ) -> StudySpec:
        return parse_study(
            {
                "name": name,
                "data": {"name": "digits"},
                "model": {"kind": "mlp"},
                "training": {"epochs": epochs},
                "search": {
                    "sampler": {"name": sampler, "startup_trials": startup},
                    "pruner": {"name": pruner, "startup_trials": 2, "patience": 2},
                    "space": space,
                    **search,
                },
                "final": final,
                "seed": 3,
            }
        )

    return make
