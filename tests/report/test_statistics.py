"""Statistics of classifiers, held against scikit-learn, scipy, brute force and simulation."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chi2
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    roc_auc_score,
    roc_curve,
)
from sklearn.metrics import classification_report as sklearn_report

from hpo.metrics import METRICS
from hpo.report.comparison import Comparison, Predictions, compare_predictions
from hpo.report.statistics import (
    binarise_probabilities,
    classification_report,
    group_matrix,
    holm,
    macro_roc,
    mcnemar,
    mean_lead,
    paired_bootstrap,
    roc,
    roc_per_class,
    score_intervals,
)

OF_SKLEARN = {
    "accuracy": accuracy_score,
    "balanced_accuracy": balanced_accuracy_score,
    "macro_f1": lambda labels, predicted: f1_score(labels, predicted, average="macro", zero_division=0),
}
seeds = st.integers(0, 2**32 - 1)

CLOTHING = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Shirt")
FOOTWEAR = ("Sandal", "Sneaker", "Bag", "Ankle boot")
GROUPS = {"footwear and bags": FOOTWEAR, "clothing": CLOTHING}
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _classified(seed: int, *, classifiers: int = 2, count: int = 300, classes: int = 5, skill: float = 0.7):
    """labels (n,), predicted (classifiers, n): each image has its own difficulty, shared by all classifiers."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    known = rng.random(count) < rng.random((classifiers, count)) * skill * 2
    return labels, np.where(known, labels, rng.integers(0, classes, (classifiers, count)))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 12), st.integers(2, 60))
def test_scores_and_differences_are_those_of_sklearn(seed, classes, count):
    labels, predicted = _classified(seed, classifiers=3, count=count, classes=classes)
    scores, differences = score_intervals(labels, predicted, classes=classes, seed=0, resamples=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sklearn warns of predicted classes that no image has
        for name, score in OF_SKLEARN.items():
            expected = [score(labels, each) for each in predicted]
            np.testing.assert_allclose([own[name].value for own in scores], expected, atol=1e-12)
            found = [own[name].value for own in differences]
            np.testing.assert_allclose(found, np.array(expected) - expected[0], atol=1e-12)


def test_counts_drawn_at_once_are_images_drawn_one_by_one():
    labels, predicted = _classified(1, count=400)
    scores, differences = score_intervals(labels, predicted, classes=5, seed=0)
    rng = np.random.default_rng(7)
    drawn = [rng.integers(0, 400, 400) for _ in range(2000)]
    plain = {
        "accuracy": lambda true, said: np.mean(true == said),
        "balanced_accuracy": lambda true, said: np.mean([np.mean(said[true == each] == each) for each in range(5)]),
        "macro_f1": lambda true, said: np.mean(
            [2 * np.sum((true == c) & (said == c)) / (np.sum(true == c) + np.sum(said == c)) for c in range(5)]
        ),
    }
    for name, score in plain.items():
        values = np.array([[score(labels[rows], each[rows]) for each in predicted] for rows in drawn])
        low, high = np.quantile(values[:, 0], [0.025, 0.975])
        np.testing.assert_allclose([scores[0][name].low, scores[0][name].high], [low, high], atol=0.008)
        low, high = np.quantile(values[:, 1] - values[:, 0], [0.025, 0.975])
        np.testing.assert_allclose([differences[1][name].low, differences[1][name].high], [low, high], atol=0.008)


def test_both_bootstraps_of_the_accuracy_agree():
    labels, predicted = _classified(2, count=1000)
    _, differences = score_intervals(labels, predicted, classes=5, seed=0)
    plain = paired_bootstrap(predicted[1] == labels, (predicted[0] == labels).astype(float), seed=0)
    found = differences[1]["accuracy"]
    assert found.value == pytest.approx(plain.value)
    np.testing.assert_allclose([found.low, found.high], [plain.low, plain.high], atol=0.003)


def test_ninety_five_percent_intervals_cover_the_truth_about_that_often():
    """400 simulated comparisons of 300 images: the standard error of the coverage is 1.1 points."""
    covered = {"own": 0, "difference": 0}
    for seed in range(400):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 3, 300)
        wrong = (labels + 1) % 3
        draws = rng.random(300)
        # Right with 0.80 and 0.85, and not independently: the first is only right where the second is, or on 0.05 more.
        first = np.where((draws < 0.75) | (draws > 0.95), labels, wrong)
        second = np.where(draws < 0.85, labels, wrong)
        own, differences = score_intervals(labels, np.array([first, second]), classes=3, seed=seed, resamples=500)
        covered["own"] += own[0]["accuracy"].low <= 0.80 <= own[0]["accuracy"].high
        covered["difference"] += differences[1]["accuracy"].low <= 0.05 <= differences[1]["accuracy"].high
    assert 0.91 < covered["own"] / 400 < 0.98
    assert 0.91 < covered["difference"] / 400 < 0.98


