"""Calibration by one temperature (Guo et al. 2017, arXiv:1706.04599), on probabilities, and whether it is worth it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpo.metrics import calibration_error

_LEAST = 1e-30  # a probability of 0 has no logarithm; float32 goes down to 1e-38
_MOST = 10.0  # a temperature is between 1 / this and this
_HALVINGS = 40
FEWEST = 100  # validation images: fewer are not divided into a half that is fitted and one that judges


class Calibrated(nn.Module):
    """A program from images to probabilities (n, classes), whose probabilities p become p^(1 / T), normalised.

    For a softmax that is the softmax of logits / T. The order of the classes stays.
    """

    def __init__(self, program: nn.Module, temperature: float) -> None:
        super().__init__()
        self.program = program
        self.temperature: Tensor  # a buffer, so that the graph does not depend on it
        self.register_buffer("temperature", torch.tensor(temperature))

    def forward(self, images: Tensor) -> Tensor:
        """Images as the program takes them -> calibrated probabilities (n, classes)."""
        return at_temperature(self.program(images), self.temperature)


def at_temperature(probabilities: Tensor, temperature: float | Tensor) -> Tensor:
    """Probabilities (n, classes) -> p^(1 / T), normalised; T > 1 makes them less sure, T < 1 surer."""
    return (probabilities.clamp_min(_LEAST).log() / temperature).softmax(1)


def fit_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """The temperature in [0.1, 10] with the lowest mean cross-entropy; probabilities (n, classes), labels (n,) int64.

    The cross-entropy is convex in 1 / T, so its slope is followed to 0 by halving.
    """
    logs = probabilities.double().clamp_min(_LEAST).log()
    wanted = logs.gather(1, labels.unsqueeze(1)).mean()
    low, high = -math.log(_MOST), math.log(_MOST)  # of 1 / T
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        expected = (logs * (logs * math.exp(middle)).softmax(1)).sum(1).mean()
        low, high = (low, middle) if expected > wanted else (middle, high)
    return math.exp(-(low + high) / 2)


def cross_entropies(probabilities: Tensor, labels: Tensor) -> Tensor:
    """-log p of the true class, (n,) float64; probabilities (n, classes), labels (n,)."""
    return -probabilities.double().clamp_min(_LEAST).log().gather(1, labels.unsqueeze(1)).squeeze(1)


def halves(count: int) -> tuple[Tensor, Tensor]:
    """Two random halves of 0..count-1, ascending; the same each time."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


def cross_fitted(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Probabilities (n, classes) of which each half is calibrated by the temperature of the other half."""
    found = torch.empty_like(probabilities)
    one, other = halves(len(labels))
    for fitted, judged in ((one, other), (other, one)):
        found[judged] = at_temperature(probabilities[judged], fit_temperature(probabilities[fitted], labels[fitted]))
    return found


@dataclass(frozen=True)
class Difference:
    """A mean difference over the same images with its 95 % interval (normal approximation)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, each: Tensor) -> Difference:
        """That of the differences of n >= 2 images (n,)."""
        mean, error = float(each.double().mean()), 1.96 * float(each.double().std()) / math.sqrt(len(each))
        return cls(mean, mean - error, mean + error)


@dataclass(frozen=True)
class Calibration:
    """What a temperature does on validation images, and whether it is used.

    error and loss are the expected calibration error and the mean cross-entropy, without the temperature, then with it;
    each half of the images is judged with the temperature of the other half. difference is that of the loss. It is used
    where its interval lies below 0.
    """

    temperature: float
    images: int
    error: tuple[float, float]
    loss: tuple[float, float]
    difference: Difference
    used: bool

    def record(self) -> dict[str, Any]:
        """It as plain data."""
        return asdict(self)


def calibration_of(probabilities: Tensor, labels: Tensor) -> Calibration | None:
    """Fit and judge a temperature; None for fewer than 100 images. probabilities (n, classes), labels (n,) int64."""
    if len(labels) < FEWEST:
        return None
    after = cross_fitted(probabilities, labels)
    first, second = cross_entropies(probabilities, labels), cross_entropies(after, labels)
    difference = Difference.of(second - first)
    errors = [float(calibration_error(each.clamp_min(_LEAST).log(), labels)) for each in (probabilities, after)]
    return Calibration(
        temperature=fit_temperature(probabilities, labels),
        images=len(labels),
        error=(errors[0], errors[1]),
        loss=(float(first.mean()), float(second.mean())),
        difference=difference,
        used=difference.high < 0,
    )
