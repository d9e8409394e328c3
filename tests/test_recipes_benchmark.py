"""The script that measures recipes works on the digits; its figures are not judged here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.slow


def _printed(cache: Path, *words: str) -> str:
    around = {**os.environ, "HPO_DATA": str(cache), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, env=around, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_recipes_are_compared_with_the_training_without_them(digits_cache):
    words = ["digits-cnn", "--seeds", "2", "--epochs", "1", "--images", "200", "--set", "training.augment.crop=1"]
    told = _printed(digits_cache, str(FOLDER / "recipes.py"), *words, "--tricks", "moving average 0.99")
    assert [line.split("  ")[0] for line in told.splitlines() if line.startswith(("none", "moving", "views"))] == [
        "none",
        "moving average 0.99",
        "views of the base",
    ]
