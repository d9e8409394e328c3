"""Statistics of classifiers on the same images: scores, intervals, tests of a difference, ROC curves, class groups.

Reports and ROC curves are scikit-learn's, imported in the functions that need them. Kept here is what it lacks: the
paired bootstrap of scores, McNemar's test, Holm's adjustment, and groups of classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.metrics import FromCounts, Metric, counted

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CHUNK_CELLS = 4_000_000  # drawn counts held at a time: 32 MB
_EXACT_BELOW = 25  # discordant pairs


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def paired_bootstrap(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    *,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of first - second over the images, with a percentile interval (Efron & Tibshirani 1993, ch. 13).

    first and second are (n,) correctness in [0, 1] of two classifiers on the same n images. Whole images are
    resampled, so difficulty that both share cancels.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    values, counts = np.unique(difference, return_counts=True)
    # Resampling n images is drawing the count of each distinct difference: one multinomial.
    drawn = np.random.default_rng(seed).multinomial(len(difference), counts / len(difference), size=resamples)
    return percentiles(difference.mean(), drawn @ values / len(difference), level=level)


def percentiles(value: float, drawn: Floats, *, level: float = 0.95) -> Interval:
    """value with the percentile interval of its bootstrap replicates drawn (resamples,)."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def score_intervals(
    labels: Ints, predicted: Ints, *, classes: int, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[list[dict[str, Interval]], list[dict[str, Interval]]]:
    """Scores of several classifiers on the same images, and their differences to the first, each with its interval.

    labels (n,) and predicted (classifiers, n) hold classes in [0, classes). Percentile intervals of the paired
    bootstrap (Efron & Tibshirani 1993, ch. 13): each resample draws whole images, the same for all classifiers. Both
    lists have one dict a classifier, score -> Interval; a difference is its score minus the first one's.
    """
    functions = list(counted().values())
    values, drawn = _replicates(labels, predicted, functions, classes=classes, seed=seed, resamples=resamples)

    def named(values: Floats, drawn: Floats) -> dict[str, Interval]:
        each = zip(counted(), values, drawn, strict=True)
        return {name: percentiles(value, replicates, level=level) for name, value, replicates in each}

    own = [named(*pair) for pair in zip(values, drawn, strict=True)]
    differences = [named(*pair) for pair in zip(values - values[0], drawn - drawn[0], strict=True)]
    return own, differences


