"""What images of the user's own are, before a study of them is written: kind, columns, sizes, and symmetries."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.image_files import NotAnImageError, read_sides
from hpo.data.layouts import PART_NAMES, list_files
from hpo.data.tables import ENDINGS, IMAGE_COLUMNS, LABEL_COLUMNS, metadata_files, read_table
from hpo.errors import DataError

_FILES = 300  # whose headers are read, spread over the data set
_KEY = r"(s|id|ids|uid|nr|no|num|number|key|code|name)?"
# Coarse ones first: a patient has several lesions. Compared with names without spaces and signs: "Patient ID".
_GROUPS = (
    re.compile(
        rf"(id)?(patient|subject|participant|person|individual|donor|animal){_KEY}|pid|ptid|mrn|patid|subj(id)?"
    ),
    re.compile(rf"(id)?(lesion|slide|plant|video|group|case|specimen){_KEY}"),
)
_LABEL = re.compile(r"(labels?|class(es)?|dx|diagnosis|category|species|target|y)", re.I)
_MOST_ROWS = 1500  # of each side of the comparison of symmetries
_SMALL = 16  # pixels; the side at which images are compared


def is_source(path: Path) -> bool:
    """Whether a path is images of the user's own: a folder, an npz or a table."""
    return path.is_dir() or (path.is_file() and path.suffix.lower() in (".npz", *ENDINGS))


def kind_of(path: Path) -> str:
    """data.name of a folder, an npz or a table. Raises DataError for anything else."""
    if path.is_dir():
        return "folder"
    if path.is_file() and path.suffix.lower() == ".npz":
        return "npz"
    if path.is_file() and path.suffix.lower() in ENDINGS:
        return "table"
    raise DataError(
        f"{path}: neither a folder of images, nor an npz file, nor a table ({', '.join(ENDINGS)}).",
        "Give one of these; docs/own-data.md shows how they look.",
    )


def describe_source(path: Path, given: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], str | None]:
    """The data part of a study for a folder, an npz or a table, without its path, and what split.group may be.

    given are entries of it that are known, None for a column that shall not be used. Raises DataError for anything
    else, and for a table whose columns are not recognised.
    """
    kind = kind_of(path)
    if kind == "table":
        return _describe_table(path, given or {}), None
    if kind == "folder":
        return {"name": kind, **_describe_metadata(path, given or {})}, None
    return {"name": kind}, _npz_group(path)


def _npz_group(path: Path) -> str | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return "groups" if any(key in ("groups", "train_groups") for key in file.files) else None
    except (OSError, ValueError, EOFError):  # reading it will tell
        return None


def _describe_metadata(path: Path, given: Mapping[str, Any]) -> dict[str, str]:
    """The columns of groups and parts in the metadata of a Hugging Face image folder; none where there is none.

    They are those that all tables have; tables in folders of parts say these parts by where they lie.
    """
    files = metadata_files(list_files(path))
    tables = [read_table(path / item.path) for item in files]
    image, label = given.get("image") or "file_name", given.get("label") or "label"
    if not tables or not all({image, label} <= table.keys() for table in tables):
        return {}
    whole = {name: cells for name, cells in tables[0].items() if all(name in table for table in tables)}
    table = {name: cells for name, cells in whole.items() if name not in (image, label)}
    one = len(files[0].path.parts) == 1
    part = given["part"] if "part" in given else _part_column(table, image) if one else None
    group = given["group"] if "group" in given else _group_column(name for name in table if name != part)
    return {key: name for key, name in (("group", group), ("part", part)) if name}


