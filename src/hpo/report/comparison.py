"""A comparison of models on the same images: numbers, verdicts in words, a table in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from hpo.report.statistics import Floats, Interval, Ints, McNemar, Roc, holm, macro_roc, mcnemar, score_intervals
from hpo.report.text import markdown_table

_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Predictions:
    """The predictions of one model for n images: classes (n,) and, if the model was kept, probabilities (n, classes).

    name is the name that the user gave; model describes it: version, trial, binarised or not.
    """

    name: str
    model: str
    predicted: Ints
    probabilities: Floats | None = None


@dataclass(frozen=True)
class Contestant:
    """One model of a comparison.

    scores: accuracy, balanced_accuracy, macro_f1 in [0, 1]. confusion: counts, rows true. curve and auc: macro
    one-versus-rest, with two classes of the second; None without probabilities. differences (this one's score minus the
    first one's), mcnemar and p (of McNemar's test, adjusted if there are several: Holm 1979) are relative to the first
    contestant, which has none.
    """

    name: str
    model: str
    scores: Mapping[str, Interval]
    confusion: tuple[tuple[int, ...], ...]
    auc: float | None = None
    differences: Mapping[str, Interval] = field(default_factory=dict)
    mcnemar: McNemar | None = None
    p: float | None = None
    curve: Roc | None = None


@dataclass(frozen=True)
class Comparison:
    """Several models on the same images. part is validation or test; level is the level of all intervals.

    notes are remarks on the images. openings maps a study to the number of times its test part was opened.
    """

    part: str
    image_count: int
    class_names: tuple[str, ...]
    contestants: tuple[Contestant, ...]
    level: float = 0.95
    notes: tuple[str, ...] = ()
    openings: Mapping[str, int] = field(default_factory=dict)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """One sentence for each contestant after the first."""
        first = self.contestants[0]
        return tuple(self._verdict(first, other) for other in self.contestants[1:])

    def _verdict(self, first: Contestant, other: Contestant) -> str:
        test, difference = other.mcnemar, other.differences["accuracy"]
        if test is None or other.p is None or not test.first_only + test.second_only:
            return f"{first.name} and {other.name} are right on the same images: no difference to test."
        sign = 1 if difference.value > 0 else -1
        low, high = sorted((sign * difference.low, sign * difference.high))
        adjusted = ", adjusted for several" if len(self.contestants) > 2 else ""
        evidence = f"{self.level:.0%} interval {_points(low)} to {_points(high)}; McNemar {shown_p(other.p)}{adjusted}"
        # Both must agree: with few discordant images the interval alone is too narrow.
        if low > 0 and other.p < _SIGNIFICANT:
            better, worse = (other, first) if sign > 0 else (first, other)
            points = _points(abs(difference.value))
            return f"{better.name} is better than {worse.name} by {points} points of accuracy ({evidence})."
        ahead = other if sign > 0 else first
        lead = f"{_points(abs(difference.value))} points for {ahead.name}" if difference.value else "0 points"
        return (
            f"{first.name} and {other.name}: no difference in accuracy that these {self.image_count:,} images can show "
            f"({lead}, {evidence})."
        )

    def markdown(self) -> str:
        """Verdicts, table and notes; scores as shares, differences in points."""
        lines = [f"# {' against '.join(contestant.name for contestant in self.contestants)}", ""]
        lines += [f"{self.image_count:,} {self.part} images, {len(self.class_names)} classes.", ""]
        lines += [*(f"- {verdict}" for verdict in self.verdicts), ""]
        heads = [">value", f">{self.level:.0%} interval", ">difference to the first, points", ">McNemar"]
        rows = [row for contestant in self.contestants for row in rows_of(contestant)]
        lines += markdown_table(["model", "score", *heads], rows)
        if len(self.class_names) == 2:
            heads = ["model", ">TN", ">FP", ">FN", f">TP (positive: {self.class_names[1]})"]
            lines += markdown_table(heads, [(each.name, *chain(*each.confusion)) for each in self.contestants])
        lines += [f"- {contestant.name}: {contestant.model}" for contestant in self.contestants]
        lines += [f"- {note}" for note in self.notes]

        return "\n".join(lines) + "\n"


def compare_predictions(
    labels: Ints,
    predictions: Sequence[Predictions],
    *,
    class_names: Sequence[str],
    part: str,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
    notes: Sequence[str] = (),
    openings: Mapping[str, int] | None = None,
) -> Comparison:
    """labels (n,) in [0, classes) and the predictions of at least two models -> their comparison."""
    classes = len(class_names)
    predicted = np.array([each.predicted for each in predictions])
    scores, differences = score_intervals(
        labels, predicted, classes=classes, seed=seed, resamples=resamples, level=level
    )
    right = predicted == labels
    tests = [mcnemar(right[0], other) for other in right[1:]]
    adjusted = holm([test.p for test in tests])
    contestants = []
    for index, each in enumerate(predictions):
        curve = macro_roc(each.probabilities, labels) if each.probabilities is not None else None
        cells = np.bincount(labels * classes + each.predicted, minlength=classes**2)
        contestants.append(
            Contestant(
                name=each.name,
                model=each.model,
                scores=scores[index],
                confusion=tuple(map(tuple, cells.reshape(classes, classes).tolist())),
                auc=curve.area if curve else None,
                differences=differences[index] if index else {},
                mcnemar=tests[index - 1] if index else None,
                p=adjusted[index - 1] if index else None,
                curve=curve,
            )
        )
    return Comparison(
        part, len(labels), tuple(class_names), tuple(contestants), level, tuple(notes), dict(openings or {})
    )


def rows_of(contestant: Contestant) -> list[list[str]]:
    """A contestant as rows of text: name, score, value, interval, difference in points with interval, McNemar's p."""
    rows = []
    for name, score in contestant.scores.items():
        difference = contestant.differences.get(name)
        rows.append(
            [
                contestant.name,
                name.replace("_", " ").replace("f1", "F1"),
                f"{score.value:.4f}",
                f"{score.low:.4f} to {score.high:.4f}",
                _difference(difference) if difference else "",
                shown_p(contestant.p) if name == "accuracy" and contestant.p is not None else "",
            ]
        )
    if contestant.auc is not None:
        rows.append([contestant.name, "ROC-AUC", f"{contestant.auc:.4f}", "", "", ""])
    return rows


def _difference(interval: Interval) -> str:
    return f"{round(100 * interval.value, 2) + 0.0:+.2f} ({_points(interval.low)} to {_points(interval.high)})"


def _points(share: float) -> str:
    """A share in points of a hundred; never -0.00."""
    return f"{round(100 * share, 2) + 0.0:.2f}"


def shown_p(p: float) -> str:
    """p = 0.0042, p = 0.31, p < 0.0001."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.2g}" if p < 0.995 else "p = 1"
