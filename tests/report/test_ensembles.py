"""Greedy selection of ensembles, its limits, and what is said of their gain: real probabilities of the digits."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from hpo.records import unpack_classes
from hpo.report.ensembles import Limits, Pool, estimate_gain, select

NAMES = tuple(map(str, range(10)))


@pytest.fixture(scope="module")
def pool() -> Pool:
    """Six classifiers, each of which sees a random tenth of the pixels, and 600 images that none was trained on."""
    images, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(0)
    found = []
    for _ in range(6):
        pixels = generator.choice(64, 16, replace=False)
        model = LogisticRegression(max_iter=300).fit(images[600:1200, pixels] / 16, labels[600:1200])
        found.append(model.predict_proba(images[:600, pixels] / 16))
    return Pool(np.array(found, np.float32), labels[:600].astype(np.int64), [100, 200, 300, 400, 500, 600], [1.0] * 6)


def _loss(pool: Pool, counts: np.ndarray) -> float:
    return float(-np.log(pool.mean(counts)[np.arange(600), pool.labels]).mean())


def test_the_ensemble_has_a_lower_loss_than_each_of_its_candidates(pool):
    counts = select(pool, Limits())
    singles = [_loss(pool, np.eye(6, dtype=np.int64)[each]) for each in range(6)]
    assert _loss(pool, counts) < min(singles)


def test_one_of_two_equal_candidates_is_never_needed(pool):
    twice = Pool(np.repeat(pool.probabilities[:1], 2, axis=0), pool.labels, [1, 1])
    assert select(twice, Limits()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("limits", "keeps"),
    [
        (Limits(members=2), lambda counts: (counts > 0).sum() <= 2),
        (Limits(parameters=650), lambda counts: np.array([100, 200, 300, 400, 500, 600])[counts > 0].sum() <= 650),
        (Limits(latency_ms=3.0), lambda counts: (counts > 0).sum() <= 3),
    ],
)
def test_no_limit_is_exceeded(pool, limits, keeps):
    counts = select(pool, limits)
    assert counts.any()
    assert keeps(counts)


def test_no_ensemble_is_chosen_where_no_candidate_is_within_the_limits(pool):
    assert not select(pool, Limits(parameters=50)).any()


def test_weak_classifiers_gain_together_beyond_chance(pool):
    gain = estimate_gain(pool, Limits(), objective="valid_accuracy", class_names=NAMES, seed=0)
    assert gain.lead.low > 0
    assert gain.lead.value == pytest.approx(gain.ensemble - gain.single)
    assert gain.verdict == "a gain"
    assert "points of validation accuracy" in str(gain)
    judged = [np.mean(np.array(unpack_classes(each)) == pool.labels) for each in gain.judged]
    assert np.mean(judged) == pytest.approx(gain.ensemble)


def test_an_objective_that_is_counted_is_the_score_of_the_gain_and_any_other_is_accuracy(pool):
    asked = {"valid_macro_f1": "macro F1", "valid_loss": "accuracy", "valid_macro_auc": "accuracy"}
    for objective, label in asked.items():
        assert estimate_gain(pool, Limits(), objective=objective, class_names=NAMES, seed=0).label == label


def test_candidates_that_guess_gain_nothing_together():
    """What luck chooses on one half of the images helps on the other half in no more cases than luck allows."""
    gains = []
    for seed in range(20):
        generator = np.random.default_rng(seed)
        guesses = generator.dirichlet(np.ones(4), (8, 200)).astype(np.float32)
        labels = generator.integers(0, 4, 200)
        pool = Pool(guesses, labels, [1] * 8)
        gains.append(
            estimate_gain(pool, Limits(), objective="valid_accuracy", class_names=("a", "b", "c", "d"), seed=0)
        )
    assert abs(np.mean([gain.lead.value for gain in gains])) < 0.02
    assert sum(gain.lead.low > 0 for gain in gains) <= 3


def test_images_with_several_labels_are_judged_by_their_loss(pool):
    truth = np.eye(10, dtype=np.int64)[pool.labels]
    several = Pool(pool.probabilities, truth, pool.parameters)
    gain = estimate_gain(several, Limits(), objective="valid_macro_auc", class_names=NAMES, seed=0)
    assert (gain.label, gain.lead.low > 0) == ("loss", True)
    assert gain.lead.value == pytest.approx(gain.single - gain.ensemble, abs=1e-6)
