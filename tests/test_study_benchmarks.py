"""The scripts that measure recipes and ensembles work on the digits; what they print is not judged here."""

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
    assert "| moving average 0.99 |" in told
    assert "views" in told


def test_ensembles_are_compared_with_their_best_member(digits_cache, tmp_path):
    words = ["--data", "digits", "--minutes", "1", "--test", "--home", str(tmp_path)]
    told = _printed(digits_cache, str(FOLDER / "ensembles.py"), *words)
    assert "| digits-mlp |" in told or "no ensemble is better" in told
    assert _printed(
        digits_cache, str(FOLDER / "ensembles.py"), "--data", "--study", f"{tmp_path / 'digits'}:digits-mlp"
    )
