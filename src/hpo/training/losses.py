"""The loss that a training minimizes: cross-entropy, focal loss, or a function of the user's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hpo.data.dotted_path import load_function
from hpo.data.prepare import TrialData
from hpo.errors import TrainingError
from hpo.spec.training import TrainingSpec


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """labels (n,) -> (classes,) weights n / (classes * images of the class): scikit-learn's "balanced"."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts.float())


def positive_weights(labels: Tensor) -> Tensor:
    """labels (n, classes) of 0 and 1 -> (classes,) images without a label to each with it: BCEWithLogitsLoss's."""
    counts = labels.sum(0).clamp(min=1).float()
    return (len(labels) - counts).clamp(min=1) / counts


class Loss:
    """The mean loss of a batch as spec says. Labels are (n,), or (n, classes) of 0 and 1 where images have several."""

    def __init__(self, spec: TrainingSpec, data: TrialData) -> None:
        self._smoothing, self._gamma, self._name = spec.label_smoothing, spec.focal_gamma, spec.loss
        labels = data.labels[data.train]
        self._several = labels.ndim == 2
        self._weights: Tensor | None = None
        if spec.class_weights == "balanced":
            self._weights = positive_weights(labels) if self._several else class_weights(labels, len(data.class_names))
        self._own: Callable[..., Tensor] | None = load_function(spec.loss, what="loss") if ":" in spec.loss else None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits (n, classes) float32 and labels -> a scalar."""
        if self._own is not None:
            return _answer(self._own, self._name, logits, labels)
        if self._several:
            return self._of_labels(logits, labels.to(logits.dtype))
        if self._name == "cross_entropy":
            return functional.cross_entropy(logits, labels, weight=self._weights, label_smoothing=self._smoothing)
        # Lin et al. 2017: the cross-entropy of an image times (1 - p)^gamma, p the probability of its class.
        logs = logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
        each = -_power(1 - logs.exp(), self._gamma) * logs
        if self._weights is None:
            return each.mean()
        weights = self._weights[labels]
        return (weights * each).sum() / weights.sum()

    def _of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean binary cross-entropy over images and labels, or its focal form."""
        targets = labels * (1 - self._smoothing) + self._smoothing / 2
        each = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=self._weights, reduction="none")
        if self._name == "focal":
            each = each * _power(torch.where(labels > 0, logits, -logits).neg().sigmoid(), self._gamma)
        return each.mean()

    def share(self, part: Tensor, batch: Tensor) -> Tensor | float:
        """The share of a piece's mean loss in that of its batch, from their labels: a mean may be weighted by class."""
        if len(part) == len(batch):
            return 1.0
        if self._weights is None or self._several:
            return len(part) / len(batch)
        return self._weights[part].sum() / self._weights[batch].sum()


def _power(base: Tensor, exponent: float) -> Tensor:
    # The slope of x ** gamma at 0 is not finite for gamma below 1.
    return base.clamp(min=1e-8) ** exponent


def _answer(function: Callable[..., Tensor], name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that the user's function answers. Raises TrainingError where it fails or answers no scalar tensor."""
    try:
        loss = function(logits, labels)
    except Exception as error:
        raise TrainingError(
            f"loss {name}: the function fails: {type(error).__name__}: {error}.",
            f"Call it with logits of shape {tuple(logits.shape)} and labels {tuple(labels.shape)} int64.",
        ) from error
    if not isinstance(loss, Tensor) or loss.shape != () or not loss.requires_grad:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainingError(
            f"loss {name}: returned {found}, not a scalar that depends on the logits.", "Return the mean over images."
        )
    return loss


def balanced_order(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """labels (n,) on the CPU -> (count,) places in 0..n-1, drawn with replacement, all classes present equally often.

    As WeightedRandomSampler with a weight of 1 / images of the class. Raises TrainingError for several labels an image.
    """
    if labels.ndim == 2:
        raise TrainingError(
            "training.sampling: balanced draws by the class of an image, and these have several labels.",
            "Weigh them instead: training.class_weights: balanced.",
        )
    weights = 1 / labels.bincount().clamp(min=1).double()
    return torch.multinomial(weights[labels], count, replacement=True, generator=generator)
