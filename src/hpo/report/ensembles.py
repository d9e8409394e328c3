"""Choose the members of an ensemble from validation probabilities, and estimate what it gains over its best member.

All of this is arithmetic on probabilities that trials have left: no network is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from hpo.metrics import METRICS, Metric, find_metric, name_of
from hpo.records import pack_classes
from hpo.report.statistics import Interval, Ints, mean_lead, paired_bootstrap

_ROUNDS = 50  # of the selection; weights are multiples of 1 / rounds at best
_SWAPS = 5  # divisions of the images into two halves
_SMALLEST = 1e-7  # probability: what float32 cannot tell from 0


@dataclass(frozen=True)
class Limits:
    """The most that an ensemble may have: different members, weights and biases, and milliseconds for an image."""

    members: int = 8
    parameters: float = math.inf
    latency_ms: float = math.inf


@dataclass(frozen=True)
class Pool:
    """The candidates for an ensemble, best first, with their probabilities on the same validation images.

    probabilities are (candidates, n, classes) float32, labels (n,), or (n, classes) of 0 and 1 where an image has
    several. parameters and latency_ms have one value for each candidate.
    """

    probabilities: NDArray[np.float32]
    labels: NDArray[np.int64]
    parameters: Sequence[int]
    latency_ms: Sequence[float] = ()

    def likelihood(self) -> NDArray[np.float32]:
        """(candidates, n, labels): the probability of what is true, of the class or of each label."""
        if self.labels.ndim == 2:
            return np.where(self.labels > 0, self.probabilities, 1 - self.probabilities)
        return np.take_along_axis(self.probabilities, self.labels[np.newaxis, :, np.newaxis], axis=2)

    def mean(self, counts: Ints) -> NDArray[np.float32]:
        """(n, classes): the mean probabilities of the candidates, each counted so often."""
        return np.tensordot(counts / counts.sum(), self.probabilities, axes=1).astype(np.float32)


def select(pool: Pool, limits: Limits, rows: Ints | None = None) -> Ints:
    """How often each candidate counts in the ensemble, (candidates,), chosen on these rows, by default on all.

    Greedy selection with replacement (Caruana et al. 2004): in each of 50 rounds the candidate is added that makes the
    cross-entropy of the mean probabilities lowest, and the best of the 50 ensembles is taken. Cross-entropy rather than
    accuracy, because it changes with every image and so overfits the selection less. A candidate that would break a
    limit is not added.
    """
    likelihood = pool.likelihood() if rows is None else pool.likelihood()[:, rows]
    sizes, times = np.asarray(pool.parameters, float), np.asarray(pool.latency_ms or np.zeros(len(likelihood)))
    total, counts = np.zeros(likelihood.shape[1:]), np.zeros(len(likelihood), np.int64)
    best, lowest = counts, math.inf
    for size in range(1, _ROUNDS + 1):
        chosen = counts > 0
        fits = (sizes[chosen].sum() + sizes <= limits.parameters) & (times[chosen].sum() + times <= limits.latency_ms)
        allowed = np.flatnonzero(chosen | (fits & (chosen.sum() < limits.members)))
        if not len(allowed):
            break
        losses = [-np.log(np.maximum((total + likelihood[each]) / size, _SMALLEST)).mean() for each in allowed]
        added = allowed[int(np.argmin(losses))]
        total += likelihood[added]
        counts = counts + (np.arange(len(counts)) == added)
        if min(losses) < lowest - 1e-9:
            best, lowest = counts, min(losses)
    fewest: Ints = best // max(1, np.gcd.reduce(best))
    return fewest


@dataclass(frozen=True)
class Gain:
    """What an ensemble gains over its best member on images on which neither was chosen.

    lead is the difference of a score, higher is better; label names the score. ensemble and single are their own
    scores, means over the halves. candidates counts those that it was chosen from. judged holds, for each division of
    the images, the classes that the ensemble of the other half predicts (see pack_classes); none with several labels.
    """

    label: str
    lead: Interval
    ensemble: float
    single: float
    candidates: int
    images: int
    judged: tuple[str, ...] = field(default=(), repr=False)

    @property
    def verdict(self) -> str:
        """In one word, whether chance explains it."""
        return "a gain" if self.lead.low > 0 else "a loss" if self.lead.high < 0 else "a tie"

    def __str__(self) -> str:
        points = self.label != METRICS["loss"].label
        low, value, high = (each * (100 if points else 1) for each in (self.lead.low, self.lead.value, self.lead.high))
        unit = f"points of validation {self.label}" if points else "nats per label less validation loss"
        return f"{value:+.2f} {unit} (95 % interval {low:.2f} to {high:.2f}; {self.verdict})"


def estimate_gain(pool: Pool, limits: Limits, *, objective: str, class_names: Sequence[str], seed: int) -> Gain:
    """What an ensemble of the pool gains over its best candidate, estimated on images that chose neither.

    Five times the images are divided into two halves, by class. On each half the ensemble and the best single candidate
    are chosen, and both are judged on the other half. So every image is judged ten times over, by both, and images are
    resampled for the interval. The score is the objective where it is computed from counts and maximized, else
    accuracy; for images with several labels it is the cross-entropy. The candidates were trained and kept by the scores
    of all these images: that raises both scores slightly.
    """
    if pool.labels.ndim == 2:
        return _loss_gain(pool, limits, seed=seed)
    score = counted_score(objective, class_names)
    predicted, classes = pool.probabilities.argmax(2), pool.probabilities.shape[2]
    together, single = (np.empty((_SWAPS, len(pool.labels)), np.int64) for _ in range(2))
    for swap, here, there in _halves(pool.labels, seed=seed):
        counts = select(pool, limits, here)
        together[swap, there] = replace(pool, probabilities=pool.probabilities[:, there]).mean(counts).argmax(1)
        worth = [score_of(score, pool.labels[here], each[here], classes) for each in predicted]
        single[swap, there] = predicted[int(np.argmax(worth)), there]
    lead = mean_lead(pool.labels, together, single, score=score, classes=classes, seed=seed, resamples=2000)
    own = [np.mean([score_of(score, pool.labels, each, classes) for each in answers]) for answers in (together, single)]
    return Gain(score.label, lead, float(own[0]), float(own[1]), len(predicted), len(pool.labels), _packed(together))


def estimate_soup(
    pool: Pool, answer: Callable[[Sequence[int]], NDArray[np.float32]], limits: Limits, *, score: Metric, seed: int
) -> tuple[list[int], Gain]:
    """The candidates whose averaged weights are best, and what they gain over the best single candidate.

    answer gives the probabilities (n, classes) of the average of some candidates. Greedy soup (Wortsman et al. 2022):
    candidates are tried from the best to the worst, and each stays in the average if the score does not fall. For the
    gain the images are divided into two halves, by class: each chooses for the other, as in estimate_gain. Images have
    one label.
    """
    classes = pool.probabilities.shape[2]

    def worth(probabilities: NDArray[np.float32], rows: Ints) -> float:
        return score_of(score, pool.labels[rows], probabilities[rows].argmax(1), classes)

    def choose(rows: Ints) -> list[int]:
        ranked = sorted(range(len(pool.probabilities)), key=lambda each: -worth(pool.probabilities[each], rows))
        chosen = ranked[:1]
        for each in ranked[1:]:
            if len(chosen) < limits.members and worth(answer([*chosen, each]), rows) >= worth(answer(chosen), rows):
                chosen.append(each)
        return chosen

    mixed, single = (np.empty((1, len(pool.labels)), np.int64) for _ in range(2))
    for _, here, there in _halves(pool.labels, seed=seed)[:2]:
        chosen = choose(here)
        mixed[0, there] = answer(chosen)[there].argmax(1)
        single[0, there] = pool.probabilities[chosen[0], there].argmax(1)
    lead = mean_lead(pool.labels, mixed, single, score=score, classes=classes, seed=seed, resamples=2000)
    own = [score_of(score, pool.labels, each[0], classes) for each in (mixed, single)]
    gain = Gain(score.label, lead, own[0], own[1], len(pool.probabilities), len(pool.labels), _packed(mixed))
    return choose(np.arange(len(pool.labels))), gain


def counted_score(objective: str, class_names: Sequence[str]) -> Metric:
    """The metric of an objective where it is computed from counts and maximized, else accuracy."""
    asked = find_metric(name_of(objective), class_names)
    usable = asked is not None and asked.from_counts is not None and asked.direction == "maximize"
    return asked if asked is not None and usable else METRICS["accuracy"]


def _loss_gain(pool: Pool, limits: Limits, *, seed: int) -> Gain:
    likelihood = pool.likelihood()
    losses = -np.log(np.maximum(likelihood, _SMALLEST)).mean(2)
    together, single = np.zeros((2, len(pool.labels)))
    for _, here, there in _halves(pool.labels.sum(1), seed=seed):
        counts = select(pool, limits, here)
        mean = np.tensordot(counts / counts.sum(), likelihood[:, there], axes=1)
        together[there] -= np.log(np.maximum(mean, _SMALLEST)).mean(1) / _SWAPS
        single[there] += losses[losses[:, here].mean(1).argmin(), there] / _SWAPS
    lead = paired_bootstrap(single, together, seed=seed, resamples=1000)
    label = METRICS["loss"].label
    return Gain(label, lead, float(together.mean()), float(single.mean()), len(losses), len(pool.labels))


def _halves(labels: NDArray[np.integer], *, seed: int) -> list[tuple[int, Ints, Ints]]:
    """(swap, rows to choose on, rows to judge on): each half of each division is once the one and once the other."""
    generator, found = np.random.default_rng(seed), []
    for swap in range(_SWAPS):
        order = np.lexsort((generator.random(len(labels)), labels))
        found += [(swap, order[::2], order[1::2]), (swap, order[1::2], order[::2])]
    return found


def _packed(predicted: Ints) -> tuple[str, ...]:
    return tuple(pack_classes(each.tolist()) for each in predicted)


def score_of(score: Metric, labels: Ints, predicted: Ints, classes: int) -> float:
    """The score, computed from counts, of predicted classes (n,); labels (n,) are the true ones."""
    hits, true, answers = (
        np.bincount(each, minlength=classes).astype(float) for each in (labels[labels == predicted], labels, predicted)
    )
    return float(score.from_counts(hits, true, answers)) if score.from_counts else math.nan
