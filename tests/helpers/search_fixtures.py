"""Real SQLite storage, and studies to run on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from formula import MIXED
from hpo.home import Home
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec


@pytest.fixture
def bare_home(tmp_path: Path) -> Home:
    """A home without any store."""
    return Home.at(tmp_path)


@pytest.fixture
def home(bare_home: Home, empty_stores: Path) -> Home:
    """A home with an empty study storage, copied: Optuna takes three times as long to make one as to open it."""
    bare_home.create()
    shutil.copyfile(empty_stores / "mlruns" / "optuna.db", bare_home.root / "optuna.db")
    return bare_home


def specify(
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


@pytest.fixture
def make_spec() -> Callable[..., StudySpec]:
    return specify
