"""Scores, held against scikit-learn."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from hpo.metrics import confusion_matrix, direction_of, label_of, macro_auc, metric_of, scores
from hpo.report.statistics import score_intervals
from hpo.spec.search import SearchSpec


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
    with pytest.raises(ValueError, match=r"Input should be 'valid_loss', .*'valid_macro_f1' or 'valid_macro_auc'"):
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
