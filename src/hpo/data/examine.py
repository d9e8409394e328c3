"""One look at every image of a data set before it is used: equal, constant, dark and contradicting images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.duplicates import hashes
from hpo.data.image_rows import Images
from hpo.data.ranges import Ranges, describe
from hpo.errors import DataError

_DARK = 16  # of 256 levels: an image whose brightest pixel is below lies in the lowest sixteenth of its range
_NARROW = 64  # levels that the middle 99.8 % of all pixels should span
_RANGE_HINT = "--set data.range=[LOW,HIGH]"


@dataclass(frozen=True)
class Look:
    """What was seen of the images of one part: digest of pixels (n,) 16 bytes, hash (n,), lowest and highest level."""

    digests: NDArray[Any]
    codes: NDArray[np.uint64]
    low: NDArray[np.uint8]
    high: NDArray[np.uint8]
    histogram: NDArray[np.int64]


def look_at(images: Images) -> Look:
    """Read all images once."""
    digests, codes, low, high = [], [], [], []
    histogram = np.zeros(256, np.int64)
    for chunk in images.chunks():
        digests += [blake2b(image.tobytes(), digest_size=16).digest() for image in chunk]
        codes.append(hashes(chunk))
        flat = chunk.reshape(len(chunk), -1)
        low.append(flat.min(axis=1))
        high.append(flat.max(axis=1))
        histogram += np.bincount(chunk.reshape(-1), minlength=256)
    # As whole numbers of 128 bits would be: two columns of 64, viewed as one field.
    keys = np.frombuffer(b"".join(digests), dtype="V16")
    return Look(keys, np.concatenate(codes), np.concatenate(low), np.concatenate(high), histogram)


def judge(looks: Mapping[str, Look], labels: Mapping[str, NDArray[np.int64]], ranges: Ranges, origin: str) -> list[str]:
    """Warnings about images that can hardly be meant. Raises DataError for a data set that cannot be learnt from."""
    low, high = (np.concatenate([getattr(look, name) for look in looks.values()]) for name in ("low", "high"))
    digests = np.concatenate([look.digests for look in looks.values()])
    classes = np.concatenate([labels[part] for part in looks])
    total = len(low)
    limits = describe(ranges) or "uint8 0 to 255"
    constant, dark = int((low == high).sum()), int((high < _DARK).sum())
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    if len(first) == 1:
        raise DataError(
            f"{origin}: all {total:,} images are equal, with levels from {low[0]} to {high[0]} (range of pixels: "
            f"{limits}).",
            f"Check how they were written, or declare the range of their pixels: {_RANGE_HINT}",
        )
    if constant == total:
        raise DataError(
            f"{origin}: all {total:,} images are constant, each of one level only (range of pixels: {limits}).",
            f"Check how they were written, or declare the range of their pixels: {_RANGE_HINT}",
        )
    different = _contradicting(inverse.reshape(-1), classes)
    if different > total // 2:
        raise DataError(
            f"{origin}: {different:,} of {total:,} images have the same pixels as an image of another class "
            f"(range of pixels: {limits}).",
            f"Check labels and images, or declare the range of the pixels: {_RANGE_HINT}",
        )
    warnings = []
    if constant:
        warnings.append(f"{constant:,} of {total:,} images are constant: every pixel of an image is the same")
    if different:
        warnings.append(f"{different:,} of {total:,} images have the same pixels as an image of another class")
    if dark > constant and dark >= max(1, total // 100):
        warnings.append(
            f"{dark:,} of {total:,} images have no pixel above the lowest sixteenth of the range ({limits}): are there "
            f"two scales, or is the range wrong? {_RANGE_HINT}"
        )
    for part, look in looks.items():
        bottom, top = _middle(look.histogram)
        if top - bottom < _NARROW:
            warnings.append(
                f"{part}: nearly all pixels are between the levels {bottom} and {top} of 0 to 255 (range of pixels: "
                f"{limits}); a range that fits better keeps more of the image: {_RANGE_HINT}"
            )
    return warnings


def _contradicting(copies: NDArray[np.int64], classes: NDArray[np.int64]) -> int:
    """Images whose pixels also occur with another class."""
    pairs = np.unique(np.stack([copies, classes]), axis=1)
    groups, counts = np.unique(pairs[0], return_counts=True)
    return int(np.isin(copies, groups[counts > 1]).sum())


def _middle(histogram: NDArray[np.int64]) -> tuple[int, int]:
    """The levels that bound the middle 99.8 % of the pixels."""
    shares = np.cumsum(histogram) / max(1, histogram.sum())
    return int(np.searchsorted(shares, 0.001)), int(np.searchsorted(shares, 0.999))
