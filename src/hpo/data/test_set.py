"""The only door to the sealed test part: a search that looks at it is no longer measured by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.duplicates import Digests, copies, count_across, found_in, pixel_digests
from hpo.data.sources import scores_of
from hpo.errors import DataError
from hpo.records import DataCard
from hpo.spec.own_code import requested


@dataclass(frozen=True)
class Measured:
    """What a model says of the test part: images (n, height, width, channels) uint8, labels (n,) int64, probabilities.

    scores holds test_loss, test_accuracy, ...; see hpo.metrics.scores. probabilities are (n, classes).
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.floating]
    scores: Mapping[str, float]


def open_test(
    card: DataCard, predict: Callable[[NDArray[np.uint8]], NDArray[np.floating]], *, further: Sequence[str] = ()
) -> Measured:
    """Open the test part and measure a model on it, further scores (valid_mcc, ...) included. Raises DataError.

    predict maps images to probabilities, as a logged model does. Only hpo.jobs.shared.test_set_access may call this:
    it writes each opening down before the first byte is read.
    """
    import torch

    from hpo.metrics import scores

    # What does not fit the classes is refused before the part is opened.
    names = [*scores_of(card.name), *further]
    wanted = requested(names, card.class_names, several=card.several_labels)
    images, labels = _read(card, "test_images.npy"), _read(card, "test_labels.npy")
    probabilities = predict(images)
    # The logarithm of probabilities is a set of logits for them.
    chances = torch.tensor(probabilities, dtype=torch.float64)
    logits = torch.logit(chances, eps=1e-12) if labels.ndim == 2 else chances.clamp(min=1e-12).log()
    measured = scores(logits, torch.tensor(labels), further=wanted)
    return Measured(images, labels, probabilities, {f"test_{name}": value for name, value in measured.items()})


def count_classes(card: DataCard, count: Callable[[NDArray[Any], int], NDArray[np.int64]]) -> NDArray[np.int64]:
    """The number of test images of each class, (classes,), by split.class_counts. No opening: it measures no model."""
    return count(_read(card, "test_labels.npy"), len(card.class_names))


def duplicates_of_test(card: DataCard, seen: Mapping[str, Digests]) -> dict[str, int]:
    """How many test images repeat an earlier test image ("test"), and how many occur in each part that was seen.

    seen maps a part's name to the pixel_digests of its images. Only these numbers leave: no pixel, no label and no
    digest of a test image, so nobody learns which image it is. This is no opening: it measures no model. Raises
    DataError.
    """
    digests = pixel_digests(_read(card, "test_images.npy"))
    return {"test": copies(digests), **{part: found_in(digests, others) for part, others in seen.items()}}


def digests_of_test(card: DataCard) -> list[bytes]:
    """The pixel digests of the test images, sorted, which hides their rows. This is no opening: it measures no model.

    For the ledger only, which knows by them what was opened. Raises DataError.
    """
    return sorted(pixel_digests(_read(card, "test_images.npy")))


def ledger_folder(card: DataCard) -> Path:
    """The folder of the ledger in the data cache that holds the test part. Removing prepared data leaves it."""
    return Path(card.test_folder).parents[2] / "openings"


def near_duplicates_of_test(card: DataCard, seen: Mapping[str, NDArray[np.int64]]) -> dict[str, int]:
    """How many test images look nearly like one of each part that was seen, by the clusters of its images.

    Only these numbers leave. This is no opening: it measures no model. Raises DataError.
    """
    near = _read(card, "test_near.npy")
    return {part: count_across(clusters, near) for part, clusters in seen.items()}


def _read(card: DataCard, name: str) -> NDArray[Any]:
    if not card.test_folder:
        raise DataError("a trial asked for the test part, which is sealed.", "Measure a model: hpo evaluate MODEL")
    path = Path(card.test_folder) / name
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: the prepared data cannot be read: {error}.", "Run again: it is prepared again."
        ) from None
    return array
