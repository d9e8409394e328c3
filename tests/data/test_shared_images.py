"""Parts that hold the same images are refused with counts; a few copies, as published sets hold them, are not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.data.duplicates import refuse_shared
from hpo.data.prepare import prepare
from hpo.errors import DataError
from hpo.home import Home
from hpo.spec.study import DataSpec, SplitSpec
from hpo.storage.reader import read_snapshots

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


@pytest.mark.parametrize("words", [["check"], ["run", "--trials", "1", "--workers", "0"]], ids=" ".join)
def test_check_and_run_refuse_before_anything_is_trained(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    written(tmp_path, train=TRAIN, val=TEST, test=TEST)
    (tmp_path / "leak.yaml").write_text(
        "data: {name: npz, path: x.npz}\nmodel: {kind: mlp, hidden: 4}\ntraining: {epochs: 1}\n"
        "search: {trials: 1, space: {training.optimizer.lr: {float: [0.1, 0.2]}}}\n"
    )
    result = CliRunner().invoke(app, [words[0], "leak.yaml", *words[1:]])
    assert result.exit_code == 2
    assert "200 of the 200 test images are valid images too" in result.stderr
    assert not read_snapshots(Home.at(tmp_path))
