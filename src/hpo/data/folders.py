"""Image files of the user's own, by folders or by a table, read one by one into a file of levels."""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.cache import Progress
from hpo.data.image_files import AnyFile, Header, NotAnImageError, read_header, read_picture, read_values, unreadable
from hpo.data.layouts import (
    IMAGE_ENDINGS,
    PART_NAMES,
    Found,
    Labelled,
    Listing,
    doubtful,
    first_ten,
    label_by_folders,
    list_files,
    matched,
)
from hpo.data.pixels import Extent, ImageFile, Images, Ranges, extent_of, ranges_of
from hpo.data.tables import Columns, label_by_table, metadata_files, read_table, unread_table
from hpo.errors import DataError
from hpo.spec.study import DataSpec

Pair = tuple[Any, NDArray[Any]]
"""Images, an array or Images, and their labels, as found: not checked yet."""

_PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Asked:
    """What a study asks of the reader of its data.

    group names what must not be divided: a column, a key, or a pattern on paths. scratch is an empty folder for what
    does not fit into memory; progress hears of bytes read.
    """

    data: DataSpec
    group: str | None
    scratch: Path
    progress: Progress

    @property
    def size(self) -> int | None:
        """The side of the images in pixels."""
        return self.data.size


@dataclass(frozen=True)
class Parts:
    """What a source holds: train always, valid and test where it has them.

    class_names is empty where the source names none. verified: the reader itself compared published checksums. groups
    maps a part to the name of each image's group (n,), where the study asks for groups. files counts files as
    DataCard.files does. ranges are those of the files' pixels, where files were read one by one.
    """

    pairs: Mapping[str, Pair]
    class_names: tuple[str, ...] = ()
    verified: bool = False
    groups: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    ranges: Ranges | None = None
    warnings: tuple[str, ...] = ()


def read_folder(place: AnyFile, asked: Asked) -> Parts:
    """One folder a class, or train, valid and test folders of those, or a Hugging Face image folder with metadata.

    Classes are ordered by name. Images are grey if all are, else RGB, and resized to a square if a size is asked for.
    """
    if not place.is_dir():
        raise DataError(f"{place}: not a folder.", "Name one that holds a folder of images for each class.")
    listing = list_files(place)
    tables = metadata_files(listing)
    if isinstance(place, Path) and tables and (labelled := _by_metadata(place, tables, listing, asked)):
        named = {item.path for item in labelled}
        headers = _headers(listing, asked, wanted=named)
        return _read(labelled, headers, listing, place, asked, [])
    headers = _headers(listing, asked)
    images = [item for item in listing.files if item.path in headers]
    labelled = label_by_folders(listing, place=place, label=asked.data.label, images=images)
    warnings = []
    if isinstance(place, Path) and asked.data.label is None:
        warnings = [*unread_table(listing, labelled, place), *doubtful(labelled)]
    return _read(_with_groups(labelled, asked.group), headers, listing, place, asked, warnings)


def _by_metadata(place: Path, tables: Sequence[Found], listing: Listing, asked: Asked) -> list[Labelled]:
    """The images that metadata.csv and the like label; empty where they have no column of labels, only remarks."""
    columns = Columns(asked.data.image, asked.data.label, asked.data.group or asked.group, asked.data.part)
    labelled: list[Labelled] = []
    for item in tables:
        table = read_table(place / item.path)
        if not {columns.image or "file_name", columns.label or "label"} <= table.keys():
            return []
        stem = item.path.parent
        below = [file for file in listing.files if stem == PurePosixPath() or file.path.parts[0] == stem.name]
        found, unlabelled = label_by_table(table, columns, below, origin=str(place / item.path), stem=str(stem))
        labelled += found
        if stem != PurePosixPath():
            labelled = [replace(each, part=PART_NAMES.get(each.path.parts[0].lower(), "train")) for each in labelled]
        listing.skipped["without a class in the table"] += len(unlabelled)
        listing.files = [file for file in listing.files if file.path not in unlabelled]
    return labelled


