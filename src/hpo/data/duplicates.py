"""Exact duplicates among images, found by a digest of their pixels."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import blake2b
from typing import Any

from numpy.typing import NDArray

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
