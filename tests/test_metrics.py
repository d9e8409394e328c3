"""Scores, held against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from hpo.metrics import confusion_matrix, macro_auc, scores


@pytest.mark.parametrize("seed", range(5))
def test_scores_agree_with_scikit_learn(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (300,), generator=generator)
    # Rounded, so that there are ties.
    logits = (torch.randn(300, 5, generator=generator) + 1.5 * torch.eye(5)[labels]).mul(4).round() / 4
    measured = scores(logits, labels)
    predicted, probabilities = logits.argmax(1), logits.double().softmax(1)
    assert measured["accuracy"] == pytest.approx(reference.accuracy_score(labels, predicted))
    assert measured["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(labels, predicted))
    assert measured["macro_f1"] == pytest.approx(reference.f1_score(labels, predicted, average="macro"))
    assert measured["loss"] == pytest.approx(reference.log_loss(labels, probabilities), rel=1e-5)
    expected = reference.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert measured["macro_auc"] == pytest.approx(expected)


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
