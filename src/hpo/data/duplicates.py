"""Exact duplicates among images, found by a digest of their pixels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from hashlib import blake2b
from itertools import combinations
from typing import Any

from numpy.typing import NDArray

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
