"""Prepared data are those that lie there now: behind links too, and under the same size and time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpo.data.prepare import prepare
from hpo.spec.study import DataSpec, SplitSpec

SPLIT = SplitSpec(kind="holdout")


def write(folder: Path, *, count: int = 12, first: int = 0) -> None:
    generator = np.random.default_rng(first)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{number}.bmp")


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder whose classes are links to folders elsewhere, one of them through a second link."""
    write(tmp_path / "far" / "a")
    write(tmp_path / "farther" / "b", first=100)
    (tmp_path / "far" / "b").symlink_to(tmp_path / "farther" / "b")
    root = tmp_path / "root"
    root.mkdir()
    for name in "ab":
        (root / name).symlink_to(tmp_path / "far" / name)
    return root


def card(root: Path, cache: Path):
    return prepare(DataSpec(name="folder", path=str(root)), SPLIT, cache=cache)


def test_images_behind_a_link_are_seen(linked, tmp_path):
    before = card(linked, tmp_path / "cache")
    write(tmp_path / "farther" / "b", first=200)
    after = card(linked, tmp_path / "cache")
    assert after.digest != before.digest
    assert after.development_count + after.test_count == before.development_count + before.test_count + 12


def test_a_label_changed_behind_a_link_is_seen(linked, tmp_path):
    before = card(linked, tmp_path / "cache")
    (tmp_path / "far" / "a" / "0.bmp").rename(tmp_path / "farther" / "b" / "0.bmp")
    assert card(linked, tmp_path / "cache").digest != before.digest


def test_a_root_that_is_a_link_is_followed(linked, tmp_path):
    (tmp_path / "way").symlink_to(linked)
    before = card(tmp_path / "way", tmp_path / "cache")
    assert before.digest == card(linked, tmp_path / "other").digest
    write(tmp_path / "far" / "a", first=300)
    assert card(tmp_path / "way", tmp_path / "cache").digest != before.digest


def test_a_link_back_ends(linked, tmp_path):
    (tmp_path / "far" / "a" / "back").symlink_to(linked)
    assert card(linked, tmp_path / "cache").digest


def test_other_content_of_one_size_and_time_is_seen(linked, tmp_path):
    file = tmp_path / "far" / "a" / "0.bmp"
    before, stat = card(linked, tmp_path / "cache"), file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    time.sleep(0.02)  # the file system's clock has to move on
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns
    assert card(linked, tmp_path / "cache").digest != before.digest


def test_place_and_time_make_no_difference(linked, tmp_path):
    before = card(linked, tmp_path / "cache")
    for file in (tmp_path / "far" / "a").iterdir():
        os.utime(file, (1, 1))
    linked.rename(tmp_path / "moved")
    assert card(tmp_path / "moved", tmp_path / "cache").digest == before.digest


def test_names_of_classes_that_were_corrected_are_those_of_the_card(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {"train_images": generator.integers(0, 256, (40, 8, 8), dtype=np.uint8), "train_labels": np.arange(40) % 2}
    file = tmp_path / "x.npz"
    spec = DataSpec(name="npz", path=str(file))
    np.savez(file, **arrays, class_names=np.array(["ill", "well"]))
    before = prepare(spec, SPLIT, cache=tmp_path / "cache")
    np.savez(file, **arrays, class_names=np.array(["well", "ill"]))
    after = prepare(spec, SPLIT, cache=tmp_path / "cache")
    assert before.digest == after.digest  # as ever, so that stored studies resume: names are compared beside it
    assert (before.class_names, after.class_names) == (("ill", "well"), ("well", "ill"))
