"""A prepared data set as jobs read it, without torch: what it looks like, and the images on which models are judged."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.duplicates import Digests, copies, count_across, found_in, pixel_digests
from hpo.data.split import Rows, rows_of
from hpo.data.test_set import duplicates_of_test, near_duplicates_of_test
from hpo.errors import DataError
from hpo.records import DataCard
from hpo.spec.study import SplitSpec

_CHUNK_ROWS = 4096


def open_development(card: DataCard, split: SplitSpec) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, Rows]]:
    """Images (n, height, width, channels), memory-mapped, their labels (n,), and the rows of train and valid.

    They are the development images: the test part is not among them. Raises DataError where the prepared files are
    gone or the split is impossible.
    """
    folder = Path(card.folder)
    try:
        images = np.load(folder / "development_images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(folder / "development_labels.npy", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder}: the prepared data cannot be read: {error}.", "Run again: it is prepared again."
        ) from None
    train, valid = rows_of(card, split, labels)
    return images, labels, {"train": train, "valid": valid} if len(valid) else {"train": train}


def channel_statistics(images: NDArray[np.uint8], rows: Rows) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the rows, in [0, 1] as pixel / 255."""
    channels = images.shape[3]
    counts = np.zeros((channels, 256), dtype=np.int64)
    for start in range(0, len(rows), _CHUNK_ROWS):
        pixels = images[rows[start : start + _CHUNK_ROWS]].reshape(-1, channels)
        counts += [np.bincount(pixels[:, channel], minlength=256) for channel in range(channels)]
    shares = counts / counts.sum(axis=1, keepdims=True)
    values = np.arange(256) / 255
    mean = shares @ values
    deviation = np.sqrt((shares * (values - mean[:, np.newaxis]) ** 2).sum(axis=1))
    return tuple(mean.tolist()), tuple(deviation.tolist())


def class_text(labels: Any, names: Sequence[str]) -> str:
    """The class of an image from its label, or all labels of an image from their row of 0 and 1."""
    if np.ndim(labels) == 0:
        return names[int(labels)]
    return " and ".join(name for name, label in zip(names, labels, strict=True) if label) or "none"


def _of_class(labels: NDArray[Any], label: int) -> NDArray[np.bool_]:
    chosen: NDArray[np.bool_] = labels[:, label] == 1 if labels.ndim == 2 else labels == label
    return chosen


def sample_rows(labels: NDArray[Any], rows: Rows, *, classes: int, count: int, seed: int) -> list[list[int]]:
    """For each class up to count of the rows, drawn at random without repetition."""
    generator = np.random.default_rng(seed)
    shuffled = generator.permutation(rows)
    return [shuffled[_of_class(labels[shuffled], label)][:count].tolist() for label in range(classes)]


def duplicates(
    card: DataCard, digests: Digests, parts: Mapping[str, Rows]
) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """Images of each part that repeat an earlier one of it; images of a later part that also occur in an earlier one.

    digests are the pixel_digests of the development images, parts the rows of train and valid. The second answer is
    keyed by (earlier, later) of train, valid, test; of the test part only these numbers are ever reported.
    """
    by_part = {part: [digests[row] for row in rows] for part, rows in parts.items()}
    test = duplicates_of_test(card, by_part)
    within = {part: copies(own) for part, own in by_part.items()} | {"test": test["test"]}
    across = {(part, "test"): test[part] for part in by_part}
    if "valid" in by_part:
        across = {("train", "valid"): found_in(by_part["valid"], by_part["train"]), **across}
    return within, across


def development_digests(card: DataCard) -> frozenset[bytes]:
    """The pixel digests of the images that a study on these data trains and chooses on."""
    file = Path(card.folder) / "development_images.npy"
    try:
        return frozenset(pixel_digests(np.load(file, mmap_mode="r", allow_pickle=False)))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: the prepared data cannot be read: {error}.", "Run the study again.") from None


def count_test_images(card: DataCard, seen: Mapping[str, Collection[bytes]]) -> dict[str, int]:
    """How many test images are among each of these sets of digests. Only the numbers leave; this is no opening."""
    names = {f"seen {name}": name for name in seen}  # "test" is a name that duplicates_of_test gives itself
    counts = duplicates_of_test(card, {key: list(seen[name]) for key, name in names.items()})
    return {name: counts[key] for key, name in names.items()}


def near_duplicates(card: DataCard, split: SplitSpec) -> dict[tuple[str, str], int]:
    """Images of a later part that look nearly like one of an earlier part, by (earlier, later); copies count, too.

    Of the test part only these numbers are ever reported. Empty where an older version of hpo prepared the data. Raises
    DataError as open_development does.
    """
    file = Path(card.folder) / "development_near.npy"
    if not file.is_file():
        return {}
    near = np.load(file, allow_pickle=False)
    _, _, parts = open_development(card, split)
    by_part = {part: near[rows] for part, rows in parts.items()}
    across = {(part, "test"): count for part, count in near_duplicates_of_test(card, by_part).items()}
    if "valid" in by_part:
        across = {("train", "valid"): count_across(by_part["train"], by_part["valid"]), **across}
    return across


def near_words(card: DataCard, split: SplitSpec) -> str:
    """near_duplicates in words: "3 of valid in train, 0 of test in train, 1 of test in valid"."""
    across = near_duplicates(card, split)
    counts = ", ".join(f"{count:,} of {later} in {earlier}" for (earlier, later), count in across.items())
    return counts or "not counted: an older version of hpo prepared these data"


def to_png(image: NDArray[np.uint8]) -> bytes:
    """One image (height, width, channels) as a PNG file; of two channels, the first is shown."""
    from PIL import Image

    pixels = np.ascontiguousarray(image if image.shape[2] > 2 else image[:, :, 0])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def to_pngs(images: NDArray[np.uint8], rows: Sequence[int]) -> dict[int, bytes]:
    """Row -> its image as a PNG file."""
    return {row: to_png(images[row]) for row in rows}


@dataclass(frozen=True)
class Part:
    """images (n, height, width, channels) uint8 and labels (n,) int64 of one part."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


def validation_part(card: DataCard, split: SplitSpec) -> Part:
    """What a training with this split validates on; folds have no one such part. Raises DataError."""
    images, labels, rows = open_development(card, split)
    valid = rows.get("valid", np.empty(0, np.int64))
    return Part(images[valid], labels[valid])


def rows_unseen(part: Part, card: DataCard, split: SplitSpec) -> Rows:
    """The rows of a part whose images a training on this card with this split has not learnt from. Raises DataError."""
    images, _, rows = open_development(card, split)
    learnt = set(pixel_digests(images[rows["train"]]))
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
