"""All twelve 2D sets of MedMNIST, through files of their shape: prepared, trained, and two exported and served."""

import json
from dataclasses import replace

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as reference

from hpo.data.prepare import check_task, open_trial, prepare
from hpo.data.sources import DATASETS, medmnist_info, scores_of, task_of
from hpo.data.split import split_card
from hpo.data.test_set import open_test
from hpo.errors import HpoError
from hpo.metrics import scores
from hpo.models import export_program
from hpo.predict import load_model, predict_files
from hpo.spec.load import load_study
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.tracking.models import save_model
from hpo.training.preflight import save_preview
from hpo.training.trial import TrialPlan, train_trial

SETS = {flag: info for flag, info in medmnist_info().items() if "3d" not in flag}
SIDES = [(flag, 28) for flag in SETS] + [("chestmnist", 64), ("retinamnist", 64)]


def _labels(info, count, generator):
    classes = len(info["label"])
    if info["task"] == "multi-label, binary-class":
        labels = (generator.random((count, classes)) < 0.3).astype(np.uint8)
        labels[: 2 * classes] = np.tile(np.eye(classes, dtype=np.uint8), (2, 1))
        labels[-1] = 0  # most chests have no finding
        return labels
    return (np.arange(count) % classes).reshape(-1, 1).astype(np.uint8)


def _file(folder, flag, side):
    """An npz with the keys, types and shapes of the published one, of few images."""
    info, arrays, generator = SETS[flag], {}, np.random.default_rng(0)
    for part, count in (("train", 60), ("val", 40), ("test", 40)):
        shape = (count, side, side, 3) if info["n_channels"] == 3 else (count, side, side)
        labels = _labels(info, count, generator)
        images = generator.integers(0, 256, shape)
        bright = 60 * (labels.argmax(1) if labels.shape[1] > 1 else labels[:, 0]) / len(info["label"])
        arrays[f"{part}_images"] = np.clip(images * 0.7 + bright.reshape(-1, *[1] * (len(shape) - 1)), 0, 255).astype(
            np.uint8
        )
        arrays[f"{part}_labels"] = labels
    path = folder / f"{flag}_{side}.npz"
    np.savez(path, **arrays)
    return path


def _trained(tmp_path, flag, side, **training):
    data = DataSpec(name=flag, size=side, path=str(_file(tmp_path, flag, side)))
    card = prepare(data, SplitSpec(), cache=tmp_path / "cache")
    setup = Setup.model_validate(
        {
            "data": data.model_dump(),
            "split": {},
            "model": {"kind": "mlp", "hidden": 4},
            "training": {"epochs": 1, "batch_size": 32, "precision": "float32"} | training,
            "task": "multilabel" if card.several_labels else "multiclass",
        }
    )
    plan = TrialPlan(setup=setup, card=card.sealed, number=0, seed=0, folder=tmp_path / "left", device_name="cpu")
    generator, answer = train_trial(plan), None
    while True:
        try:
            generator.send(answer)
            answer = True
        except StopIteration as end:
            return card, end.value


def _served(tmp_path):
    """What plain MLflow loads of a trial: it has only the logged script."""
    export_program(tmp_path / "left")
    save_model(tmp_path / "model", tmp_path / "left", model_id="m-1", run_id="1", tags={})
    return mlflow.pyfunc.load_model(str(tmp_path / "model"))


def test_there_are_twelve_sets_of_four_tasks():
    assert len(SETS) == 12
    assert SETS.keys() <= DATASETS.keys()
    assert {task_of(flag) for flag in SETS} == {
        "multi-class",
        "binary-class",
        "ordinal-regression",
        "multi-label, binary-class",
    }
    assert task_of("digits") == ""


@pytest.mark.parametrize(("flag", "side"), SIDES)
def test_every_set_is_prepared_and_trained(tmp_path, flag, side):
    card, result = _trained(tmp_path, flag, side)
    info = SETS[flag]
    assert card.class_names == tuple(info["label"][str(number)] for number in range(len(info["label"])))
    assert card.image_shape == (side, side, info["n_channels"])
    assert (card.development_count, card.test_count) == (100, 40)
    assert result.state == "complete"
    assert {"valid_loss", "valid_accuracy", "valid_balanced_accuracy", "valid_macro_f1", "valid_macro_auc"} <= set(
        result.scores
    )
    assert all(np.isfinite(value) for value in result.scores.values())
    assert card.several_labels == (flag == "chestmnist")
    assert bool(result.confusion) == (flag != "chestmnist")


def test_a_set_of_grades_has_scores_of_grades(tmp_path):
    card, result = _trained(tmp_path, "retinamnist", 28)
    assert scores_of("retinamnist") == ("valid_class_error", "valid_quadratic_kappa")
    left = np.load(tmp_path / "left" / "validation.npz")
    predicted = left["probabilities"].argmax(1)
    expected = reference.cohen_kappa_score(left["labels"], predicted, weights="quadratic")
    assert result.scores["valid_quadratic_kappa"] == pytest.approx(expected)
    assert result.scores["valid_class_error"] == pytest.approx(np.abs(left["labels"] - predicted).mean())
    model = _served(tmp_path)
    measured = open_test(card, lambda images: model.predict(images).to_numpy())
    assert {"test_class_error", "test_quadratic_kappa"} <= set(measured.scores)
    assert measured.probabilities.sum(1) == pytest.approx(1, abs=1e-5)


