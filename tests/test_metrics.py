"""Scores, held against scikit-learn."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from hpo.errors import HpoError
from hpo.metrics import confusion_matrix, direction_of, label_of, macro_auc, metric_of, scores
from hpo.report.statistics import score_intervals
from hpo.search.constraints import parse_constraint
from hpo.spec.own_code import named_functions, requested
from hpo.spec.search import SearchSpec
from hpo.spec.training import TrainingSpec
from hpo.tracking.run_metrics import score_name, stored_name


@pytest.mark.parametrize("seed", range(5))
def test_scores_agree_with_scikit_learn(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (300,), generator=generator)
    # Rounded, so that there are ties.
    logits = (torch.randn(300, 5, generator=generator) + 1.5 * torch.eye(5)[labels]).mul(4).round() / 4
    measured = scores(logits, labels)
    predicted, probabilities = logits.argmax(1), logits.double().softmax(1)
    assert measured["accuracy"] == pytest.approx(reference.accuracy_score(labels, predicted), abs=1e-12)
    assert measured["balanced_accuracy"] == pytest.approx(
        reference.balanced_accuracy_score(labels, predicted), abs=1e-12
    )
    assert measured["macro_f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"), abs=1e-12)
    assert measured["loss"] == pytest.approx(reference.log_loss(labels, probabilities), rel=1e-5)
    expected = reference.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert measured["macro_auc"] == pytest.approx(expected, abs=1e-12)


def test_absent_classes_do_not_count():
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[2.0, 0, -9], [0, 1, -9], [0, 2, -9], [0, 3, -9]])
    measured = scores(logits, labels)
    assert measured["balanced_accuracy"] == pytest.approx(0.75)
    assert measured["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert measured["macro_auc"] == pytest.approx(1.0)


def test_rows_of_the_confusion_matrix_are_true_classes():
    counts = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]), 2)
    assert counts.tolist() == [[1, 1], [0, 1]]


def test_the_area_of_a_single_class_is_not_a_number():
    assert np.isnan(macro_auc(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)).item())


SPACE = {"training.optimizer.lr": {"float": [0.001, 0.1], "log": True}}


@pytest.mark.parametrize("score", ["valid_error_rate", "accuracy", "train_loss", "test_accuracy"])
def test_an_objective_is_a_validation_score_of_the_table(score):
    with pytest.raises(
        ValueError, match=r"Input should be 'valid_loss', .*'valid_macro_f1', .*'valid_recall\[CLASS\]'"
    ):
        SearchSpec(objective=score, space=SPACE)


def test_scores_of_all_parts_have_the_direction_and_label_of_their_metric():
    assert [direction_of(score) for score in ("train_loss", "valid_macro_f1", "parameters", "latency_ms")] == [
        "minimize",
        "maximize",
        "minimize",
        "minimize",
    ]
    assert [label_of(score) for score in ("valid_macro_auc", "test_loss", "macro_f1", "latency_ms")] == [
        "validation macro AUC",
        "test loss (nats per image)",
        "macro F1",
        "latency (ms)",
    ]
    assert metric_of("parameters") is None


def test_the_table_loads_no_heavy_library():
    heavy = ("torch", "numpy", "sklearn")
    code = f"import sys, hpo.metrics; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_counts_of_resamples_and_of_epochs_give_the_same_scores():
    generator = torch.Generator().manual_seed(3)
    labels, predicted = torch.randint(4, (2, 90), generator=generator)
    labels[labels == 3] = 0  # an absent class
    measured = scores(torch.eye(4)[predicted], labels)
    (interval,), _ = score_intervals(labels.numpy(), predicted.numpy()[None], classes=4, seed=0, resamples=5)
    for name, found in interval.items():
        assert found.value == pytest.approx(measured[name], abs=1e-12)


NAMES = ("cat", "dog (small)", "emu, grey", "fox", "gnu")


def _requested(logits, labels, *names):
    return scores(logits, labels, further=requested([f"valid_{name}" for name in names], NAMES))


def _case(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (300,), generator=generator)
    return (torch.randn(300, 5, generator=generator) + 1.5 * torch.eye(5)[labels]), labels


@pytest.mark.parametrize("seed", range(5))
def test_requested_scores_agree_with_scikit_learn(seed):
    logits, labels = _case(seed)
    logits, predicted, probabilities = logits.mul(4).round() / 4 + 1e-4 * torch.arange(5), logits.argmax(1), None
    predicted, probabilities = logits.argmax(1), logits.double().softmax(1)
    one_class = [f"{score}[{name}]" for score in ("recall", "precision", "f1") for name in NAMES]
    tops = [f"top_{count}_accuracy" for count in (2, 3, 4)]
    found = _requested(logits, labels, "mcc", "cohen_kappa", "quadratic_kappa", "class_error", *one_class, *tops)
    assert found["mcc"] == pytest.approx(reference.matthews_corrcoef(labels, predicted), abs=1e-12)
    assert found["cohen_kappa"] == pytest.approx(reference.cohen_kappa_score(labels, predicted), abs=1e-12)
    expected = reference.cohen_kappa_score(labels, predicted, weights="quadratic")
    assert found["quadratic_kappa"] == pytest.approx(expected, abs=1e-12)
    assert found["class_error"] == pytest.approx(reference.mean_absolute_error(labels, predicted), abs=1e-12)
    table = reference.precision_recall_fscore_support(labels, predicted)
    for score, column in zip(("precision", "recall", "f1"), table, strict=False):
        assert [found[f"{score}[{name}]"] for name in NAMES] == pytest.approx(list(column), abs=1e-12)
    for count, name in zip((2, 3, 4), tops, strict=True):
        expected = reference.top_k_accuracy_score(labels, probabilities, k=count)
        assert found[name] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("percent", [50, 90, 95])
def test_sensitivity_at_a_specificity_is_the_best_point_of_the_curve(percent):
    logits, labels = _case(percent)
    logits = logits.round()  # many ties
    found = _requested(logits, labels, f"sensitivity_at_specificity_{percent}[fox]")
    false, true, _ = reference.roc_curve(labels == 3, logits.double().softmax(1)[:, 3], drop_intermediate=False)
    expected = true[false <= 1 - percent / 100 + 1e-12].max()
    assert found[f"sensitivity_at_specificity_{percent}[fox]"] == pytest.approx(expected, abs=1e-12)


def test_two_classes_have_a_positive_one_for_the_sensitivity():
    metric = requested(["valid_sensitivity_at_specificity_50"], ("healthy", "ill"))
    second = torch.tensor([0.1, 0.4, 0.5, 0.9, 0.3, 0.8])
    logits = torch.stack([1 - second, second], 1).log()
    measured = scores(logits, torch.tensor([0, 0, 0, 0, 1, 1]), further=metric)
    assert measured["sensitivity_at_specificity_50"] == pytest.approx(0.5)  # 0.8 is above two of the four, 0.3 not


def test_calibration_error_is_that_of_its_definition():
    logits, labels = _case(1)
    probabilities = logits.double().softmax(1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert _requested(logits, labels, "calibration_error")["calibration_error"] == pytest.approx(expected, abs=1e-6)
    assert direction_of("valid_calibration_error") == "minimize"


def test_scores_without_a_denominator_are_zero_as_in_scikit_learn():
    logits, labels = torch.eye(5)[torch.zeros(4, dtype=torch.int64)], torch.zeros(4, dtype=torch.int64)
    found = _requested(logits, labels, "mcc", "cohen_kappa", "quadratic_kappa", "recall[fox]", "f1[fox]")
    assert [found[name] for name in ("mcc", "cohen_kappa", "quadratic_kappa", "recall[fox]", "f1[fox]")] == [0.0] * 5


def test_requested_scores_are_computed_only_where_a_study_names_them():
    logits, labels = _case(0)
    assert set(scores(logits, labels)) == {"loss", "accuracy", "balanced_accuracy", "macro_f1", "macro_auc"}


def test_scores_with_a_parameter_are_objectives_monitors_and_constraints():
    name = "valid_recall[emu, grey]"
    search = SearchSpec(objectives=[name, "valid_mcc"], constraints=[f"{name} >= 0.5"], space=SPACE)
    assert [aim.better for aim in search.objectives] == ["maximize", "maximize"]
    assert search.requested_scores == [name, "valid_mcc", name]
    assert parse_constraint(search.constraints[0]) == (name, ">=", 0.5)
    assert TrainingSpec(monitor=name).monitor == name
    assert label_of(name) == "validation recall of emu, grey"
    assert label_of("test_top_2_accuracy") == "test top-2 accuracy"


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("recall[wolf]", "there is no class 'wolf'"),
        ("top_5_accuracy", "is 1 for every prediction of 5 classes"),
        ("sensitivity_at_specificity_95", "needs its positive class, of 5"),
        ("nowhere_at_all:cost", "there is no module 'nowhere_at_all'"),
    ],
)
def test_a_requested_score_that_does_not_fit_is_refused(score, message):
    with pytest.raises(HpoError, match=message):
        requested([f"valid_{score}"], NAMES)


def test_a_score_of_ones_own_receives_probabilities_and_labels(tmp_path, monkeypatch):
    (tmp_path / "their_scores.py").write_text(
        "def brier(probabilities, labels):\n"
        "    assert probabilities.shape == (300, 5) and labels.shape == (300,)\n"
        "    chosen = probabilities[range(len(labels)), labels]\n"
        "    return -(((1 - chosen) ** 2).mean())\n"
        "def broken(probabilities, labels):\n"
        "    return probabilities\n"
    )
    monkeypatch.chdir(tmp_path)
    logits, labels = _case(0)
    chosen = logits.double().softmax(1)[range(300), labels]
    assert _requested(logits, labels, "their_scores:brier")["their_scores:brier"] == pytest.approx(
        -float((1 - chosen).square().mean())
    )
    with pytest.raises(HpoError, match="score their_scores:broken: the function fails"):
        _requested(logits, labels, "their_scores:broken")


def test_a_score_of_ones_own_is_code_that_needs_trust():
    study = {
        "training": {"monitor": "valid_my.a:one", "scores": ["valid_my.b:two"]},
        "search": {"objective": "valid_my.c:three", "constraints": ["valid_my.d:four >= 0.1"]},
    }
    assert named_functions(study) == ["my.a:one", "my.b:two", "my.c:three", "my.d:four"]


@pytest.mark.parametrize(
    "score", ["best_valid_recall[emu, grey]_std", "valid_f1[a.b/c]", "valid_mcc", "fold1.valid_x:y"]
)
def test_mlflow_takes_the_stored_names_of_scores_and_they_are_read_back(score):
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(stored_name(score))
    assert score_name(stored_name(score)) == score
