"""The table of metrics: scores of a classifier, each with its direction, its label and how it is computed.

A new metric is one entry of METRICS. It is then a score of every epoch and of the sealed test, an objective, a monitor
and a constraint of studies, a row of reports and, if it is computed from counts, it has confidence intervals there.
One with on_request=True is all that where a study names it. FAMILIES hold metrics with a parameter, such as the recall
of one class; package.module:function is a metric of the user's own. Importing this file loads neither torch nor numpy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from hpo.errors import SpecError

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
    higher or a lower value is better. unit is added to the label. on_request: computed only where a study names it.
    """

    name: str
    label: str
    direction: Direction = "maximize"
    from_counts: FromCounts | None = None
    from_logits: FromLogits | None = None
    unit: str = ""
    on_request: bool = False


def _ratio(part: Any, total: Any) -> Any:
    """part / total, 0 where total is 0 (part is 0 there, too)."""
    return part / (total + (total == 0))


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

    classes = torch.arange(logits.shape[1], device=labels.device).unsqueeze(1)
    return _mean_area(logits.double().softmax(1), labels == classes)


def _mean_area(probabilities: Tensor, truth: Tensor) -> Tensor:
    """The mean area of probabilities (n, classes) for truth (classes, n) bool, as macro_auc."""
    import torch
    from torch.nn import functional

    count = len(probabilities)
    probabilities = probabilities.t().contiguous()
    ordered, order = probabilities.sort(dim=1)
    rises, position = ordered.diff(dim=1) != 0, torch.arange(count, device=order.device)
    # First and last position of equal values, without a search for each.
    first = functional.pad(torch.where(rises, position[1:], 0), (1, 0)).cummax(1).values
    last = functional.pad(torch.where(rises, position[:-1], count - 1), (0, 1), value=count - 1)
    ranks = (first + last.flip(1).cummin(1).values.flip(1)).double() / 2 + 1
    positive = truth.gather(1, order).double()
    positives = positive.sum(1)
    negatives = count - positives
    areas = ((ranks * positive).sum(1) - positives * (positives + 1) / 2) / (positives * negatives)
    return areas[(positives > 0) & (negatives > 0)].mean()


def _chance_hits(true: Any, predicted: Any) -> Any:
    return (true * predicted).sum(-1)


def _matthews(hits: Any, true: Any, predicted: Any) -> Any:
    """Matthews correlation of several classes (Gorodkin 2004), in [-1, 1]; 0 where it is not defined."""
    count = true.sum(-1)
    spread = (count**2 - _chance_hits(true, true)) * (count**2 - _chance_hits(predicted, predicted))
    return _ratio(hits.sum(-1) * count - _chance_hits(true, predicted), spread**0.5)


def _kappa(hits: Any, true: Any, predicted: Any) -> Any:
    """Cohen's kappa (1960), in [-1, 1]; 0 where all images are, and are predicted, of one class."""
    count, chance = true.sum(-1), _chance_hits(true, predicted)
    return _ratio(hits.sum(-1) * count - chance, count**2 - chance)


def _class_error(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) - labels).abs().double().mean()


def _quadratic_kappa(logits: Tensor, labels: Tensor) -> Tensor:
    """Cohen's kappa with the square of the distance between the classes as weight (1968); 0 where it is not defined."""
    predicted, labels = logits.argmax(1).double(), labels.double()
    observed = (predicted - labels).square().mean()
    # The mean of (p - t)^2 where p and t are drawn apart from each other.
    spread = predicted.var(correction=0) + labels.var(correction=0) + (predicted.mean() - labels.mean()).square()
    agreement: Tensor = _ratio(spread - observed, spread)
    return agreement


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> Tensor:
    """Expected calibration error (Guo et al. 2017), a scalar in [0, 1].

    The mean distance of accuracy and confidence over bins of equal width of the confidence, weighted by their images.
    """
    import torch

    confidence, predicted = logits.double().softmax(1).max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    gaps.index_add_(0, place, (predicted == labels).double() - confidence)
    return gaps.abs().sum() / len(labels)


def _top_accuracy(logits: Tensor, labels: Tensor, *, count: int) -> Tensor:
    return (logits.topk(count, dim=1).indices == labels.unsqueeze(1)).any(1).double().mean()


