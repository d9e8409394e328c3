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
    ordered, order = probabilities.sort(dim=1)
    rises, place = ordered.diff(dim=1) != 0, torch.arange(len(labels), device=labels.device)
    # The places of the first and the last of equal values, without a search for each.
    first = functional.pad(torch.where(rises, place[1:], 0), (1, 0)).cummax(1).values
    last = functional.pad(torch.where(rises, place[:-1], len(labels) - 1), (0, 1), value=len(labels) - 1)
    ranks = (first + last.flip(1).cummin(1).values.flip(1)).double() / 2 + 1
    positive = (labels[order] == torch.arange(len(order), device=labels.device).unsqueeze(1)).double()
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
