"""Duplicates among images, exact and near, and one look at each image before use: constant, dark, contradicting."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.pixels import Images, Ranges, describe
from hpo.errors import DataError
from hpo.records import DataCard

_MOST_SHARED = 0.01  # of a part: published data sets hold a few copies

Digests = Sequence[bytes]


def pixel_digests(images: NDArray[Any]) -> list[bytes]:
    """Images (n, height, width, channels) uint8 -> 16 bytes for each; two are equal where all pixels are."""
    return [blake2b(image.tobytes(), digest_size=16).digest() for image in images]


def copies(digests: Digests) -> int:
    """How many images repeat an earlier one."""
    return len(digests) - len(set(digests))


def found_in(digests: Digests, others: Collection[bytes]) -> int:
    """How many images also occur among the others."""
    known = frozenset(others)
    return sum(digest in known for digest in digests)


def contradictions(digests: Digests, labels: Sequence[int]) -> list[list[int]]:
    """Rows of each group of images with the same pixels and more than one label, in the order of the rows."""
    groups: dict[bytes, list[int]] = {}
    for row, digest in enumerate(digests):
        groups.setdefault(digest, []).append(row)
    return [rows for rows in groups.values() if len({labels[row] for row in rows}) > 1]


_ROWS, _COLUMNS = 8, 9
_MOST_BITS = 16  # of 64 that two hashes may differ in; saved again, flat parts of a photo lose many
_BANDS, _STEP = 16, 4  # windows of 8 bits, each four bits on: pairs are looked for where one is equal
_BUCKET = 512  # of a fuller one, only neighbours in the order of the hashes are compared
_NEIGHBOURS = 64
_LEAST_CORRELATION = 0.99
_MOST_RMS = 8.0  # levels, after the difference in brightness is taken away
_PAIRS, _MOST_PAIRS = (
    4096,
    500_000,
)  # verified at once, and in all: with more pairs than this, the number is a lower bound

Pixels = Callable[[NDArray[np.int64]], NDArray[np.uint8]]


def hashes(images: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Images (n, height, width, channels) uint8 -> their difference hashes, (n,)."""
    grey = images.astype(np.float32).mean(axis=3) if images.shape[3] > 1 else images[..., 0].astype(np.float32)
    patches = _averages(grey.shape[1], _ROWS) @ grey @ _averages(grey.shape[2], _COLUMNS).T
    bits = (patches[:, :, 1:] > patches[:, :, :-1]).reshape(len(images), -1)
    found: NDArray[np.uint64] = np.packbits(bits, axis=1).view(">u8").reshape(-1).astype(np.uint64)
    return found


def _averages(length: int, pieces: int) -> NDArray[np.float32]:
    """(pieces, length): each row averages its share of a line of pixels, parts of pixels included."""
    edges = np.linspace(0, length, pieces + 1)
    starts, ends = edges[:-1, None], edges[1:, None]
    pixels = np.arange(length)
    overlap = np.clip(np.minimum(ends, pixels + 1) - np.maximum(starts, pixels), 0, None)
    weights: NDArray[np.float32] = (overlap / overlap.sum(axis=1, keepdims=True)).astype(np.float32)
    return weights


