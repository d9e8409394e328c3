"""The answer of a study in one sentence with its interval, next to the published numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hpo.metrics import direction_of, highest_of, label_of, metric_of, name_of
from hpo.report.figures.overview import Score
from hpo.report.page import escape
from hpo.report.statistics import Interval, confusion_intervals, share_interval

if TYPE_CHECKING:
    from hpo.report.study_page import Findings, Opening
    from hpo.spec.outcome import Reference

RESAMPLES = 2000


def last_opening(findings: Findings) -> Opening | None:
    """The last look at the test part that measured the shown model."""
    shown = findings.shown
    looks = [look for look in findings.openings if shown is not None and look.trial == shown.number and look.scores]
    return looks[-1] if looks else None


def own_scores(findings: Findings) -> dict[str, float]:
    """valid_... and, if the test part was opened for it, test_... of the shown model."""
    shown, opened = findings.shown, last_opening(findings)
    valid = dict(shown.result.scores) if shown is not None and shown.result is not None else {}
    return {**valid, **(opened.scores if opened else {})}


def intervals_of(findings: Findings) -> dict[str, Interval]:
    """The intervals of own_scores, where there are any."""
    shown, seed, found = findings.shown, findings.spec.seed, {}
    if shown is not None and shown.result is not None and shown.result.confusion:
        of_images = confusion_intervals(shown.result.confusion, seed=seed, resamples=RESAMPLES)
        found = {f"valid_{score}": interval for score, interval in of_images.items()}
    # The ledger holds scores only. Of these, only the accuracy gives the number of correct images.
    accuracy = own_scores(findings).get("test_accuracy")
    if accuracy is not None and findings.data is not None and findings.data.test_count:
        count = findings.data.test_count
        found["test_accuracy"] = share_interval(accuracy, count, seed=seed, resamples=RESAMPLES)
    return found


def main_metric(findings: Findings) -> str:
    """The metric that the study is about: that of its objective, or the accuracy if that is a cost."""
    objective = findings.study.objective
    return name_of(objective) if metric_of(objective) is not None else "accuracy"


def answer(findings: Findings, intervals: Mapping[str, Interval]) -> str:
    """The answer in a sentence or two, as HTML."""
    scores, metric, shown = own_scores(findings), main_metric(findings), findings.shown
    test, valid = f"test_{metric}", f"valid_{metric}"
    score = test if test in scores else valid
    if shown is None or score not in scores:
        return "No trial is complete yet, so there is no answer."
    interval = intervals.get(score)
    ends = f" (95 % interval {interval.low:.4f} to {interval.high:.4f})" if interval else ""
    sentence = (
        f"The best model, trial {shown.number}, has a {label_of(score)} of <strong>{scores[score]:.4f}</strong>{ends}"
    )
    reference = best_reference(findings, score)
    if reference is not None:
        difference = _difference(scores[score], reference.value, score)
        sentence += f": {difference} the best published number, {reference.value:.4f} ({escape(reference.label)})"
    if score == test:
        return f"{sentence}."
    published = best_reference(findings, test)
    waiting = (
        f" The best published {label_of(test)} is {published.value:.4f} ({escape(published.label)})."
        if published
        else ""
    )
    return (
        f"{sentence}. The model was chosen by its validation scores, so they are optimistic; "
        f"its test score is not measured yet.{waiting}"
    )


def best_reference(findings: Findings, score: str) -> Reference | None:
    """The best published number of this score."""
    published = [reference for reference in findings.spec.references if reference.score == score]
    sign = 1 if direction_of(score) == "maximize" else -1
    return max(published, key=lambda reference: sign * reference.value, default=None)


def compared(findings: Findings, intervals: Mapping[str, Interval]) -> Iterator[Score]:
    """The shown model's scores of the main metric, then the published ones."""
    metric, scores = main_metric(findings), own_scores(findings)
    for part, words in (("test", "this study (test)"), ("valid", "this study (validation)")):
        score = f"{part}_{metric}"
        if score in scores:
            interval = intervals.get(score)
            yield Score(words, scores[score], (interval.low, interval.high) if interval else None, own=True)
    for reference in findings.spec.references:
        if name_of(reference.score) == metric:
            yield Score(reference.label, reference.value)


def _difference(own: float, published: float, score: str) -> str:
    if own == published:
        return "equal to"
    side = "above" if own > published else "below"
    if highest_of(score) == 1.0:
        return f"{100 * abs(own - published):.2f} points {side}"
    return f"{abs(own - published):.4f} {side}"