def sensitivity_at(logits: Tensor, labels: Tensor, *, positive: int, specificity: float) -> Tensor:
    """The highest share of positive images above a threshold that this share of the other images stays below.

    positive is the class; all others are negative. Thresholds are the probabilities that occur, and one above all. nan
    without images of both kinds.
    """
    import torch

    ordered, order = logits.double().softmax(1)[:, positive].sort(descending=True)
    hit = (labels[order] == positive).double()
    true, false = hit.cumsum(0), (1 - hit).cumsum(0)
    # A threshold lies between two different probabilities.
    ends = torch.cat([ordered[1:] != ordered[:-1], ordered.new_ones(1, dtype=torch.bool)])
    allowed = ends & (false <= (1 - specificity) * false[-1] + 1e-9)
    best = torch.where(allowed, true, 0.0).max() / true[-1]
    return torch.where(false[-1] > 0, best, torch.nan)


_ENTRIES = (
    # Mean cross-entropy.
    Metric("loss", "loss", "minimize", from_logits=_cross_entropy, unit="nats per image"),
    Metric("accuracy", "accuracy", from_counts=lambda hits, true, _: hits.sum(-1) / true.sum(-1)),
    # Mean recall of the classes present.
    Metric("balanced_accuracy", "balanced accuracy", from_counts=lambda hits, true, _: _mean_share(hits, true)),
    # Mean F1 of the classes present or predicted.
    Metric("macro_f1", "macro F1", from_counts=lambda hits, true, predicted: _mean_share(2 * hits, true + predicted)),
    Metric("macro_auc", "macro AUC", from_logits=macro_auc),
    Metric("mcc", "Matthews correlation", from_counts=_matthews, on_request=True),
    Metric("cohen_kappa", "Cohen's kappa", from_counts=_kappa, on_request=True),
    Metric("calibration_error", "calibration error", "minimize", from_logits=calibration_error, on_request=True),
    # For classes that are grades: how many grades a prediction is off, and agreement weighted by that.
    Metric("class_error", "mean class error", "minimize", from_logits=_class_error, unit="classes", on_request=True),
    Metric("quadratic_kappa", "quadratic weighted kappa", from_logits=_quadratic_kappa, on_request=True),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ENTRIES}


@dataclass(frozen=True)
class Family:
    """Metrics with a parameter. form shows how they are written; pattern has the groups number and class, or one.

    make(number, class number, classes) gives function and label of one; a class is -1 where none is named.
    """

    form: str
    pattern: re.Pattern[str]
    make: Callable[[str, int, int], dict[str, Any]]


def _top(number: str, _place: int, classes: int) -> dict[str, Any]:
    count = int(number)
    if count >= classes:
        raise ValueError(f"is 1 for every prediction of {classes} classes. Take a number below that")
    return {"from_logits": partial(_top_accuracy, count=count)}


def _sensitivity(number: str, place: int, classes: int) -> dict[str, Any]:
    if place < 0 and classes != 2:
        raise ValueError(f"needs its positive class, of {classes}. Add it: sensitivity_at_specificity_{number}[CLASS]")
    return {"from_logits": partial(sensitivity_at, positive=max(place, -1) % classes, specificity=int(number) / 100)}


def _recall(_number: str, place: int, _classes: int) -> dict[str, Any]:
    return {"from_counts": lambda hits, true, _: _ratio(hits[..., place], true[..., place])}


def _precision(_number: str, place: int, _classes: int) -> dict[str, Any]:
    return {"from_counts": lambda hits, _, predicted: _ratio(hits[..., place], predicted[..., place])}


def _f1(_number: str, place: int, _classes: int) -> dict[str, Any]:
    return {
        "from_counts": lambda hits, true, predicted: _ratio(
            2 * hits[..., place], true[..., place] + predicted[..., place]
        )
    }


_CLASS = r"\[(?P<class>[^\[\]]+)\]"
FAMILIES = (
    Family("top_K_accuracy", re.compile(r"top_(?P<number>[2-9]|[1-9][0-9]+)_accuracy"), _top),
    Family("recall[CLASS]", re.compile(rf"recall{_CLASS}"), _recall),
    Family("precision[CLASS]", re.compile(rf"precision{_CLASS}"), _precision),
    Family("f1[CLASS]", re.compile(rf"f1{_CLASS}"), _f1),
    Family(
        "sensitivity_at_specificity_PERCENT[CLASS]",
        re.compile(rf"sensitivity_at_specificity_(?P<number>[1-9][0-9]?)(?:{_CLASS})?"),
        _sensitivity,
    ),
)
_OWN = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
FORMS = tuple(family.form for family in FAMILIES)


