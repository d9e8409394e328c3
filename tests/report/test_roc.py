"""ROC curves against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from hpo.report.statistics import roc, roc_per_class


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
