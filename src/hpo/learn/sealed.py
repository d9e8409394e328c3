"""The only door to the sealed test part: a search that looks at it is no longer measured by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpo.errors import DataError
from hpo.learn.data import load_tensor
from hpo.learn.duplicates import Digests, copies, found_in, pixel_digests
from hpo.records import DataCard

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def open_test(card: DataCard, *, device: torch.device) -> tuple[Tensor, Tensor]:
    """Test images (n, height, width, channels) uint8 and labels (n,) int64 on the device. Raises DataError.

    Only promotion and comparison may call this, and they write each opening down.
    """
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


def duplicates_of_test(card: DataCard, seen: Mapping[str, Digests]) -> dict[str, int]:
    """How many test images repeat an earlier test image ("test"), and how many occur in each part that was seen.

    seen maps a part's name to the pixel_digests of its images. Only these numbers leave: no pixel, no label and no
    digest of a test image, so nobody learns which image it is. This is no opening: it measures no model. Raises
    DataError.
    """
    path = Path(card.test_folder) / "test_images.npy"
    try:
        digests = pixel_digests(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: the prepared data cannot be read: {error}.", "Run again: it is prepared anew."
        ) from None
    return {"test": copies(digests), **{part: found_in(digests, others) for part, others in seen.items()}}