def test_the_same_seed_gives_the_same_interval_and_chunks_do_not_show(monkeypatch):
    labels, predicted = _classified(3)
    whole = score_intervals(labels, predicted, classes=5, seed=4, resamples=200)
    assert score_intervals(labels, predicted, classes=5, seed=4, resamples=200) == whole
    monkeypatch.setattr("hpo.report.statistics._CHUNK_CELLS", 1000)
    assert score_intervals(labels, predicted, classes=5, seed=4, resamples=200) == whole


def test_ten_thousand_resamples_of_a_test_part_take_under_two_seconds():
    labels, predicted = _classified(5, count=3421, classes=8, skill=0.95)
    started = time.process_time()
    score_intervals(labels, predicted, classes=8, seed=0)
    assert time.process_time() - started < 2


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 400), st.floats(0.05, 0.95))
def test_mcnemar_is_the_binomial_or_the_corrected_chi_square_test(seed, count, share):
    rng = np.random.default_rng(seed)
    first, second = rng.random(count) < share, rng.random(count) < 0.5
    found = mcnemar(first, second)
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    assert (found.first_only, found.second_only) == (b, c)
    if b + c < 25:
        assert found.statistic is None
        assert found.p == pytest.approx(binomtest(b, b + c).pvalue if b + c else 1.0)
    else:
        assert found.statistic == pytest.approx(max(abs(b - c) - 1, 0) ** 2 / (b + c))
        assert found.p == pytest.approx(chi2.sf(found.statistic, 1))


def test_mcnemar_of_equal_classifiers_finds_nothing():
    right = np.arange(100) % 3 > 0
    assert mcnemar(right, right).p == 1
    assert mcnemar(right, np.roll(right, 1)).p == 1  # 33 discordant either way


def test_holm_adjusts_the_smallest_for_all_and_keeps_the_order():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 6), st.integers(0, 2))
def test_the_area_is_that_of_sklearn_with_ties_too(seed, classes, decimals):
    rng = np.random.default_rng(seed)
    labels = np.append(np.arange(classes), rng.integers(0, classes, 80))
    logits = rng.normal(size=(len(labels), classes)) + 1.5 * np.eye(classes)[labels]
    probabilities = np.exp(np.round(logits, decimals))
    probabilities /= probabilities.sum(1, keepdims=True)
    curve = macro_roc(probabilities, labels)
    expected = (
        roc_auc_score(labels, probabilities[:, 1])
        if classes == 2
        else roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    )
    assert curve.area == pytest.approx(expected, abs=1e-9)
    assert (curve.false_rate[0], curve.true_rate[0], curve.false_rate[-1], curve.true_rate[-1]) == (0, 0, 1, 1)
    assert (np.diff(curve.false_rate) >= 0).all()
    assert (np.diff(curve.true_rate) >= 0).all()


def test_the_mean_curve_bounds_the_mean_area():
    labels, predicted = _classified(6, count=2000, classes=4)
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 2000) + np.eye(4)[predicted[0]] * 0.4
    curve = macro_roc(probabilities / probabilities.sum(1, keepdims=True), labels)
    assert np.trapezoid(curve.true_rate, curve.false_rate) == pytest.approx(curve.area, abs=0.002)
    assert macro_roc(probabilities, np.zeros(2000, np.int64)) is None


def _report_matrix() -> np.ndarray:
    """A ten-class matrix whose blocks are those that the report summed by hand: 6,000 clothing, 4,000 other images."""
    matrix = np.zeros((10, 10), np.int64)
    index = {name: place for place, name in enumerate(NAMES)}
    for names in (CLOTHING, FOOTWEAR):
        for position, name in enumerate(names):
            matrix[index[name], index[name]] = 850
            matrix[index[name], index[names[position - 1]]] = 150
    # Across the border: 55 clothing images called footwear or bag (a few bags), 17 the other way.
    for true, said, count in (("Shirt", "Bag", 30), ("Dress", "Bag", 15), ("Coat", "Sandal", 10)):
        matrix[index[true], index[true]] -= count
        matrix[index[true], index[said]] += count
    for true, said, count in (("Bag", "Shirt", 12), ("Ankle boot", "Trouser", 5)):
        matrix[index[true], index[true]] -= count
        matrix[index[true], index[said]] += count
    return matrix


