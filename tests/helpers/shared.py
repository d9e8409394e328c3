"""Folders that are made once for all tests of a run, whichever worker of pytest-xdist needs them first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder of this name, which make(folder) has filled; tests read it, and copy it where they write."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, made = root / f"shared-{name}", root / f"shared-{name}.made"
    with FileLock(root / f"shared-{name}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # half of it, where make failed in the other worker
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                for variable in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
                    patch.delenv(variable, raising=False)
                patch.setenv("HPO_DATA", str(folder / "data"))
                make(folder)
            made.touch()
    return folder
