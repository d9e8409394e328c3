"""The first figures of a page: scores next to published ones, class shares; wide and on a phone."""

from __future__ import annotations

import pytest

from figure_checks import faults
from hpo.report.figures import for_phone
from hpo.report.figures.classifier import class_accuracy_figure, confusion_figure, roc_figure, training_curves
from hpo.report.figures.overview import Score, class_shares_figure, scores_figure
from made_studies import random_study
from page_findings import crowded

NAMES = [f"a class with a name that is long, number {number}" for number in range(8)]
SCORES = [
    Score("this study, test images", 0.91, (0.89, 0.93), own=True),
    Score("a published number with quite a long description of it", 0.87),
    Score("another one", 0.994),
]
ANSWERS = crowded(classes=6).answers
DRAWN = {
    "scores": lambda: scores_figure(SCORES, score="accuracy"),
    "shares": lambda: class_shares_figure(dict.fromkeys(("train", "valid", "test"), [0.1] * 7 + [0.3]), NAMES),
    "confusion": lambda: confusion_figure([[3, 1], [0, 4]], NAMES[:2]),
    "accuracy": lambda: class_accuracy_figure([[3, 1], [0, 4]], NAMES[:2]),
    "curves": lambda: training_curves(random_study().trials[0].result.epochs, best_epoch=3),
    "roc": lambda: roc_figure(ANSWERS.labels, ANSWERS.probabilities, NAMES[:6]),
}


@pytest.mark.parametrize("kind", DRAWN)
def test_no_label_is_cut_or_covered_wide_or_narrow(kind: str) -> None:
    wide = DRAWN[kind]()
    with for_phone():
        narrow = DRAWN[kind]()
    assert faults(wide) == []
    assert faults(narrow) == []
    assert narrow.get_figwidth() < 6
    assert narrow.get_figwidth() <= wide.get_figwidth()


def test_scores_have_their_intervals_and_end_at_the_largest_possible() -> None:
    panel = scores_figure(SCORES, score="accuracy").axes[0]
    assert list(panel.lines[0].get_xdata()) == [0.89, 0.93]
    assert panel.get_xlim()[1] <= 1.0
    assert {"0.9100", "0.8700", "0.9940"} <= {text.get_text() for text in panel.texts}


def test_shares_are_a_bar_for_each_class_and_part() -> None:
    panel = DRAWN["shares"]().axes[0]
    assert [len(bars) for bars in panel.containers] == [8, 8, 8]
    assert panel.containers[0][7].get_width() == pytest.approx(30)
