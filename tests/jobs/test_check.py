"""A study that is called ready is one whose trials can run: every fold, the final training, batches of one."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.data.prepare import prepare
from hpo.data.split import split_card
from hpo.errors import DataError, TrainingError
from hpo.jobs.check import check_study
from hpo.spec.load import load_study
from hpo.spec.study import DataSpec, SplitSpec

STUDY = """
data: {name: npz, path: x.npz}
split: {kind: kfold, folds: 4}
model: {kind: mlp, hidden: 4}
training: {epochs: 1}
search: {trials: 1, space: {training.optimizer.lr: {float: [0.1, 0.2]}}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    return tmp_path


def write(folder: Path, *counts: int, study: str = STUDY, valid: bool = False) -> Path:
    """An npz with so many training images of each class, 20 test images, and the study."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    arrays = {"train": labels, "test": np.arange(20) % 2} | ({"val": np.arange(20) % 2} if valid else {})
    images = {part: generator.integers(0, 256, (len(each), 8, 8), dtype=np.uint8) for part, each in arrays.items()}
    np.savez(
        folder / "x.npz",
        class_names=np.array(["round", "long", "odd", "rare"][: len(counts)]),
        **{f"{part}_images": each for part, each in images.items()},
        **{f"{part}_labels": each for part, each in arrays.items()},
    )
    path = folder / "mine.yaml"
    path.write_text(study)
    return path


@pytest.mark.parametrize("words", [["check"], ["run", "--workers", "0"]], ids=" ".join)
def test_a_class_of_one_image_fits_no_folds_and_is_named_with_its_number(folder, words):
    result = CliRunner().invoke(app, [words[0], str(write(folder, 60, 6, 1)), *words[1:]])
    assert result.exit_code == 2
    assert "4 folds, but of odd there is only one image" in result.stderr
    assert "round 60, long 6, odd 1" in result.stderr
    assert "data.groups" in result.stderr
    assert "split.by=stratified" not in result.stderr  # it is stratified already


@pytest.mark.parametrize(("by", "counts"), [("order", (30, 2)), ("random", (30, 2)), ("order", (10, 10, 10))])
def test_every_fold_is_looked_at(folder, by, counts):
    write(folder, *counts)
    split = SplitSpec(kind="kfold", folds=3, by=by)
    card = prepare(DataSpec(name="npz", path="x.npz"), split)
    with pytest.raises(DataError, match=r"fold [123] of 3: ") as caught:
        split_card(card, split)
    assert "split.by: stratified" in caught.value.hint


def test_folds_that_can_be_trained_are_ready(folder):
    assert check_study(load_study(write(folder, 60, 6, 2))).parameter_count


def test_a_final_training_without_its_validation_part_is_found_before_the_search(folder):
    study = STUDY.replace("kind: kfold, folds: 4", "kind: holdout") + "final: {split: {kind: official}}\n"
    with pytest.raises(DataError, match=r"final: split\.kind: official") as caught:
        check_study(load_study(write(folder, 30, 30, study=study)))
    assert "--set final.split.kind=holdout" in caught.value.hint
    check_study(load_study(write(folder, 30, 30, study=study, valid=True)))


@pytest.mark.parametrize("more", ["batch_size: 1", "batch_size: 8, micro_batch: 1"])
def test_batch_norm_of_one_image_is_told_with_its_setting(folder, more):
    study = STUDY.replace("hidden: 4", "hidden: 4, batch_norm: true").replace("epochs: 1", f"epochs: 1, {more}")
    with pytest.raises(TrainingError, match="batch norm cannot learn from pieces of one image") as caught:
        check_study(load_study(write(folder, 30, 30, study=study)))
    assert f"training.{more.split(', ')[-1].split(':')[0]} 1" in str(caught.value)


BATCH_NORM_WHEN = (
    "model.batch_norm: {choice: [true, false]}, "
    "training.micro_batch: {choice: [null, 1], when: {model.batch_norm: true}}"
)


MLP = "{kind: mlp, hidden: 4, batch_norm: true}"
CNN = "{kind: cnn, filters: 4, padding: valid, batch_norm: true}"


@pytest.mark.parametrize(
    ("model", "places", "line"),
    [
        (
            CNN,
            "model.kernel: {choice: [3, 9]}",
            r"model.kernel=9 will fail: model cnn does not fit images of .8, 8, 1.",
        ),
        (MLP, "training.batch_size: {int: [1, 16]}", "training.batch_size=1 will fail: .* batch norm"),
        (MLP, BATCH_NORM_WHEN, "model.batch_norm=True, training.micro_batch=1 will fail: training.micro_batch 1"),
        (CNN, "training.batch_size: {int: [1, 16]}, training.optimizer.lr: {float: [0.1, 0.2]}", None),
    ],
    ids=["kernel", "batch", "condition", "none"],
)
def test_the_ends_of_the_space_are_tried_before_trials_fail_there(folder, model, places, line):
    study = STUDY.replace("{kind: mlp, hidden: 4}", model).replace("training.optimizer.lr: {float: [0.1, 0.2]}", places)
    found = [text for text in check_study(load_study(write(folder, 30, 30, study=study))).warnings if "fail" in text]
    assert len(found) == (line is not None)
    assert line is None or re.search(line, found[0])
