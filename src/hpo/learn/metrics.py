"""Scores of a classifier from its logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """predicted, labels (n,) int64 -> counts (classes, classes) int64: row the true class, column the predicted one."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def macro_auc(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (n, classes), labels (n,) -> mean one-versus-rest area under the ROC curve, a scalar in [0, 1].

    Rank form (Hanley & McNeil 1982) on softmax probabilities, ties at half; classes without a positive or without a
    negative image are left out; nan if all are.
    """
    probabilities = logits.double().softmax(1).t().contiguous()
    ordered = probabilities.sort(dim=1).values
    below = torch.searchsorted(ordered, probabilities)
    upto = torch.searchsorted(ordered, probabilities, right=True)
    ranks = (below + upto + 1).double() / 2
    positive = functional.one_hot(labels, probabilities.shape[0]).t().double()
    positives = positive.sum(1)
    negatives = len(labels) - positives
    areas = ((ranks * positive).sum(1) - positives * (positives + 1) / 2) / (positives * negatives)
    return areas[(positives > 0) & (negatives > 0)].mean()


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """logits (n, classes) float, labels (n,) int64 -> loss in nats per image, and shares in [0, 1].

    loss: mean cross-entropy. balanced_accuracy: mean recall of the classes present. macro_f1: mean F1 of the classes
    that are present or predicted. macro_auc: see there.
    """
    logits = logits.float()
    counts = confusion_matrix(logits.argmax(1), labels, logits.shape[1]).double()
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    named = {
        "loss": functional.cross_entropy(logits, labels).double(),
        "accuracy": hits.sum() / counts.sum(),
        "balanced_accuracy": (hits / true)[true > 0].mean(),
        "macro_f1": (2 * hits / (true + predicted))[true + predicted > 0].mean(),
        "macro_auc": macro_auc(logits, labels),
    }
    # One transfer from the device for all of them.
    return dict(zip(named, torch.stack(list(named.values())).tolist(), strict=True))
