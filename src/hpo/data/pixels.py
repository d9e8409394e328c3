"""Pixel values: their range, measured or declared, as levels 0 to 255; and images read piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.errors import DataError

Range = tuple[float, float]
Ranges = Mapping[str, Range]

EIGHT_BIT: Ranges = {"uint8": (0.0, 255.0)}
# Today's scaling of data sets older than measured ranges; it adds nothing to a digest.
_PLAIN: Ranges = {**EIGHT_BIT, "uint16": (0.0, 65535.0), "int32": (0.0, 65535.0)}
_DEPTHS = (8, 10, 12, 14, 16)
_DECLARE = "Declare what is black and what is white: --set data.range=[LOW,HIGH]"


@dataclass(frozen=True)
class Extent:
    """Lowest and highest finite value seen, the number of other values, and the number of arrays that hold such."""

    low: float = float("inf")
    high: float = float("-inf")
    not_finite: int = 0
    holders: int = 0

    def __add__(self, other: Extent) -> Extent:
        return Extent(
            min(self.low, other.low),
            max(self.high, other.high),
            self.not_finite + other.not_finite,
            self.holders + other.holders,
        )


def extent_of(values: NDArray[Any]) -> Extent:
    """The extent of one array of numbers."""
    if values.dtype.kind == "f":
        finite = np.isfinite(values)
        lacking = values.size - int(finite.sum())
        if lacking:
            values = values[finite]
        if not values.size:
            return Extent(not_finite=lacking, holders=int(lacking > 0))
        return Extent(float(values.min()), float(values.max()), lacking, int(lacking > 0))
    return Extent(float(values.min()), float(values.max())) if values.size else Extent()


def kind_of(dtype: np.dtype[Any]) -> str:
    """The kind of pixel of a numpy dtype: its name, whatever its byte order."""
    return dtype.newbyteorder("=").name


def nominal(low: float, high: float, kind: str) -> Range:
    """The range that values between low and high most likely use.

    Whole numbers from 0 use the smallest of 8, 10, 12, 14 and 16 bits that holds them; fractions that fill a good part
    of 0 to 1, -1 to 1 or 0 to 255 use that. All else, signed numbers above all, uses what was measured.
    """
    if kind == "bool":
        return 0.0, 1.0
    if not kind.startswith("float"):
        depth = next((bits for bits in _DEPTHS if high < 1 << bits), None) if low >= 0 else None
        return (low, high) if depth is None else (0.0, float((1 << depth) - 1))
    if low >= 0 and 0.25 < high <= 1:
        return 0.0, 1.0
    if -1 <= low < 0 and high <= 1 and max(-low, high) > 0.25:
        return -1.0, 1.0
    if low >= 0 and 200 < high <= 255:
        return 0.0, 255.0
    return low, high


def ranges_of(extents: Mapping[str, Extent], declared: Range | None, origin: str) -> dict[str, Range]:
    """Kind -> range for the kinds of a data set, measured unless declared.

    A declared range beyond 0 to 255 cannot be that of 8-bit pixels, which then keep theirs. Raises DataError for values
    that are not finite, for constant values, and for a declared range that fits nothing.
    """
    lacking = sum(extent.not_finite for extent in extents.values())
    if lacking:
        holders = sum(extent.holders for extent in extents.values())
        raise DataError(
            f"{origin}: {lacking:,} pixel values are NaN or infinite, in {holders:,} images or arrays.",
            "Replace them by numbers, or leave those images out.",
        )
    found: dict[str, Range] = {}
    for kind, extent in sorted(extents.items()):
        if kind == "uint8":
            fits = declared is not None and declared[0] >= 0 and declared[1] <= 255
            found[kind] = declared if fits and declared is not None else (0.0, 255.0)
        else:
            found[kind] = declared or nominal(extent.low, extent.high, kind)
        low, high = found[kind]
        if not low < high:
            raise DataError(f"{origin}: every {kind} pixel is {low:g}.", "Check how the images were written.")
    if declared is not None and declared not in found.values():
        raise DataError(
            f"data.range: {list(declared)} is not a range of 8-bit pixels, and {origin} has no others.",
            "Leave data.range out, or give one inside 0 to 255.",
        )
    for kind, extent in extents.items():
        low, high = found[kind]
        if extent.high < low or extent.low > high:
            raise DataError(
                f"{origin}: {kind} pixels are {extent.low:g} to {extent.high:g}, all outside the range {low:g} to "
                f"{high:g}.",
                _DECLARE,
            )
    return found


def range_for(kind: str, ranges: Ranges) -> Range | None:
    """The range of a kind of pixel: its own, else the only one of its family (fractions, or wide whole numbers)."""
    if kind in ranges:
        return ranges[kind]
    if kind in ("uint8", "bool"):
        return EIGHT_BIT["uint8"] if kind == "uint8" else (0.0, 1.0)
    fractions = kind.startswith("float")
    family = {
        each for name, each in ranges.items() if name not in ("uint8", "bool") and name.startswith("float") == fractions
    }
    return family.pop() if len(family) == 1 else None


def to_levels(values: NDArray[Any], limits: Range) -> NDArray[np.uint8]:
    """Values in their own units -> levels uint8 of the same shape: low is 0, high is 255, what is beyond is cut.

    Rounded to the nearest level, but for whole numbers in 0 to 65535, which are divided by 257 and cut, as ever.
    """
    # The script of logged models (tracking/logged_model_script.py) has the same formula; a test compares them.
    low, high = limits
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values
    if values.dtype.kind in "iu" and (low, high) == (0, 65535):
        return (values.astype(np.int64).clip(0, 65535) // 257).astype(np.uint8)
    scaled = (values.astype(np.float64) - low) * (255.0 / (high - low))
    levels: NDArray[np.uint8] = np.rint(scaled.clip(0.0, 255.0)).astype(np.uint8)
    return levels


def plain(ranges: Ranges) -> bool:
    """True where every range is the one that its kind has always had."""
    return all(_PLAIN.get(kind) == each for kind, each in ranges.items())


def input_kind(ranges: Ranges) -> str:
    """The dtype of arrays in a data set's own values; uint8 levels where it has several kinds."""
    return next(iter(ranges)) if len(ranges) == 1 else "uint8"


def describe(ranges: Ranges) -> str:
    """The ranges in words: "uint16 0 to 4095"."""
    return ", ".join(f"{kind} {low:g} to {high:g}" for kind, (low, high) in ranges.items())


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