def binarise_confusion(confusion, class_names, groups):
    """Counts (classes, classes) -> (groups, groups): each block of classes summed."""
    member = group_matrix(class_names, groups)
    return member.T @ np.asarray(confusion) @ member


def test_the_blocks_of_the_ten_class_matrix_answer_the_report():
    matrix = _report_matrix()
    assert matrix.sum() == 10_000
    group = np.array([name in CLOTHING for name in NAMES]).astype(int)
    blocks = np.zeros((2, 2), int)
    np.add.at(blocks, (group[:, np.newaxis], group), matrix)
    (true_negative, false_positive), (false_negative, true_positive) = blocks.tolist()
    assert (true_negative, false_positive, false_negative, true_positive) == (3983, 17, 55, 5945)
    assert (true_negative + true_positive) / matrix.sum() == pytest.approx(0.9928)
    # And through predictions, as a comparison makes them.
    labels, predicted = (np.repeat(cells.ravel(), matrix.ravel()) for cells in np.indices((10, 10)))
    _, decided = binarise_probabilities(np.eye(10)[predicted], NAMES, GROUPS)
    truth = np.array([name in CLOTHING for name in NAMES]).astype(np.int64)[labels]
    scores, _ = score_intervals(truth, decided[np.newaxis], classes=2, seed=0)
    assert scores[0]["accuracy"].value == pytest.approx(0.9928)
    assert 0.9910 < scores[0]["accuracy"].low < 0.9928 < scores[0]["accuracy"].high < 0.9945


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_binarised_decisions_make_the_binarised_matrix(seed):
    rng = np.random.default_rng(seed)
    labels, probabilities = rng.integers(0, 10, 200), rng.dirichlet(np.ones(10), 200)
    summed, decided = binarise_probabilities(probabilities, NAMES, GROUPS)
    np.testing.assert_allclose(summed.sum(1), 1)
    np.testing.assert_allclose(summed[:, 1], sum(probabilities[:, NAMES.index(name)] for name in CLOTHING))
    truth = np.array([name in CLOTHING for name in NAMES]).astype(np.int64)[labels]
    ten = confusion_matrix(labels, probabilities.argmax(1), labels=range(10))
    np.testing.assert_array_equal(confusion_matrix(labels, probabilities.argmax(1)), ten)
    two = confusion_matrix(truth, decided)
    np.testing.assert_array_equal(binarise_confusion(ten, NAMES, GROUPS), two)


def test_classes_of_no_group_drop_out():
    groups = {"a": ["x"], "b": ["y"]}
    summed, decided = binarise_probabilities(np.array([[0.5, 0.2, 0.3]]), ("z", "x", "y"), groups)
    np.testing.assert_allclose(summed, [[0.2, 0.3]])
    assert decided.tolist() == [1]
    assert binarise_confusion([[9, 9, 9], [9, 1, 2], [9, 3, 4]], ("z", "x", "y"), groups).tolist() == [[1, 2], [3, 4]]


def _comparison(*errors: tuple[int, int], count: int = 1712) -> Comparison:
    """Models of which each is wrong on the images from a to b - 1."""
    labels = np.arange(count) % 2
    answers = []
    for number, (a, b) in enumerate(errors):
        predicted = labels.copy()
        predicted[a:b] = 1 - predicted[a:b]
        answers.append(Predictions("ABCD"[number], f"trial {number}", predicted))
    return compare_predictions(labels, answers, class_names=("no", "yes"), part="validation")


def test_a_difference_is_told_with_its_interval_and_its_test():
    sentence = _comparison((0, 100), (0, 60)).verdicts[0]
    assert sentence.startswith("B is better than A by 2.34 points of accuracy (95% interval ")
    assert sentence.endswith("McNemar p < 0.0001).")
    assert _comparison((0, 60), (0, 100)).verdicts[0].startswith("A is better than B by 2.34 points")