def test_several_labels_have_probabilities_of_their_own(tmp_path):
    card, result = _trained(tmp_path, "chestmnist", 28, scores=["valid_recall[edema]"], data_growth=0.5)
    assert "valid_recall[edema]" in result.scores
    model = _served(tmp_path)
    images = np.load(f"{card.test_folder}/test_images.npy")
    answers = model.predict(images)
    assert list(answers.columns) == list(card.class_names)
    assert answers.shape == (40, 14)
    assert answers.to_numpy().min() >= 0
    assert answers.to_numpy().max() <= 1
    assert not np.allclose(answers.to_numpy().sum(1), 1)
    # MedMNIST's own: the mean of the areas and of the accuracies at 1/2 of the labels.
    measured = open_test(card, lambda images: model.predict(images).to_numpy())
    labels, chances = measured.labels, answers.to_numpy()
    areas = [reference.roc_auc_score(labels[:, label], chances[:, label]) for label in range(14)]
    assert measured.scores["test_macro_auc"] == pytest.approx(np.mean(areas), abs=1e-6)
    assert measured.scores["test_accuracy"] == pytest.approx(((chances > 0.5) == labels).mean())

    classifier = load_model(tmp_path / "model")
    assert classifier.several_labels
    from PIL import Image

    Image.fromarray(images[0, ..., 0]).save(tmp_path / "chest.png")
    (row,) = predict_files(classifier, [tmp_path / "chest.png"])
    above = [name for name, chance in zip(card.class_names, chances[0], strict=True) if chance > 0.5]
    assert row["labels"] == above
    assert row["class"] == (", ".join(above) or "none")
    assert row["probabilities"]["edema"] == pytest.approx(chances[0, card.class_names.index("edema")], abs=1e-5)
    assert json.loads((tmp_path / "left" / "config.json").read_text())["several_labels"] is True


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_several_labels_agree_with_scikit_learn(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(200, 6, generator=generator) < 0.3).long()
    logits = (torch.randn(200, 6, generator=generator) + labels).mul(4).round() / 4 + 0.01
    found, answers, chances = scores(logits, labels), (logits > 0).long(), logits.double().sigmoid()
    assert found["accuracy"] == pytest.approx((answers == labels).double().mean().item(), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(labels, answers, average="macro"), abs=1e-12)
    assert found["macro_auc"] == pytest.approx(reference.roc_auc_score(labels, chances, average="macro"), abs=1e-12)
    each = [reference.balanced_accuracy_score(labels[:, label], answers[:, label]) for label in range(6)]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(each), abs=1e-12)
    losses = [reference.log_loss(labels[:, label], chances[:, label]) for label in range(6)]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_task_must_be_that_of_the_labels(tmp_path):
    def card(flag):
        return prepare(DataSpec(name=flag, path=str(_file(tmp_path, flag, 28))), SplitSpec(), cache=tmp_path / "cache")

    with pytest.raises(HpoError, match="any number of its 14 labels"):
        check_task(card("chestmnist"), "multiclass")
    with pytest.raises(HpoError, match="each image of breastmnist has one class"):
        check_task(card("breastmnist"), "multilabel")


def test_a_preview_shows_images_of_several_labels_and_of_rare_classes(tmp_path):
    for name in ("chestmnist", "retinamnist"):
        data = DataSpec(name=name, path=str(_file(tmp_path, name, 28)))
        card = prepare(data, SplitSpec(), cache=tmp_path / "cache")
        setup = load_study("digits-mlp").setup.model_copy(update={"split": SplitSpec(kind="holdout")})
        file = save_preview(setup, card, tmp_path / "preview.png", images=60, copies=1, seed=0)
        with Image.open(file) as picture:
            assert picture.size[1] >= 60 * 28


def test_parts_of_several_labels_are_drawn_at_random_by_a_seed(tmp_path):
    data = DataSpec(name="chestmnist", path=str(_file(tmp_path, "chestmnist", 28)))
    card = prepare(data, SplitSpec(), cache=tmp_path / "cache")
    cpu, rows = torch.device("cpu"), []
    for split in (SplitSpec(kind="holdout"), SplitSpec(kind="holdout"), SplitSpec(kind="holdout", seed=1)):
        rows.append(open_trial(card, split, device=cpu).valid.tolist())
        parts = split_card(card, split)
        assert parts.counts == {"train": 80, "valid": 20, "test": 40}
        assert len(parts.shares["train"]) == 14
    assert rows[0] == rows[1] != rows[2]
    folds = [open_trial(card, SplitSpec(kind="kfold"), device=cpu, fold=fold).valid.tolist() for fold in range(3)]
    assert sorted(row for fold in folds for row in fold) == list(range(100))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.eye(3, dtype=np.int64)[np.arange(30) % 3], "each image has exactly one of them"),
        (np.full((30, 3), 2), "labels have shape"),
    ],
)
def test_labels_that_only_look_like_several_are_refused(tmp_path, labels, message):
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels)
    with pytest.raises(HpoError, match=message):
        prepare(DataSpec(name="npz", path=str(tmp_path / "set.npz")), SplitSpec(), cache=tmp_path / "cache")


def test_scores_of_one_class_an_image_are_refused_where_it_has_several(tmp_path):
    with pytest.raises(HpoError, match="score mcc: not defined for images with several labels"):
        _trained(tmp_path, "chestmnist", 28, scores=["valid_mcc"])
    assert replace(_trained(tmp_path, "chestmnist", 28)[1], number=1).state == "complete"
