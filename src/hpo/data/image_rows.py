"""Images in memory or in a file, read piece by piece: no data set needs to fit into memory twice, or once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.ranges import Ranges, kind_of, range_for, to_levels

_CHUNK_BYTES = 1 << 22  # what is computed of a piece takes some times that; a request to stop is heard between two


@dataclass(frozen=True)
class ImageFile:
    """Images one after another in a file without a header, (n, height, width, channels) uint8."""

    path: Path
    shape: tuple[int, ...]

    def take(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """A copy of some images, in the order of rows."""
        stride = int(np.prod(self.shape[1:]))
        found = np.empty((len(rows), *self.shape[1:]), np.uint8)
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        with self.path.open("rb") as file:
            for first, last in zip([0, *breaks], [*breaks, len(rows)], strict=True):
                if first < last:
                    file.seek(int(rows[first]) * stride)
                    file.readinto(found[first:last].data)
        return found


@dataclass(frozen=True)
class Images:
    """Rows of a source of images, read as levels: (n, height, width, channels) uint8.

    ranges scale the source's values where they are no levels yet.
    """

    source: NDArray[Any] | ImageFile
    rows: NDArray[np.int64]
    ranges: Ranges

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(n, height, width, channels)."""
        high, wide, *channels = self.source.shape[1:]
        return len(self.rows), high, wide, channels[0] if channels else 1

    def __len__(self) -> int:
        return len(self.rows)

    def pick(self, rows: NDArray[np.int64]) -> Images:
        """Some of these images, by their position here."""
        return Images(self.source, self.rows[rows], self.ranges)

    def levels(self, rows: NDArray[np.int64] | slice) -> NDArray[np.uint8]:
        """Some of these images, by their position here, in memory."""
        wanted = self.rows[rows]
        taken = self.source.take(wanted) if isinstance(self.source, ImageFile) else self.source[wanted]
        limits = range_for(kind_of(taken.dtype), self.ranges)
        levels = taken if limits is None else to_levels(taken, limits)
        return np.ascontiguousarray(levels.reshape(len(wanted), *self.shape[1:]))

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """All of these images in pieces of some megabytes."""
        step = max(1, _CHUNK_BYTES // max(1, int(np.prod(self.shape[1:]))))
        for start in range(0, len(self.rows), step):
            yield self.levels(slice(start, start + step))