def _describe_table(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    whole = read_table(path)
    taken = [given.get(entry) for entry in ("image", "label", "group", "part")]
    table = {name: cells for name, cells in whole.items() if name not in taken}
    names = {key for item in list_files(path.parent).files for key in (str(item.path), item.path.name, item.path.stem)}
    image = given.get("image") or _first(table, IMAGE_COLUMNS)
    image = image or next((name for name, cells in table.items() if _named(cells, names)), None)
    part = given["part"] if "part" in given else _part_column(table, image)
    group = given["group"] if "group" in given else _group_column(name for name in table if name not in (image, part))
    rest = {name: cells for name, cells in table.items() if name not in (image, part, group)}
    label = given.get("label") or _first(rest, LABEL_COLUMNS)
    label = label or next((name for name in rest if _LABEL.fullmatch(name)), None)
    if label is None:
        few = [name for name, cells in rest.items() if 1 < len({*cells} - {""}) <= max(2, len(cells) // 10)]
        label = few[0] if len(few) == 1 else None
    if image is None or label is None:
        lacking, entry = ("names of images", "image") if image is None else ("classes", "label")
        raise DataError(
            f"{path}: no column is recognised as the {lacking} (it has: {', '.join(whole)}).",
            f"Say which it is: --set data.{entry}=COLUMN",
        )
    columns = {"image": image, "label": label, "group": group, "part": part}
    return {"name": "table", **{key: name for key, name in columns.items() if name}}


def _first(table: Mapping[str, Any], usual: Sequence[str]) -> str | None:
    return next((name for name in usual if name in table), None)


def _named(cells: Sequence[str], names: set[str]) -> bool:
    """Whether cells name files: those of the first 20 rows do."""
    return all(cell and (cell in names or Path(cell).name in names) for cell in cells[:20])


def _part_column(table: Mapping[str, Sequence[str]], image: str | None) -> str | None:
    """The column of the official parts: all its values are parts, or train and another part are among them.

    Reading the latter names its odd values and refuses them: without the column, official test images would train.
    """
    found = {name: {cell.lower() for cell in cells} for name, cells in table.items() if name != image}
    for name, values in found.items():
        if len(values) > 1 and values <= PART_NAMES.keys():
            return name
    for name, values in found.items():
        parts = {PART_NAMES[value] for value in values & PART_NAMES.keys()}
        if name not in LABEL_COLUMNS and "train" in parts and len(parts) > 1:
            return name
    return None


def _group_column(names: Iterable[str]) -> str | None:
    plain = {name: re.sub(r"[\W_]+", "", name).lower() for name in names}
    return next((name for pattern in _GROUPS for name in plain if pattern.fullmatch(plain[name])), None)


def sides_of(path: Path) -> tuple[list[tuple[int, int]], int]:
    """(width, height) of image files below a folder, and the number of all files.

    Those are 300 spread over it if they are of several sizes; if of one size, all: one other among them is one too many
    for images that are not resized. Files that are no images are skipped.
    """
    files = [item.file for item in list_files(path).files]
    step = max(1, len(files) // _FILES)

    def found(every: int) -> Iterator[tuple[int, int]]:
        for file in files[::every]:
            try:
                yield read_sides(file)
            except (NotAnImageError, DataError):  # preparing the data names the broken ones
                continue

    sides = list(found(step))
    return list(found(1)) if step > 1 and same_size(sides) else sides, len(files)


def most_common_side(sides: Sequence[tuple[int, int]]) -> int:
    """The median of the shorter sides of images."""
    return int(np.median([min(side) for side in sides]))


def same_size(sides: Sequence[tuple[int, int]]) -> bool:
    """Whether all are of one size."""
    return len(Counter(sides)) == 1


TURNS: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "flip_horizontal": lambda images: images[:, :, ::-1],
    "flip_vertical": lambda images: images[:, ::-1],
    "rotate90": lambda images: np.rot90(images, axes=(1, 2)),
}


def symmetries(
    images: NDArray[np.uint8], labels: NDArray[np.int64], rows: NDArray[np.int64], *, seed: int
) -> tuple[float, dict[str, float]]:
    """How well nearest neighbours recognise images: as they are, and flipped or turned.

    rows are those of images (n, height, width, channels) that are looked at; the others are not read from the disk.
    Each half of up to 3,000 images is looked up in the other half, by the likeness of small copies. The answers are
    shares of recognised images, averaged over the classes, so that a large class does not hide the others. A change
    that the data set is symmetric under leaves them as they are: mirrored digits are recognised worse, mirrored cells
    are not. rotate90 is left out where images are not square.
    """
    rows = rows[np.random.default_rng(seed).permutation(len(rows))[: 2 * _MOST_ROWS]]
    small, codes = _shrunk(images[rows]), labels[rows]
    halves = [(small[::2], codes[::2]), (small[1::2], codes[1::2])]
    asked = np.concatenate([truth for _, truth in halves])
    turns = {name: turn for name, turn in TURNS.items() if name != "rotate90" or images.shape[1] == images.shape[2]}

    def recognised(turn: Callable[[NDArray[Any]], NDArray[Any]]) -> float:
        hits = np.concatenate([_hits(turn, *halves), _hits(turn, *halves[::-1])])
        return float(np.mean([hits[asked == label].mean() for label in np.unique(asked)]))

    return recognised(lambda images: images), {name: recognised(turn) for name, turn in turns.items()}


def _shrunk(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Copies of at most 16 by 16 pixels, each with mean 0 and length 1: (n, h, w, channels)."""
    means: NDArray[Any] = images.astype(np.float32)
    for axis in (1, 2):
        side = images.shape[axis]
        edges = np.linspace(0, side, min(side, _SMALL) + 1).astype(int)
        shape = [-1 if each == axis else 1 for each in range(4)]
        means = np.add.reduceat(means, edges[:-1], axis=axis) / np.diff(edges).reshape(shape).astype(np.float32)
    means -= means.mean(axis=(1, 2, 3), keepdims=True)
    lengths = np.sqrt((means**2).sum(axis=(1, 2, 3), keepdims=True))
    found: NDArray[np.float32] = means / np.maximum(lengths, 1e-6)
    return found


def _hits(turn: Callable[[NDArray[Any]], NDArray[Any]], asked: Any, known: Any) -> NDArray[np.bool_]:
    """Whether the nearest known image, by cosine similarity, has the class of each changed image."""
    (images, truth), (others, labels) = asked, known
    likeness = turn(images).reshape(len(images), -1) @ others.reshape(len(others), -1).T
    hits: NDArray[np.bool_] = labels[likeness.argmax(axis=1)] == truth
    return hits
