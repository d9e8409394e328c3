"""Tables of a confusion matrix, held against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import classification_report as reference

from hpo.report.statistics import classification_report


def test_the_report_agrees_with_scikit_learn():
    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 4, 500), generator.integers(0, 4, 500)
    counts = np.zeros((4, 4), int)
    np.add.at(counts, (true, predicted), 1)
    names = ["a", "b", "c", "d"]
    ours, text = classification_report(counts.tolist(), names)
    theirs = reference(true, predicted, target_names=names, output_dict=True)
    for name in names:
        assert ours["classes"][name]["precision"] == pytest.approx(theirs[name]["precision"])
        assert ours["classes"][name]["f1"] == pytest.approx(theirs[name]["f1-score"])
        assert ours["classes"][name]["support"] == theirs[name]["support"]
    assert ours["macro_average"]["f1"] == pytest.approx(theirs["macro avg"]["f1-score"])
    assert ours["weighted_average"]["recall"] == pytest.approx(theirs["weighted avg"]["recall"])
    assert "macro avg" in text
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"])


def test_a_class_without_images_or_predictions_has_zeros():
    report, text = classification_report([[3, 0], [0, 0]], ["full", "empty"])
    assert report["classes"]["empty"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert "empty" in text
