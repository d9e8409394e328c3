"""An npz whose images are larger than what is read into memory is unpacked to the disk, piece by piece."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hpo.data import readers
from hpo.data.folders import Asked
from hpo.data.prepare import prepare
from hpo.errors import DataError
from hpo.spec.study import DataSpec, SplitSpec

SHAPE = (600, 96, 96, 3)


@pytest.fixture(params=[np.savez, np.savez_compressed])
def npz(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """600 training images of 96 px, 17 MB."""
    images = np.random.default_rng(0).integers(0, 32, SHAPE, dtype=np.uint8)
    save: Callable[..., None] = request.param
    save(tmp_path / "a.npz", train_images=images, train_labels=np.arange(600) % 3)
    return tmp_path / "a.npz"


def _read(npz: Path, scratch: Path, heard: list[tuple[str, int, int]]) -> tuple[np.ndarray, int]:
    """The training images, and the most memory that reading them took."""
    scratch.mkdir()
    asked = Asked(DataSpec(name="npz", path=str(npz)), None, scratch, lambda *what: heard.append(what))
    tracemalloc.start()
    try:
        images, _ = readers.read_npz(npz, asked).pairs["train"]
        return images, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_reading_large_images_takes_no_memory_for_them(npz, tmp_path, monkeypatch):
    plain, needed = _read(npz, tmp_path / "plain", [])
    monkeypatch.setattr(readers, "_MOST_IN_MEMORY", 1 << 20)
    monkeypatch.setattr(readers, "_PIECE_BYTES", 1 << 18)
    heard: list[tuple[str, int, int]] = []
    mapped, few = _read(npz, tmp_path / "mapped", heard)
    assert needed > plain.nbytes > 8 * few
    np.testing.assert_array_equal(mapped, plain)
    assert heard[-1][0] == "unpacking train_images.npy"
    assert heard[-1][1] == heard[-1][2] > plain.nbytes


def test_the_prepared_data_are_the_same(npz, tmp_path, monkeypatch):
    spec, split = DataSpec(name="npz", path=str(npz)), SplitSpec(kind="holdout")
    first = prepare(spec, split, cache=tmp_path / "one")
    monkeypatch.setattr(readers, "_MOST_IN_MEMORY", 1 << 20)
    second = prepare(spec, split, cache=tmp_path / "other")
    assert first.digest == second.digest
    assert not list((tmp_path / "other" / "prepared").glob(".reading-*"))


def test_images_for_which_the_disk_is_too_small_are_refused(npz, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_MOST_IN_MEMORY", 1 << 20)
    monkeypatch.setattr(readers.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
    with pytest.raises(DataError, match=r"its images have 0\.0 GB, unpacked, and .* has 0\.0 GB left") as caught:
        prepare(DataSpec(name="npz", path=str(npz)), SplitSpec(kind="holdout"), cache=tmp_path / "cache")
    assert "HPO_DATA" in caught.value.hint
