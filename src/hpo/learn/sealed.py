"""Open the sealed test part; only promotion may call this, for a search that looks is no longer measured by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpo.learn.data import load_tensor
from hpo.records import DataCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def open_test(card: DataCard, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Test images (n, height, width, channels) uint8 and labels (n,) int64 on the device. Raises DataError."""
    folder = Path(card.test_folder)
    return load_tensor(folder / "test_images.npy", device), load_tensor(folder / "test_labels.npy", device)


def evaluate_test(card: DataCard, predict: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """Test scores (test_loss, test_accuracy, ...; see metrics.scores) of a model.

    predict maps images (n, height, width, channels) uint8 to probabilities (n, classes), as a logged model does.
    """
    import torch

    from hpo.learn.metrics import scores

    images, labels = open_test(card, device=torch.device("cpu"))
    probabilities = torch.tensor(predict(images.numpy()), dtype=torch.float64)
    # The logarithm of probabilities is a set of logits for them.
    measured = scores(probabilities.clamp(min=1e-12).log(), labels)
    return {f"test_{name}": value for name, value in measured.items()}
