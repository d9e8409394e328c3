"""The table of metrics: scores of a classifier, each with its direction, its label and how it is computed.

A new metric is one entry of METRICS. It is then a score of every epoch and of the sealed test, an objective, a monitor
and a constraint of studies, a row of reports and, if it is computed from counts, it has confidence intervals there.
Importing this file loads neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Direction = Literal["maximize", "minimize"]
# Arrays of NumPy or torch (..., classes): correct predictions, images and predictions of each class -> (...).
FromCounts = Callable[[Any, Any, Any], Any]
# logits (n, classes) float32, labels (n,) int64 -> scalar.
FromLogits = Callable[["Tensor", "Tensor"], "Tensor"]

_PARTS = {"train": "train", "valid": "validation", "test": "test"}


@dataclass(frozen=True)
class Metric:
    """One score of a classifier on some images.

    Exactly one of from_counts and from_logits is given. from_counts serves epochs (torch) and bootstrap resamples
    (NumPy), which differ only in the counts; scores from logits have no bootstrap intervals. direction says whether a
    higher or a lower value is better. unit is added to the label.
    """

    name: str
    label: str
    direction: Direction = "maximize"
    from_counts: FromCounts | None = None
    from_logits: FromLogits | None = None
    unit: str = ""


def _mean_share(part: Any, total: Any) -> Any:
    """Mean of part / total over the last axis, without the entries where total is 0 (part is 0 there, too)."""
    empty = total == 0
    return (part / (total + empty)).sum(-1) / (~empty).sum(-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    from torch.nn import functional

    return functional.cross_entropy(logits, labels)


def macro_auc(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean one-versus-rest area under the ROC curve, a scalar in [0, 1]; logits (n, classes), labels (n,).

    Rank form (Hanley & McNeil 1982) on softmax probabilities, ties count half. Classes without a positive or without a
    negative image are left out; nan if all are.
    """
    import torch
    from torch.nn import functional

    probabilities = logits.double().softmax(1).t().contiguous()
    ordered, order = probabilities.sort(dim=1)
    rises, position = ordered.diff(dim=1) != 0, torch.arange(len(labels), device=labels.device)
    # First and last position of equal values, without a search for each.
    first = functional.pad(torch.where(rises, position[1:], 0), (1, 0)).cummax(1).values
    last = functional.pad(torch.where(rises, position[:-1], len(labels) - 1), (0, 1), value=len(labels) - 1)
    ranks = (first + last.flip(1).cummin(1).values.flip(1)).double() / 2 + 1
    positive = (labels[order] == torch.arange(len(order), device=labels.device).unsqueeze(1)).double()
    positives = positive.sum(1)
    negatives = len(labels) - positives
    areas = ((ranks * positive).sum(1) - positives * (positives + 1) / 2) / (positives * negatives)
    return areas[(positives > 0) & (negatives > 0)].mean()


_ENTRIES = (
    # Mean cross-entropy.
    Metric("loss", "loss", "minimize", from_logits=_cross_entropy, unit="nats per image"),
    Metric("accuracy", "accuracy", from_counts=lambda hits, true, _: hits.sum(-1) / true.sum(-1)),
    # Mean recall of the classes present.
    Metric("balanced_accuracy", "balanced accuracy", from_counts=lambda hits, true, _: _mean_share(hits, true)),
    # Mean F1 of the classes present or predicted.
    Metric("macro_f1", "macro F1", from_counts=lambda hits, true, predicted: _mean_share(2 * hits, true + predicted)),
    Metric("macro_auc", "macro AUC", from_logits=macro_auc),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ENTRIES}


def counted() -> dict[str, FromCounts]:
    """The metrics that are computed from counts, so that they can be resampled: name -> function."""
    return {name: metric.from_counts for name, metric in METRICS.items() if metric.from_counts is not None}


def metric_of(score: str) -> Metric | None:
    """The metric of a score such as valid_macro_f1, test_macro_f1 or macro_f1; None for other names."""
    part, _, name = score.partition("_")
    return METRICS.get(name if part in _PARTS else score)


def direction_of(score: str) -> Direction:
    """The direction in which a score improves; costs, such as parameters and latency_ms, are minimized."""
    metric = metric_of(score)
    return metric.direction if metric else "minimize"


def label_of(score: str) -> str:
    """A score's name as a label of a row or an axis: valid_macro_auc -> validation macro AUC."""
    metric = metric_of(score)
    if metric is None:
        words = {**_PARTS, "ms": "(ms)"}
        return " ".join(words.get(word, word) for word in score.split("_"))
    part = "" if score == metric.name else f"{_PARTS[score.partition('_')[0]]} "
    return f"{part}{metric.label}" + (f" ({metric.unit})" if metric.unit else "")


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """predicted, labels (n,) int64 -> counts (classes, classes) int64: row the true class, column the predicted one."""
    import torch

    return torch.bincount(labels * classes + predicted, minlength=classes * classes).view(classes, classes)


def scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Every metric of METRICS by name; logits (n, classes) float, labels (n,) int64. One transfer from the device."""
    import torch

    logits = logits.float()
    counts = confusion_matrix(logits.argmax(1), labels, logits.shape[1]).double()
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    values = [
        metric.from_counts(hits, true, predicted) if metric.from_counts else metric.from_logits(logits, labels)  # type: ignore[misc]  # one of the two
        for metric in METRICS.values()
    ]
    return dict(zip(METRICS, torch.stack([value.double() for value in values]).tolist(), strict=True))