def clusters(codes: NDArray[np.uint64], digests: NDArray[Any], pixels: Pixels) -> NDArray[np.int64]:
    """The cluster of each image, (n,): images that look alike, directly or by others, have one number.

    codes are hashes (n,); digests (n,) are equal where all pixels are; pixels(rows) gives images. A cluster is numbered
    by its first row, so an image like no other has its own row.
    """
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    root = first[inverse.reshape(-1)].astype(np.int64)  # equal images: the first of them
    rows = np.sort(first).astype(np.int64)
    parent = {int(row): int(row) for row in rows}

    def top(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for left, right in candidates(codes[rows]):
        alike = _alike(pixels, rows[left], rows[right])
        for one, other in zip(rows[left][alike].tolist(), rows[right][alike].tolist(), strict=True):
            low, high = sorted((top(one), top(other)))
            parent[high] = low
    return np.array([top(row) for row in root.tolist()], np.int64)


def candidates(codes: NDArray[np.uint64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of rows whose hashes differ in few bits, in pieces: a quarter of a million at most."""
    crowded: list[NDArray[np.bool_]] = []  # of each band so far: which of the 256 buckets were too full
    found = 0
    for band in range(_BANDS):
        turned = _turned(codes, band)
        order = np.argsort(turned, kind="stable").astype(np.int64)
        sizes = np.bincount((turned >> np.uint64(56)).astype(np.int64), minlength=256)
        for start, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
            reach = int(size) if size <= _BUCKET else _NEIGHBOURS
            for left, right in _near_in(order[start : start + size], reach):
                near = _close(codes, left, right, crowded)
                for piece in range(0, len(near), _PAIRS):
                    rows = near[piece : piece + _PAIRS]
                    yield left[rows], right[rows]
                found += len(near)
                if found > _MOST_PAIRS:
                    return
        crowded.append(sizes > _BUCKET)


def _near_in(members: NDArray[np.int64], reach: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs of members at most `reach` places apart, in pieces."""
    pending: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    held = 0
    for step in range(1, min(reach + 1, len(members))):
        pending.append((members[:-step], members[step:]))
        held += len(members) - step
        if held > 1_000_000:
            yield np.concatenate([left for left, _ in pending]), np.concatenate([right for _, right in pending])
            pending, held = [], 0
    if pending:
        yield np.concatenate([left for left, _ in pending]), np.concatenate([right for _, right in pending])


def _close(
    codes: NDArray[np.uint64], left: NDArray[np.int64], right: NDArray[np.int64], crowded: list[NDArray[np.bool_]]
) -> NDArray[np.int64]:
    """Which of the pairs have like hashes and were not among the pairs of an earlier band."""
    different = codes[left] ^ codes[right]
    near = np.flatnonzero(np.bitwise_count(different) <= _MOST_BITS)
    for band, full in enumerate(crowded):
        apart = _turned(different[near], band) >> np.uint64(56) != 0
        near = near[apart | full[(_turned(codes[left[near]], band) >> np.uint64(56)).astype(np.int64)]]
    return near


def _turned(codes: NDArray[np.uint64], band: int) -> NDArray[np.uint64]:
    """The hashes with the window of a band in their upper eight bits."""
    by = _STEP * band
    return (codes << np.uint64(by)) | (codes >> np.uint64(64 - by)) if by else codes


def _alike(pixels: Pixels, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pairs of images agree pixel by pixel, but for brightness, contrast and small differences."""
    rows, places = np.unique(np.concatenate([left, right]), return_inverse=True)
    alike = np.zeros(len(left), np.bool_)
    levels = pixels(rows)
    down, across = (max(1, side // 32) for side in levels.shape[1:3])
    levels = levels[:, ::down, ::across]  # enough to tell images apart
    one, other = places.reshape(-1)[: len(left)], places.reshape(-1)[len(left) :]
    step = max(1, (1 << 22) // max(1, levels[0].size))
    for start in range(0, len(left), step):
        part = slice(start, start + step)
        first, second = (levels[each[part]].reshape(len(each[part]), -1).astype(np.float32) for each in (one, other))
        first -= first.mean(axis=1, keepdims=True)
        second -= second.mean(axis=1, keepdims=True)
        rms = np.sqrt(((first - second) ** 2).mean(axis=1))
        norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
        correlation = (first * second).sum(axis=1) / np.maximum(norms, 1e-6)
        alike[part] = (correlation >= _LEAST_CORRELATION) | (rms <= _MOST_RMS)
    return alike


def count_across(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many images of the second part, by their clusters, look nearly like one of the first."""
    return int(np.isin(second, first).sum())


def shared_images(digests: Mapping[str, Digests]) -> tuple[str, ...]:
    """Which parts share more than one in a hundred of their images, with counts, in words.

    digests maps train, valid and test to the pixel_digests of their images.
    """
    found = []
    for first, second in combinations(digests, 2):
        count, size = found_in(digests[second], digests[first]), len(digests[second])
        if count > _MOST_SHARED * size:
            found.append(f"{count} of the {size} {second} images are {first} images too")
    return tuple(found)


def refuse_shared(card: DataCard) -> None:
    """Refuse data of the user's own whose parts share images. Raises DataError with the counts.

    What a model has seen in training says nothing of how it does on new images, and a test part that chose the model is
    none.
    """
    if card.shared:
        raise DataError(
            f"{card.source}: {'; '.join(card.shared)}, pixel for pixel.",
            "Remove them from one of the parts. Or leave a part out: its images are then drawn from the others.",
        )


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
        digests += pixel_digests(chunk)
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
