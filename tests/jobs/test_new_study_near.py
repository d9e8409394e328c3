"""Near-duplicates in a study that is written for images: kept in one part, or told where the parts are given."""

# ruff: noqa: F811 - fixtures that are imported

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpo.jobs.new_study import new_study
from hpo.spec.load import load_study
from scans import as_folder, digits, folder  # noqa: F401


@pytest.mark.parametrize("parts", [("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_near_duplicates_of_official_parts_are_told_and_the_study_is_written(
    folder: Path, digits: tuple[np.ndarray, np.ndarray], parts: tuple[str, ...]
) -> None:
    images, labels = digits
    for place, part in enumerate(parts):
        rows = slice(300 * place, 300 * (place + 1) if place == 0 else 300 * place + 100)
        as_folder(folder / "scans" / part, images[rows], labels[rows], side=32)
    for number in range(5):  # of the training part, a little darker
        darker = Image.fromarray((images[number] * 0.95).astype(np.uint8)).resize((32, 32))
        darker.save(folder / "scans" / parts[-1] / f"class {labels[number]}" / f"again {number}.png")
    made = new_study("scans", preset="quick", minutes=1, weights=["none"], device="cpu", workers=1)
    assert load_study("scans").split.near_duplicates == "count"
    (decision,) = [each for each in made.decisions if each.subject == "near-duplicates"]
    assert decision.choice == "counted"
    later = {"val": "valid"}.get(parts[-1], parts[-1])
    assert f"of {later} in train" in decision.reason
    (warning,) = [each for each in made.warnings if "look nearly like" in each]
    assert f"of {later} in train" in warning
    assert "the data came with these parts" in warning


def test_near_duplicates_of_parts_that_are_drawn_here_stay_together(
    folder: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits
    as_folder(folder / "scans", images[:300], labels[:300], side=32)
    for number in range(100):
        darker = Image.fromarray((images[number] * 0.95).astype(np.uint8)).resize((32, 32))
        darker.save(folder / "scans" / f"class {labels[number]}" / f"again {number}.png")
    made = new_study("scans", preset="quick", minutes=1, weights=["none"], device="cpu", workers=1)
    assert load_study("scans").split.near_duplicates == "together"
    assert not any("look nearly like" in each for each in made.warnings)
