"""The images on which models are judged: a validation part, and which images several parts hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpo.data.duplicates import pixel_digests
from hpo.data.prepare import load_tensor
from hpo.data.split import Rows, rows_of
from hpo.records import DataCard
from hpo.spec.study import SplitSpec

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Part:
    """images (n, height, width, channels) uint8 and labels (n,) int64 of one part."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def validation_part(card: DataCard, split: SplitSpec) -> Part:
    """What a training with this split validates on; folds have no one such part. Raises DataError."""
    folder = Path(card.folder)
    images = load_tensor(folder / "development_images.npy", _CPU).numpy()
    labels = load_tensor(folder / "development_labels.npy", _CPU).numpy()
    _, rows = rows_of(card, split, labels)
    return Part(images[rows], labels[rows])


def rows_unseen(part: Part, card: DataCard, split: SplitSpec) -> Rows:
    """The rows of a part whose images a training on this card with this split has not learnt from. Raises DataError."""
    folder = Path(card.folder)
    images = load_tensor(folder / "development_images.npy", _CPU).numpy()
    labels = load_tensor(folder / "development_labels.npy", _CPU).numpy()
    train, _ = rows_of(card, split, labels)
    learnt = set(pixel_digests(images[train]))
    return np.array([row for row, digest in enumerate(pixel_digests(part.images)) if digest not in learnt], np.int64)


def shared_rows(parts: Sequence[NDArray[Any]]) -> list[Rows]:
    """Images (n_i, ...) of several parts -> the rows, in each, of the images that all hold, in the order of the first.

    Images are the same where their pixels are; one that a part holds twice is matched twice where the others do so too.
    """
    rows = [{key: row for row, key in enumerate(_keys(images))} for images in parts]
    shared = [key for key in rows[0] if all(key in other for other in rows[1:])]
    return [np.array([known[key] for key in shared], dtype=np.int64) for known in rows]


def _keys(images: NDArray[Any]) -> list[tuple[bytes, int]]:
    """A digest of each image's pixels, and how often it came before."""
    seen: Counter[bytes] = Counter()
    keys = []
    for digest in pixel_digests(images):
        keys.append((digest, seen[digest]))
        seen[digest] += 1
    return keys