def read_labelled_table(place: AnyFile, asked: Asked) -> Parts:
    """Images that a CSV or Parquet file names, anywhere below its folder."""
    if not isinstance(place, Path) or not place.is_file():
        raise DataError(f"{place}: not a table.", "Name a CSV or Parquet file: --set data.path=labels.csv")
    data = asked.data
    if data.group and asked.group and data.group != asked.group:
        raise DataError(
            f"data.group: {data.group}, but split.group: {asked.group}.", "Name one column, in one of the two."
        )
    listing = list_files(place.parent)
    columns = Columns(data.image, data.label, data.group or asked.group, data.part)
    labelled, unlabelled = label_by_table(read_table(place), columns, listing.files, origin=str(place))
    listing.skipped["without a class in the table"] += len(unlabelled)
    listing.files = [file for file in listing.files if file.path not in unlabelled]
    headers = _headers(listing, asked, wanted={item.path for item in labelled})
    return _read(labelled, headers, listing, place.parent, asked, [])


def _headers(
    listing: Listing, asked: Asked, *, wanted: set[PurePosixPath] | None = None
) -> dict[PurePosixPath, Header]:
    """The headers of the files that are images; others are counted as skipped.

    wanted are the files that have to be images; None: those with the ending of one. Raises DataError for the broken.
    """
    headers: dict[PurePosixPath, Header] = {}
    broken: list[str] = []
    for number, item in enumerate(listing.files):
        if number % 256 == 0:
            asked.progress("looking at files", 0, 0)
        due = item.path in wanted if wanted is not None else item.path.suffix.lower() in IMAGE_ENDINGS
        try:
            header = read_header(item.file)
        except NotAnImageError:
            if due:
                broken.append(f"{item.file}: not an image that can be read: its content is of no known format")
            else:
                listing.skipped[f"no image ({item.path.suffix.lower() or 'no ending'})"] += 1
            continue
        except DataError as error:
            broken.append(error.message.rstrip("."))
            continue
        if wanted is not None and not due:
            listing.skipped["not in the table"] += 1
        else:
            headers[item.path] = header
    if broken:
        raise unreadable(broken + _undecodable(item.file for item in listing.files if item.path in headers))
    return headers


def _undecodable(files: Iterable[AnyFile]) -> list[str]:
    """Which files have a header but no image, and why: all faults are reported at once."""
    broken = []
    for file in files:
        try:
            read_picture(file, ranges=None) if read_header(file).kind == "uint8" else read_values(file)
        except DataError as error:
            broken.append(error.message.rstrip("."))
    return broken


def _with_groups(labelled: Sequence[Labelled], pattern: str | None) -> list[Labelled]:
    if not pattern:
        return list(labelled)
    try:
        re.compile(pattern)
    except re.error as error:
        raise DataError(f"split.group: {pattern!r} is no regular expression: {error}.", "Correct it.") from None
    grouped = [replace(item, group=matched(pattern, item.path)) for item in labelled]
    lacking = [str(item.path) for item in grouped if not item.group]
    if lacking:
        raise DataError(
            f"split.group: {pattern!r} finds nothing in {len(lacking):,} of {len(grouped):,} paths: "
            f"{first_ten(lacking)}.",
            "Correct the pattern: its first group, in parentheses, names the patient, slide, plant or video.",
        )
    return grouped


def _read(
    labelled: Sequence[Labelled],
    headers: Mapping[PurePosixPath, Header],
    listing: Listing,
    place: AnyFile,
    asked: Asked,
    warnings: list[str],
) -> Parts:
    ordered = [item for part in _PARTS for item in labelled if item.part == part]
    if not any(item.part == "train" for item in ordered):
        raise DataError(f"{place}: no image of a class is there to train on.", "Name the folder that holds them.")
    of = [headers[item.path] for item in ordered]
    mode = _mode(of, ordered)
    ranges = _ranges(ordered, of, asked, place)
    several = [item for item, header in zip(ordered, of, strict=True) if header.frames > 1]
    if several:
        warnings = [
            *warnings,
            f"{len(several):,} files hold several images, such as {several[0].path}: the first is read",
        ]
    shape = _fill(asked.scratch / "levels", ordered, mode, ranges, asked)
    source = ImageFile(asked.scratch / "levels", (len(ordered), *shape))
    names = sorted({item.label for item in ordered})
    if all(name.isdecimal() for name in names):
        names = sorted(names, key=lambda name: (int(name), name)) if asked.data.name == "table" else names
    code = {name: number for number, name in enumerate(names)}
    pairs, groups = {}, {}
    for part in _PARTS:
        rows = np.array([row for row, item in enumerate(ordered) if item.part == part], np.int64)
        if len(rows):
            labels = np.array([code[ordered[row].label] for row in rows], np.int64)
            pairs[part] = Images(source, rows, {}), labels
            if any(ordered[row].group for row in rows):
                groups[part] = np.array([ordered[row].group for row in rows])
    files = {
        "seen": len(ordered) + sum(listing.skipped.values()),
        "used": len(ordered),
        **sorted_counts(listing.skipped),
    }
    return Parts(pairs, tuple(names), groups=groups, files=files, ranges=ranges, warnings=tuple(warnings))