def test_what_chance_explains_is_no_difference():
    sentence = _comparison((0, 20), (10, 28)).verdicts[0]
    assert sentence.startswith("A and B: no difference in accuracy that these 1,712 images can show (0.12 points for B")
    assert _comparison((0, 9), (0, 9)).verdicts == ("A and B are right on the same images: no difference to test.",)


def test_a_bootstrap_that_is_sure_of_five_images_alone_is_not_enough():
    # All five discordant images favour B: the percentile interval ends above 0, the exact test says 1/16.
    comparison = _comparison((0, 25), (0, 20))
    assert comparison.contestants[1].differences["accuracy"].low > 0
    assert comparison.contestants[1].p == pytest.approx(0.0625)
    assert "no difference" in comparison.verdicts[0]


def test_several_comparisons_are_held_to_a_stricter_test():
    pair, several = _comparison((0, 40), (0, 34)), _comparison((0, 40), (0, 34), (0, 38), (0, 39))
    assert several.contestants[1].p == pytest.approx(3 * pair.contestants[1].p)
    assert "adjusted for several" in several.verdicts[0]


def test_the_markdown_table_has_every_model_and_the_counts_of_two_classes():
    text = _comparison((0, 100), (0, 60)).markdown()
    assert "| A | accuracy | 0.9416 |" in text
    assert "+2.34 (" in text
    assert "| B | 826 | 30 | 30 | 826 |" in text


def test_the_lead_of_single_trainings_is_the_difference_of_their_scores():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 300)
    first, second = (np.where(generator.random(300) < share, labels, 3 - labels) for share in (0.9, 0.7))
    _, differences = score_intervals(labels, np.stack([second, first]), classes=4, seed=1)
    for score in ("accuracy", "balanced_accuracy", "macro_f1"):
        lead = mean_lead(labels, first[np.newaxis], second[np.newaxis], score=METRICS[score], classes=4, seed=1)
        assert lead.value == pytest.approx(differences[1][score].value)
        assert (lead.low, lead.high) == pytest.approx((differences[1][score].low, differences[1][score].high), abs=0.01)
    three = mean_lead(
        labels, np.stack([first, second]), second[np.newaxis], score=METRICS["accuracy"], classes=4, seed=1
    )
    assert three.value == pytest.approx(differences[1]["accuracy"].value / 2)


@pytest.mark.parametrize("decimals", [1, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_curve_is_that_of_scikit_learn_ties_included(seed, decimals):
    rng = np.random.default_rng(seed)
    positive = rng.random(200) < 0.3
    score = np.round(rng.random(200) + 0.4 * positive, decimals)
    curve = roc(positive, score)
    false, true, _ = roc_curve(positive, score)
    assert curve.area == pytest.approx(roc_auc_score(positive, score))
    # Every point of theirs lies on our line, which has corners only; both rates grow along it.
    along = curve.false_rate + curve.true_rate
    np.testing.assert_allclose(np.interp(false + true, along, curve.true_rate), true, atol=1e-12)
    assert len(along) <= len(false)


def test_one_kind_only_has_no_curve():
    assert roc(np.ones(3, bool), np.arange(3.0)) is None
    assert roc_per_class(np.zeros(4, int), np.full((4, 2), 0.5)) == [None, None]


def test_the_report_agrees_with_scikit_learn():
    generator = np.random.default_rng(0)
    true, predicted = generator.integers(0, 4, 500), generator.integers(0, 4, 500)
    counts = np.zeros((4, 4), int)
    np.add.at(counts, (true, predicted), 1)
    names = ["a", "b", "c", "d"]
    ours, text = classification_report(counts.tolist(), names)
    theirs = sklearn_report(true, predicted, target_names=names, output_dict=True)
    for name in names:
        assert ours["classes"][name]["precision"] == pytest.approx(theirs[name]["precision"])
        assert ours["classes"][name]["f1"] == pytest.approx(theirs[name]["f1-score"])
        assert ours["classes"][name]["support"] == theirs[name]["support"]
    assert ours["macro_average"]["f1"] == pytest.approx(theirs["macro avg"]["f1-score"])
    assert ours["weighted_average"]["recall"] == pytest.approx(theirs["weighted avg"]["recall"])
    assert text == sklearn_report(true, predicted, target_names=names, digits=4)
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"])


def test_a_class_without_images_or_predictions_has_zeros():
    report, text = classification_report([[3, 0], [0, 0]], ["full", "empty"])
    assert report["classes"]["empty"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert "empty" in text
