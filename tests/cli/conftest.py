from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console


@pytest.fixture
def terminal() -> Console:
    """An 80-column terminal without colors; terminal.file.getvalue() is what it was sent."""
    return Console(file=io.StringIO(), width=80, height=24, highlight=False, markup=False, color_system=None)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and nothing in the environment that would lead elsewhere."""
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path