def sorted_counts(counts: Counter[str]) -> dict[str, int]:
    """The largest count first; none that is zero."""
    return {name: count for name, count in counts.most_common() if count}


def _mode(headers: Sequence[Header], ordered: Sequence[Labelled]) -> str | None:
    """L where every image is grey, else RGB; None for images of 2 or 4 bands that are no colours."""
    bands = {header.bands for header in headers}
    if bands == {0}:
        return "L" if all(header.grey for header in headers) else "RGB"
    if len(bands) > 1:
        first = next(item for item, header in zip(ordered, headers, strict=True) if header.bands)
        raise DataError(
            f"{first.file}: {max(bands)} bands, but other images are grey or RGB.", "Give all images the same bands."
        )
    return None


def _ranges(ordered: Sequence[Labelled], headers: Sequence[Header], asked: Asked, place: AnyFile) -> dict[str, Any]:
    """The range of each kind of pixel; files that are not of 8 bits are read to measure it."""
    extents: dict[str, Extent] = {}
    broken: list[str] = []
    for number, (item, header) in enumerate(zip(ordered, headers, strict=True)):
        if header.kind == "uint8":
            extents.setdefault("uint8", Extent(0.0, 255.0))
            continue
        try:
            values = read_values(item.file)
        except DataError as error:
            broken.append(error.message.rstrip("."))
            continue
        extents[header.kind] = extents.get(header.kind, Extent()) + extent_of(values)
        if number % 64 == 0:
            asked.progress("measuring the range of pixels", 0, 0)
    if broken:
        eight_bit = (item.file for item, header in zip(ordered, headers, strict=True) if header.kind == "uint8")
        raise unreadable(broken + _undecodable(eight_bit))
    return ranges_of(extents, asked.data.range, str(place))


def _fill(path: Path, ordered: Sequence[Labelled], mode: str | None, ranges: Ranges, asked: Asked) -> tuple[int, ...]:
    """Write the levels of all images to a file, one after another; returns (height, width, channels)."""
    size = (asked.size, asked.size) if asked.size else None
    shape: tuple[int, ...] | None = None
    broken: list[str] = []
    odd: list[str] = []
    sizes = [0 if isinstance(item.file, zipfile.Path) else item.file.stat().st_size for item in ordered]
    total, done = sum(sizes), 0
    with path.open("wb") as file:
        for number, item in enumerate(ordered):
            done += sizes[number]
            if number % 64 == 0:
                asked.progress("reading images", done, total)
            try:
                levels = read_picture(item.file, mode=mode, size=size, ranges=ranges)
            except DataError as error:
                broken.append(error.message.rstrip("."))
                continue
            levels = levels.reshape(*levels.shape[:2], -1)
            shape = shape or levels.shape
            if levels.shape != shape:
                odd.append(f"{item.file}: {_size(levels.shape)} pixels")
            elif not broken and not odd:
                levels.tofile(file)
    if broken:
        raise unreadable(broken)
    if odd or shape is None:
        more = f" And {len(odd) - 1:,} more images differ." if len(odd) > 1 else ""
        raise DataError(
            f"{odd[0] if odd else path}, but the first image is {_size(shape or (0, 0))}.{more}",
            "Have all resized: --set data.size=64",
        )
    asked.progress("reading images", total, total)
    return shape


def _size(shape: Sequence[int]) -> str:
    return f"{shape[1]}x{shape[0]}"