def mean_lead(
    labels: Ints,
    first: Ints,
    second: Ints,
    *,
    score: Metric,
    classes: int,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of a score over trainings of one candidate minus that of another, on the same images.

    score is a metric that is computed from counts.

    first (a, n) and second (b, n) are the classes that a and b trainings predicted, labels (n,) the true ones; the
    interval is that of score_intervals: whole images are resampled, the same for all trainings.
    """
    both = np.concatenate([first, second])
    functions = [score.from_counts] if score.from_counts else []
    values, drawn = _replicates(labels, both, functions, classes=classes, seed=seed, resamples=resamples)
    place, count = 0, len(first)
    lead = values[:count, place].mean() - values[count:, place].mean()
    return percentiles(float(lead), drawn[:count, place].mean(0) - drawn[count:, place].mean(0), level=level)


def _replicates(
    labels: Ints, predicted: Ints, functions: Sequence[FromCounts], *, classes: int, seed: int, resamples: int
) -> tuple[Floats, Floats]:
    """The scores of each classifier (classifiers, scores), and of each in every resample, (..., resamples)."""
    cells, cell_of = np.unique(np.vstack([labels, predicted]), axis=1, return_inverse=True)
    counts = np.bincount(cell_of.ravel(), minlength=cells.shape[1])
    one = np.eye(classes)
    truth = one[cells[0]]
    answers = [one[classifier] for classifier in cells[1:]]

    def scores(drawn: Floats) -> Floats:
        """Counts of each cell (resamples, cells) -> (classifiers, scores, resamples)."""
        true = drawn @ truth
        return np.array(
            [[score(drawn @ (truth * each), true, drawn @ each) for score in functions] for each in answers]
        )

    # The scores depend only on the counts of each combination of true and predicted classes, so resampling n images is
    # drawing these counts from one multinomial.
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK_CELLS // len(counts))
    sizes = [min(step, resamples - start) for start in range(0, resamples, step)]
    chance = counts / counts.sum()
    drawn = np.concatenate(
        [scores(rng.multinomial(len(labels), chance, size=size).astype(np.float64)) for size in sizes], axis=2
    )
    return scores(counts[np.newaxis].astype(np.float64))[..., 0], drawn


@dataclass(frozen=True)
class McNemar:
    """McNemar's test of two classifiers. first_only, second_only: images that only that one gets right.

    p is two-sided; statistic is chi-square with one degree of freedom, None where the test is exact.
    """

    first_only: int
    second_only: int
    statistic: float | None
    p: float


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> McNemar:
    """Test whether two classifiers are right equally often; first, second (n,) are True on images each gets right.

    Of d discordant images, binomial(d, 1/2) are in favour of either (McNemar 1947). Exact below 25 of them, else
    chi-square with continuity correction (Edwards 1948): (|b - c| - 1)^2 / (b + c).
    """
    b, c = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    if b + c < _EXACT_BELOW:
        tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
        return McNemar(b, c, None, min(1.0, 2 * tail))
    statistic = max(abs(b - c) - 1, 0) ** 2 / (b + c)
    # The upper tail of chi-square with one degree of freedom is that of the square of a standard normal variable.
    return McNemar(b, c, statistic, math.erfc(math.sqrt(statistic / 2)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several, in their order (Holm 1979): each error rate then holds for all at once."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


@dataclass(frozen=True)
class Roc:
    """One ROC curve: (points,) false and true positive rates in [0, 1], from (0, 0) to (1, 1), and the area below."""

    false_rate: NDArray[np.float64]
    true_rate: NDArray[np.float64]
    area: float


def roc(positive: NDArray[np.bool_], score: NDArray[np.floating]) -> Roc | None:
    """positive (n,) bool, score (n,) higher where a positive is likelier -> the curve; None without both kinds.

    The points are those of scikit-learn, whose import takes longer than a study of minutes should wait.
    """
    if positive.all() or not positive.any():
        return None
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # of each run of equal scores
    true = np.cumsum(positive[order])[last]
    false = 1 + last - true
    corner = np.pad((np.diff(false, 2) != 0) | (np.diff(true, 2) != 0), 1, constant_values=True)[: len(last)]
    false_rate, true_rate = (np.append(0.0, counts[corner] / counts[-1]) for counts in (false, true))
    return Roc(false_rate, true_rate, float(np.trapezoid(true_rate, false_rate)))


def roc_per_class(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> list[Roc | None]:
    """labels (n,), probabilities (n, classes) -> each class against all others; None for a class without images.

    Labels may be (n, classes) of 0 and 1, where an image has several.
    """
    truth = labels.T == 1 if labels.ndim == 2 else [labels == index for index in range(probabilities.shape[1])]
    return [roc(positive, probabilities[:, index]) for index, positive in enumerate(truth)]


def macro_roc(probabilities: NDArray[np.floating], labels: Ints) -> Roc | None:
    """probabilities (n, classes), labels (n,) -> the mean of the one-versus-rest curves, at every false positive rate.

    Two classes: the curve of the second. The area is the mean of the areas. Classes without a positive or without a
    negative image are left out (as in a trial's `macro_auc`); None if all are.
    """
    curves = [curve for curve in roc_per_class(labels, probabilities) if curve is not None]
    if probabilities.shape[1] == 2 or not curves:
        return curves[-1] if curves else None
    rates = np.unique(np.concatenate([curve.false_rate for curve in curves]))
    means = np.mean([np.interp(rates, curve.false_rate, curve.true_rate) for curve in curves], axis=0)
    area = float(np.mean([curve.area for curve in curves]))
    return Roc(np.append(0.0, rates), np.append(0.0, means), area)


def classification_report(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> tuple[dict[str, Any], str]:
    """(true, predicted) counts -> precision, recall, f1 in [0, 1] and support of each class, as JSON and as text.

    A share of nothing is 0. macro_average is the plain mean over classes, weighted_average weighs by support.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    hits, support, predicted = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    scores = {"precision": _share(hits, predicted), "recall": _share(hits, support)}
    scores["f1"] = _share(2 * hits, support + predicted)
    total = int(support.sum())
    weights = _share(support, np.full_like(support, total))
    report: dict[str, Any] = {
        "classes": {
            name: {score: float(values[index]) for score, values in scores.items()} | {"support": int(support[index])}
            for index, name in enumerate(class_names)
        },
        "macro_average": {score: float(values.mean()) for score, values in scores.items()},
        "weighted_average": {score: float(values @ weights) for score, values in scores.items()},
        "accuracy": float(hits.sum() / total) if total else 0.0,
        "support": total,
    }
    return report, _report_table(report)


def _share(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _report_table(report: Mapping[str, Any]) -> str:
    """The report as text, in the layout of scikit-learn's."""
    wide, total = max(len("weighted avg"), *map(len, report["classes"])), report["support"]
    rows = [(name, row, row["support"]) for name, row in report["classes"].items()]
    averages = [(f"{kind} avg", report[f"{kind}_average"], total) for kind in ("macro", "weighted")]

    def line(name: str, row: Mapping[str, float], support: int) -> str:
        cells = "".join(f" {row[score]:>9.4f}" for score in ("precision", "recall", "f1"))
        return f"{name:>{wide}} {cells} {support:>9}\n"

    head = f"{'':>{wide}} {'precision':>10}{'recall':>10}{'f1-score':>10}{'support':>10}\n\n"
    accuracy = f"\n{'accuracy':>{wide}} {'':>20} {report['accuracy']:>9.4f} {total:>9}\n"
    return head + "".join(line(*row) for row in rows) + accuracy + "".join(line(*row) for row in averages)


def _answers_of(confusion: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """(true, predicted) counts -> the true and the predicted class of each image (n,), in some order."""
    counts = np.asarray(confusion, dtype=np.int64)
    true, predicted = (np.repeat(cells, counts.ravel()) for cells in np.indices(counts.shape).reshape(2, -1))
    return true, predicted


def confusion_intervals(confusion: Sequence[Sequence[int]], *, seed: int, resamples: int = 2000) -> dict[str, Interval]:
    """(true, predicted) counts -> accuracy, balanced_accuracy, macro_f1 with 95 % intervals; {} without images."""
    true, predicted = _answers_of(confusion)
    if not len(true):
        return {}
    own, _ = score_intervals(true, predicted[np.newaxis], classes=len(confusion), seed=seed, resamples=resamples)
    return own[0]


def share_interval(share: float, count: int, *, seed: int, resamples: int = 2000) -> Interval:
    """A share of count images, such as an accuracy, with its 95 % interval."""
    right = np.arange(count) < round(share * count)
    return paired_bootstrap(right.astype(float), np.zeros(count), seed=seed, resamples=resamples)


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in bins of equal width: means and counts of each bin (bins,); nan where it is empty.

    error is the expected calibration error (Naeini et al. 2015), that of hpo.metrics.calibration_error.
    """

    confidence: Floats
    accuracy: Floats
    counts: Ints
    error: float


def reliability(labels: NDArray[np.integer], probabilities: NDArray[np.floating], *, bins: int = 15) -> Reliability:
    """labels (n,), probabilities (n, classes) -> the reliability of the most probable classes."""
    confidence = probabilities.max(1).astype(np.float64)
    right = (probabilities.argmax(1) == labels).astype(np.float64)
    places = np.clip(np.ceil(confidence * bins).astype(np.int64), 1, bins) - 1
    counts, sure, hits = (np.bincount(places, weights, bins) for weights in (None, confidence, right))
    error = float(np.abs(hits - sure).sum() / max(len(labels), 1))
    with np.errstate(invalid="ignore"):
        return Reliability(sure / counts, hits / counts, counts.astype(np.int64), error)


@dataclass(frozen=True)
class Coverage:
    """What a classifier is worth that may refuse: for each image, the surest first, (n,).

    threshold is its confidence: at this or above it an image is answered. coverage is the share of the images that are
    answered then, accuracy that of the right ones among them.
    """

    threshold: Floats
    coverage: Floats
    accuracy: Floats

    def at(self, coverage: float) -> tuple[float, float]:
        """Threshold and accuracy where at least this share in (0, 1] is answered."""
        place = min(int(np.searchsorted(self.coverage, coverage - 1e-9)), len(self.coverage) - 1)
        return float(self.threshold[place]), float(self.accuracy[place])


def accuracy_at_coverage(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> Coverage:
    """labels (n,), probabilities (n, classes), n >= 1 -> accuracy against coverage; equal confidences are one step."""
    confidence = probabilities.max(1).astype(np.float64)
    order = np.argsort(-confidence, kind="stable")
    right = (probabilities.argmax(1) == labels)[order].astype(np.float64)
    answered = np.arange(1, len(order) + 1)
    # Of equal confidences all are answered or none: each counts as the last of them.
    last = np.searchsorted(-confidence[order], -confidence[order], side="right")
    return Coverage(confidence[order], last / len(order), (right.cumsum() / answered)[last - 1])


def group_matrix(class_names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Ints:
    """(classes, groups) of 0 and 1: which class is in which group. A class may be in none."""
    return np.array([[int(name in members) for members in groups.values()] for name in class_names])


def binarise_probabilities(
    probabilities: NDArray[np.floating], class_names: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> tuple[Floats, Ints]:
    """Probabilities (n, classes) -> those of the groups (n, groups), sums over members, and the group decided on (n,).

    The decision is the group of the most probable class (of those in a group), which need not be that of the highest
    sum. The ROC curve ranks by the sums.
    """
    member = group_matrix(class_names, groups)
    grouped = np.flatnonzero(member.any(axis=1))
    likeliest = grouped[probabilities[:, grouped].argmax(axis=1)]
    return probabilities.astype(np.float64) @ member, member.argmax(axis=1)[likeliest]
