"""Folders of real images to write studies for, in a place of their own with empty caches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    found = load_digits()
    return (found.images * (255 / 16)).round().astype(np.uint8), found.target


def as_folder(place: Path, images: np.ndarray, labels: np.ndarray, *, side: int = 8) -> Path:
    """A folder a class, each image a PNG."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        target = place / f"class {label}"
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((side, side)).save(target / f"{number}.png")
    return place
