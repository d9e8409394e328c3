"""The metrics that a study requests beyond those that are always computed, functions of the user's own among them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from hpo.data.dotted_path import load_function
from hpo.errors import SpecError, TrainingError
from hpo.metrics import Metric, find_metric, name_of

if TYPE_CHECKING:
    from torch import Tensor


_OF_LABELS = ("recall[", "precision[", "f1[")  # also where an image has several labels


def requested(scores: Iterable[str], class_names: Sequence[str], *, several: bool = False) -> tuple[Metric, ...]:
    """The metrics among scores (valid_mcc, ...) that are not computed anyway. several: of images with several labels.

    Raises SpecError where one does not fit the classes, or where the function of one is not found.
    """
    found: dict[str, Metric] = {}
    for score in scores:
        metric = find_metric(name_of(score), class_names)
        if metric is not None and metric.on_request:
            if several and ":" not in metric.name and not metric.name.startswith(_OF_LABELS):
                raise SpecError(
                    f"score {metric.name}: not defined for images with several labels.",
                    "Take recall[LABEL], precision[LABEL], f1[LABEL], a function of your own, or a usual score.",
                )
            own = metric.from_counts is None and metric.from_logits is None
            found[metric.name] = _with_function(metric) if own else metric
    return tuple(found.values())


def _with_function(metric: Metric) -> Metric:
    load_function(metric.name, what="score")
    return replace(metric, from_logits=partial(own_score, name=metric.name))


def own_score(logits: Tensor, labels: Tensor, *, name: str) -> Tensor:
    """The answer of package.module:function to (probabilities (n, classes), labels), NumPy arrays; higher is better.

    Raises TrainingError where it fails or answers no number.
    """
    import torch

    function = load_function(name, what="score")
    probabilities = logits.double().sigmoid() if labels.ndim == 2 else logits.double().softmax(1)
    try:
        value = float(function(probabilities.cpu().numpy(), labels.cpu().numpy()))
    except Exception as error:
        raise TrainingError(
            f"score {name}: the function fails: {type(error).__name__}: {error}.",
            f"Call it with probabilities of shape {tuple(probabilities.shape)} and labels {tuple(labels.shape)}.",
        ) from error
    return torch.tensor(value, dtype=torch.float64, device=logits.device)
