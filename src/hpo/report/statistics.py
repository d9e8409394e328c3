"""Statistics of classifiers on the same images: scores with intervals, tests of a difference, groups of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpo.metrics import counted
from hpo.report.roc import Roc, roc_per_class

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

    first and second are (n,) correctness in [0, 1] of two classifiers on the same n images; whole images are drawn
    again, so what is hard for both cancels.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    values, counts = np.unique(difference, return_counts=True)
    # Drawing n images again is drawing how often each distinct difference comes: one multinomial.
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
    values, drawn = _replicates(labels, predicted, classes=classes, seed=seed, resamples=resamples)

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
    score: str,
    classes: int,
    seed: int,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of a score over trainings of one candidate minus that of another, on the same images.

    score is a key of hpo.metrics.counted(). first (a, n) and second (b, n) are the classes that a and b trainings
    predicted, labels (n,) the true ones; whole images are resampled, the same for all trainings.
    """
    both = np.concatenate([first, second])
    values, drawn = _replicates(labels, both, classes=classes, seed=seed, resamples=resamples)
    place, count = list(counted()).index(score), len(first)
    lead = values[:count, place].mean() - values[count:, place].mean()
    return percentiles(float(lead), drawn[:count, place].mean(0) - drawn[count:, place].mean(0), level=level)


def _replicates(labels: Ints, predicted: Ints, *, classes: int, seed: int, resamples: int) -> tuple[Floats, Floats]:
    """The scores of each classifier (classifiers, scores), and of each in every resample, (..., resamples)."""
    cells, cell_of = np.unique(np.vstack([labels, predicted]), axis=1, return_inverse=True)
    counts = np.bincount(cell_of.ravel(), minlength=cells.shape[1])
    one = np.eye(classes)
    truth = one[cells[0]]
    said = [one[classifier] for classifier in cells[1:]]

    def scores(drawn: Floats) -> Floats:
        """Counts of each cell (resamples, cells) -> (classifiers, scores, resamples)."""
        true = drawn @ truth
        return np.array(
            [[score(drawn @ (truth * each), true, drawn @ each) for score in counted().values()] for each in said]
        )

    # The scores depend only on how often each combination of true and predicted classes comes: drawing n images again
    # is drawing these counts from one multinomial.
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
    """Whether two classifiers are right equally often; first, second (n,) say on which of the same images they are.

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


def macro_roc(probabilities: NDArray[np.floating], labels: Ints) -> Roc | None:
    """probabilities (n, classes), labels (n,) -> the mean of the one-versus-rest curves, at every false positive rate.

    Two classes: the curve of the second. The area is the mean of theirs; classes without a positive or without a
    negative image are left out, None if all are (as `macro_auc` among the scores of a trial).
    """
    found = [curve for curve in roc_per_class(labels, probabilities) if curve is not None]
    if probabilities.shape[1] == 2 or not found:
        return found[-1] if found else None
    rates = np.unique(np.concatenate([curve.false_rate for curve in found]))
    means = np.mean([np.interp(rates, curve.false_rate, curve.true_rate) for curve in found], axis=0)
    area = float(np.mean([curve.area for curve in found]))
    return Roc(np.append(0.0, rates), np.append(0.0, means), area)


def confusion_counts(labels: Ints, predicted: Ints, *, classes: int) -> Ints:
    """labels, predicted (n,) -> counts (classes, classes): row the true class, column the predicted one."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def group_matrix(class_names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> Ints:
    """(classes, groups) of 0 and 1: which class is in which group. A class may be in none."""
    return np.array([[int(name in members) for members in groups.values()] for name in class_names])


def binarise_confusion(
    confusion: Sequence[Sequence[int]] | Ints, class_names: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> Ints:
    """Counts (classes, classes) -> (groups, groups), rows true: each block of classes summed.

    Confusing two classes of one group is then no error. Two groups make a matrix [[TN, FP], [FN, TP]], the second being
    positive.
    """
    member = group_matrix(class_names, groups)
    blocks: Ints = member.T @ np.asarray(confusion) @ member
    return blocks


def binarise_probabilities(
    probabilities: NDArray[np.floating], class_names: Sequence[str], groups: Mapping[str, Sequence[str]]
) -> tuple[Floats, Ints]:
    """Probabilities (n, classes) -> those of the groups (n, groups), sums over members, and the group decided on (n,).

    The decision is the group of the most probable class (of those in a group), which is what binarise_confusion counts;
    it need not be the group of the highest sum. The ROC curve ranks by the sums.
    """
    member = group_matrix(class_names, groups)
    grouped = np.flatnonzero(member.any(axis=1))
    likeliest = grouped[probabilities[:, grouped].argmax(axis=1)]
    return probabilities.astype(np.float64) @ member, member.argmax(axis=1)[likeliest]
