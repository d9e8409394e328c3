"""Parts that hold the same images are refused with counts; a few copies, as published sets hold them, are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpo.data.duplicates import refuse_shared
from hpo.data.prepare import prepare
from hpo.errors import DataError
from hpo.spec.study import DataSpec, SplitSpec

SPLIT = SplitSpec(kind="holdout")


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)


def written(folder: Path, **parts: np.ndarray) -> DataSpec:
    arrays = {f"{part}_images": each for part, each in parts.items()}
    arrays |= {f"{part}_labels": np.arange(len(each)) % 2 for part, each in parts.items()}
    np.savez(folder / "x.npz", **arrays)
    return DataSpec(name="npz", path=str(folder / "x.npz"))


TRAIN, VALID, TEST = images(400, 0), images(100, 1), images(200, 2)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"train": TRAIN, "val": TEST, "test": TEST}, "200 of the 200 test images are valid images too"),
        ({"train": TRAIN, "val": VALID, "test": TRAIN[:200]}, "200 of the 200 test images are train images too"),
        ({"train": TRAIN, "test": np.concatenate([TEST, TRAIN[:10]])}, "10 of the 210 test images are train images"),
        ({"train": TRAIN, "val": TRAIN[::-1][:50]}, "50 of the 50 valid images are train images too"),
        ({"train": np.concatenate([TRAIN, TEST]), "val": VALID, "test": TEST}, "200 of the 200 test images are train"),
    ],
)
def test_parts_with_the_same_images_are_refused_with_counts(tmp_path, parts, says):
    with pytest.raises(DataError, match=says) as caught:
        refuse_shared(prepare(written(tmp_path, **parts), SPLIT, cache=tmp_path / "cache"))
    assert "Remove them from one of the parts" in caught.value.hint


def test_every_pair_of_parts_is_told_at_once(tmp_path):
    parts = {"train": TRAIN, "val": TRAIN[:50], "test": TRAIN[:50]}
    with pytest.raises(DataError) as caught:
        refuse_shared(prepare(written(tmp_path, **parts), SPLIT, cache=tmp_path / "cache"))
    assert str(caught.value).count("50 of the 50") == 3


def test_a_single_copy_among_many_is_taken(tmp_path):
    test = np.concatenate([TEST, TRAIN[:1]])
    assert (
        prepare(written(tmp_path, train=TRAIN, val=VALID, test=test), SPLIT, cache=tmp_path / "cache").test_count == 201
    )
