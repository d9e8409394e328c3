"""The predictions on the validation part that a trial leaves, and an ensemble made of those of its members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.metrics import confusion_matrix, scores
from hpo.models import save_ensemble
from hpo.records import DataCard, TrialResult, pack_classes
from hpo.spec.own_code import requested
from hpo.spec.study import Setup

VALIDATION = "validation.npz"  # rows, labels, probabilities of the validation part at the best epoch
_SMALLEST = 1e-30


def leave_predictions(
    result: TrialResult, logits: Tensor, labels: Tensor, *, rows: Tensor, folder: Path
) -> TrialResult:
    """Save the validation probabilities; the result with the confusion matrix and the predicted classes.

    logits are (n, classes), labels (n,) or (n, classes), rows (n,) those of the development images.
    """
    several = labels.ndim == 2
    np.savez(
        folder / VALIDATION,
        rows=rows.cpu().numpy(),
        labels=labels.cpu().numpy(),
        probabilities=(logits.sigmoid() if several else logits.softmax(1)).cpu().numpy(),
    )
    if several:  # there is no one predicted class, and so no confusion of two
        return replace(result, folder=str(folder))
    predicted = logits.argmax(1)
    counts = confusion_matrix(predicted, labels, logits.shape[1])
    return replace(
        result,
        folder=str(folder),
        confusion=tuple(tuple(row) for row in counts.tolist()),
        predicted=pack_classes(predicted.tolist()),
    )


def leave_ensemble(
    result: TrialResult,
    members: Sequence[tuple[str, int, Path]],
    *,
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    setup: Setup,
    card: DataCard,
) -> TrialResult:
    """Leave an ensemble in result.folder as a trial leaves its network; the result with its scores.

    members are (trial, how often it counts, folder of its model), the best first; probabilities (n, classes) are the
    mean of theirs on the validation images in these rows. setup names further scores. Raises ModelError.
    """
    names, counts, folders = zip(*members, strict=True)
    save_ensemble(folders, names, counts, Path(result.folder))
    return leave_scored(result, rows=rows, labels=labels, probabilities=probabilities, setup=setup, card=card)


def leave_scored(
    result: TrialResult,
    *,
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float32],
    setup: Setup,
    card: DataCard,
) -> TrialResult:
    """Leave validation probabilities in result.folder; the result with the scores that follow from them."""
    several = labels.ndim == 2
    # A calibration of the ensemble belongs here: fitted to these probabilities and labels, wrapped around its program.
    found = torch.from_numpy(probabilities).double()
    logits = found.clamp_min(_SMALLEST).log() - ((1 - found).clamp_min(_SMALLEST).log() if several else 0)
    further = requested([*setup.training.scores, setup.training.monitor], card.class_names, several=several)
    measured = scores(logits, torch.from_numpy(labels), further=further)
    named = {f"valid_{name}": value for name, value in measured.items()}
    result = replace(result, scores={**named, **result.scores})
    return leave_predictions(
        result, logits.float(), torch.from_numpy(labels), rows=torch.from_numpy(rows), folder=Path(result.folder)
    )