def find_metric(name: str, class_names: Sequence[str] | None = None) -> Metric | None:
    """The metric of this name, without a part such as valid_; None where there is none.

    Without class_names one with a parameter has its label and direction only, and so has a function of the user's own,
    which hpo.spec.own_code loads. Raises SpecError where it does not fit the classes.
    """
    if name in METRICS:
        return METRICS[name]
    if _OWN.fullmatch(name):
        return Metric(name, name, on_request=True)
    for family in FAMILIES:
        if match := family.pattern.fullmatch(name):
            found = match.groupdict()
            named = found.get("class")
            label = _label(name.partition("[")[0]) + (f" of {named}" if named else "")
            if class_names is None:
                return Metric(name, label, on_request=True)
            if named is not None and named not in class_names:
                raise SpecError(
                    f"score {name}: there is no class {named!r}.", f"Name one of: {', '.join(class_names)}."
                )
            place = class_names.index(named) if named is not None else -1
            try:
                return Metric(
                    name, label, **family.make(found.get("number") or "", place, len(class_names)), on_request=True
                )
            except ValueError as why:
                text, _, hint = str(why).partition(". ")
                raise SpecError(f"score {name}: {text}.", f"{hint}.") from None
    return None


def _label(name: str) -> str:
    words = re.sub(r"^top_(\d+)", r"top-\1", name).replace("specificity_", "specificity 0.").split("_")
    return " ".join("F1" if word == "f1" else word for word in words)


def counted() -> dict[str, FromCounts]:
    """The metrics that are always computed, from counts, so that they can be resampled: name -> function."""
    every = [metric for metric in METRICS.values() if not metric.on_request]
    return {metric.name: metric.from_counts for metric in every if metric.from_counts is not None}


def name_of(score: str) -> str:
    """A score's name without its part: valid_macro_f1 -> macro_f1."""
    part, _, name = score.partition("_")
    return name if part in _PARTS else score


def metric_of(score: str) -> Metric | None:
    """The metric of a score such as valid_macro_f1, test_macro_f1 or macro_f1; None for other names."""
    return find_metric(name_of(score))


def direction_of(score: str) -> Direction:
    """The direction in which a score improves; costs, such as parameters and latency_ms, are minimized."""
    metric = metric_of(score)
    return metric.direction if metric else "minimize"


def highest_of(score: str) -> float:
    """The largest possible value of a score: 1 for those that are maximized, inf for costs and functions of users."""
    metric = metric_of(score)
    return 1.0 if metric is not None and metric.direction == "maximize" and ":" not in metric.name else float("inf")


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


def scores(logits: Tensor, labels: Tensor, *, further: Sequence[Metric] = ()) -> dict[str, float]:
    """Every metric of METRICS that needs no request, then further ones, by name. One transfer from the device.

    logits are (n, classes) float, labels (n,) int64, or (n, classes) of 0 and 1 where an image has several: then an
    answer is each label with a probability above 1/2, accuracy and balanced accuracy are means over labels (MedMNIST's
    ACC), and the loss is binary cross-entropy, its mean over labels.
    """
    import torch

    logits = logits.float()
    if labels.ndim == 2:
        return _label_scores(logits, labels, further)
    counts = confusion_matrix(logits.argmax(1), labels, logits.shape[1]).double()
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    wanted = [*(metric for metric in METRICS.values() if not metric.on_request), *further]
    values = [
        metric.from_counts(hits, true, predicted) if metric.from_counts else metric.from_logits(logits, labels)  # type: ignore[misc]  # one of the two
        for metric in wanted
    ]
    names = [metric.name for metric in wanted]
    return dict(zip(names, torch.stack([value.double() for value in values]).tolist(), strict=True))


def _label_scores(logits: Tensor, labels: Tensor, further: Sequence[Metric]) -> dict[str, float]:
    import torch
    from torch.nn import functional

    answers, truth = logits > 0, labels > 0
    hits, true, predicted = ((part.sum(0)).double() for part in (answers & truth, truth, answers))
    absent = len(labels) - true
    rejected = len(labels) - true - predicted + hits
    found = {
        "loss": functional.binary_cross_entropy_with_logits(logits, labels.float()),
        "accuracy": (answers == truth).double().mean(),
        "balanced_accuracy": (_mean_share(hits, true) + _mean_share(rejected, absent)) / 2,
        "macro_f1": _mean_share(2 * hits, true + predicted),
        "macro_auc": _mean_area(logits.double().sigmoid(), truth.t()),
    }
    for metric in further:
        if metric.from_counts is not None:
            found[metric.name] = metric.from_counts(hits, true, predicted)
        elif metric.from_logits is not None:
            found[metric.name] = metric.from_logits(logits, labels)
    return dict(zip(found, torch.stack([value.double() for value in found.values()]).tolist(), strict=True))
