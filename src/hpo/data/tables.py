"""A table of labels for image files: CSV, TSV, JSON Lines or Parquet."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hpo.data.layouts import PART_NAMES, Found, Labelled, Listing, first_ten, parts_of
from hpo.errors import DataError

ENDINGS = (".csv", ".tsv", ".parquet", ".jsonl")
IMAGE_COLUMNS = ("file_name", "image", "file", "filename", "path")
LABEL_COLUMNS = ("label", "class")
_PIECE = re.compile(r"image|img|part|batch|chunk|pictures?|photos?|data|files?|jpe?g|png|\d$", re.IGNORECASE)
_METADATA = tuple(f"metadata{ending}" for ending in (".csv", ".jsonl", ".parquet"))


@dataclass(frozen=True)
class Columns:
    """The names of a table's columns; None: by their usual names (image, label), or none (group, part)."""

    image: str | None = None
    label: str | None = None
    group: str | None = None
    part: str | None = None


Table = Mapping[str, Sequence[str]]


def read_table(file: Path) -> Table:
    """Column -> its cells as text, "" where empty. Raises DataError."""
    import pandas

    try:
        if file.suffix.lower() == ".parquet":
            frame = pandas.read_parquet(file)
        elif file.suffix.lower() == ".jsonl":
            frame = pandas.read_json(file, lines=True, dtype=False)
        else:
            with file.open(encoding="utf-8-sig") as lines:
                head = lines.readline()
            delimiter = max(",;\t", key=head.count)
            frame = pandas.read_csv(file, sep=delimiter, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except Exception as error:  # noqa: BLE001 - pandas and its engines raise for damaged files what no list holds
        raise DataError(f"{file}: not a table that can be read: {error}.", "Write it as CSV or Parquet.") from None
    if not len(frame):
        raise DataError(f"{file}: the table has no rows.", "Write one row for each image.")
    return {str(name).strip(): [_text(cell) for cell in frame[name]] for name in frame.columns}


def _text(cell: Any) -> str:
    """A cell as text: whole numbers without .0, nothing for what is missing."""
    import pandas

    if pandas.api.types.is_scalar(cell) and pandas.isna(cell):  # None, NaN, NaT, and NA of nullable columns
        return ""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell).strip()


def label_by_table(
    table: Table, columns: Columns, files: Sequence[Found], *, origin: str, stem: str = ""
) -> tuple[list[Labelled], set[PurePosixPath]]:
    """The images that the rows name, with class, part and group; and the files of rows without a class.

    Names are paths below the table's folder, or names of files anywhere below it, with or without their ending. stem is
    put before them. _Files says what becomes of names whose folders are other ones. Raises DataError where a column is
    missing, where files are missing or ambiguous, and where rows contradict each other.
    """
    image = _column(table, columns.image, IMAGE_COLUMNS, "image", origin)
    label = _column(table, columns.label, LABEL_COLUMNS, "label", origin)
    group = _column(table, columns.group, (), "group", origin) if columns.group else None
    part = _column(table, columns.part, (), "part", origin) if columns.part else None
    by_name, unlabelled = _Files(files, stem, table[image]), set[PurePosixPath]()
    chosen: dict[PurePosixPath, Labelled] = {}
    missing, ambiguous, claimed, differing, ungrouped, outside = [], [], [], [], [], list[str]()
    strange = Counter[str]()
    for row, name in enumerate(table[image]):
        matches = by_name.find(name)
        if not matches:
            missing.append(name)
        elif len(matches) > 1:
            ambiguous.append(f"{name} ({matches[0].path}, {matches[1].path})")
        elif other := by_name.claimed(name, matches[0]):
            claimed.append(f"{other} and {name} ({matches[0].path})")
        elif not table[label][row]:
            unlabelled.add(matches[0].path)
        else:
            # Without a column, the part is the folder train, valid or test that the file lies in.
            own = PART_NAMES.get(table[part][row].lower()) if part else by_name.part(matches[0])
            if own is None:
                if part:
                    strange[table[part][row]] += 1
                else:
                    outside.append(str(matches[0].path))
                continue
            grouped = table[group][row] if group else ""
            found = Labelled(matches[0].file, matches[0].path, table[label][row], own, grouped)
            if group and not found.group:
                ungrouped.append(name)
            earlier = chosen.setdefault(found.path, found)
            if (earlier.label, earlier.part, earlier.group) != (found.label, found.part, found.group):
                differing.append(name)
    _refuse(missing, f"{origin}: column {image} names {{}} files that are not there", by_name.hint)
    _refuse(claimed, f"{origin}: {{}} times one file is there for names in different folders", by_name.hint)
    _refuse(
        ambiguous, f"{origin}: {{}} names stand for several files", "Write the path below the table's folder instead."
    )
    _refuse(differing, f"{origin}: {{}} images are in several rows that differ", "Leave one row for each image.")
    _refuse(ungrouped, f"{origin}: {{}} images have no {group}", "Fill the column, or leave those rows out.")
    _refuse_parts(strange, outside, origin, part, by_name.parts)
    return list(chosen.values()), unlabelled - chosen.keys()


def _refuse_parts(
    strange: Counter[str], outside: Sequence[str], origin: str, part: str | None, folders: Mapping[str, str]
) -> None:
    """Refuse images of no part: by what their column says, or by where they lie."""
    _refuse(
        [f"{value!r} ({count:,} rows)" for value, count in strange.items()],
        f"{origin}: column {part} has {{}} values that are no part",
        "Write train, valid (or val, validation, dev) and test, or leave those rows out.",
    )
    _refuse(
        outside,
        f"{origin}: {{}} images lie outside the folders {', '.join(folders)}",
        "Move them into these folders, leave their rows out, or name a column of parts: --set data.part=COLUMN",
    )


def _refuse(names: Sequence[str], words: str, hint: str) -> None:
    if names:
        raise DataError(f"{words.format(f'{len(names):,}')}: {first_ten(names)}.", hint)


def _column(table: Table, name: str | None, usual: Sequence[str], field: str, origin: str) -> str:
    wanted = [name] if name else [each for each in usual if each in table]
    if wanted and wanted[0] in table:
        return wanted[0]
    words = f"has no column {name!r}" if name else f"has no column that is called {', '.join(usual)}"
    raise DataError(f"{origin}: {words} (it has: {', '.join(table)}).", f"--set data.{field}=COLUMN")


class _Files:
    """Files by path, by name, and by both without their endings.

    names are all cells of the table. Those with folders are one kind: paths below the table's folder if one of them is
    found so, else paths whose first folders differ from those on this disk, by as many as the best of them needs; names
    of files only where no folder of theirs is there. So a missing file is missing: no file of the same name in another
    folder is taken for it.
    """

    def __init__(self, files: Sequence[Found], stem: str, names: Sequence[str]) -> None:
        self._stem = PurePosixPath(stem)
        self._whole: dict[str, list[Found]] = {}  # by path
        self._ends: dict[str, list[Found]] = {}  # by the last parts of the path, however many
        tops = sorted({item.path.parts[0] for item in files if len(item.path.parts) > 1})
        self.parts = parts_of(tops)
        for item in files:
            for path in {item.path, item.path.with_suffix("")}:
                self._whole.setdefault(str(path), []).append(item)
                for start in range(len(path.parts)):
                    self._ends.setdefault("/".join(path.parts[start:]), []).append(item)
        self._claims: dict[PurePosixPath, str] = {}
        paths = {path for name in names if len((path := _path(name)).parts) > 1}
        self._by, self._dropped = self._folders(paths)
        self.hint = "Correct the names, or the path."
        if paths and self._dropped is not None:
            self.hint += " Files of the same name in other folders are not taken for them."

    def _folders(self, paths: set[PurePosixPath]) -> tuple[dict[str, list[Found]], int | None]:
        """How names with folders are looked up: among whole paths or their ends, and without how many first folders.

        None: without any folder.
        """
        most = max((len(path.parts) for path in paths), default=0) - 1
        for by in (self._whole, self._ends):
            for dropped in range(most):
                rests = (path.parts[dropped:] for path in paths if len(path.parts) > dropped + 1)
                if any(key in by for rest in rests for key in self._keys(rest)):
                    return by, dropped
        return self._ends, None

    def _keys(self, parts: Sequence[str]) -> tuple[str, ...]:
        plain = PurePosixPath(*parts)
        return str(self._stem / plain), str(plain)

    def find(self, name: str) -> list[Found]:
        """The file that a cell names; several where that is not clear."""
        wanted = _path(name)
        below = len(wanted.parts) > 1
        if below and self._dropped is not None:
            by, keys = self._by, self._keys(wanted.parts[self._dropped :] or (wanted.name,))
        else:
            by, keys = self._ends, (*self._keys(wanted.parts), wanted.name)
        for key in keys:
            if name and (found := by.get(key)):
                exact = [item for item in found if str(item.path) == key]
                return exact or found
        return []

    def claimed(self, name: str, item: Found) -> str | None:
        """The name, in another folder, that stood for this file before; None where none did."""
        if len(_path(name).parts) < 2:
            return None
        earlier = self._claims.setdefault(item.path, name)
        return earlier if _path(earlier).parent != _path(name).parent else None

    def part(self, item: Found) -> str | None:
        """The part whose folder a file lies in; train where the folders are no parts."""
        return self.parts.get(item.path.parts[0], None if self.parts else "train")


def _path(name: str) -> PurePosixPath:
    """A cell as a path: tables of Windows have backslashes."""
    return PurePosixPath(name.replace("\\", "/"))


def metadata_files(listing: Listing) -> list[Found]:
    """The tables of a Hugging Face image folder: metadata.csv and the like, at its root or in the folders below."""
    return [item for item in listing.files if item.path.name in _METADATA and len(item.path.parts) <= 2]


def unread_table(listing: Listing, found: Sequence[Labelled], place: Path) -> list[str]:
    """A warning where a table next to folders names their images and no column of it is their classes.

    Raises DataError where the names of the folders, such as images_part_1, are no classes either.
    """
    for item in listing.files:
        if len(item.path.parts) > 1 or item.path.suffix.lower() not in ENDINGS or not isinstance(item.file, Path):
            continue
        try:
            table = read_table(item.file)
        except DataError:
            continue
        label_of = {key: each.label for each in found for key in (each.path.name, each.path.stem, str(each.path))}
        for name, cells in table.items():
            rows = [(row, label_of[cell]) for row, cell in enumerate(cells) if cell in label_of]
            if len(rows) < max(2, len(found) // 2):
                continue
            agreeing = [
                other
                for other, values in table.items()
                if all(values[row].casefold() == label.casefold() for row, label in rows)
            ]
            if agreeing:
                return []
            others = [
                other for other, values in table.items() if other != name and 1 < len(set(values)) <= len(values) // 2
            ]
            likely = min(others, key=lambda other: (other not in LABEL_COLUMNS, len(set(table[other]))), default="")
            if not others:
                continue
            folders = sorted({each.label for each in found})
            hint = (
                f"Take the classes from the table: data: {{name: table, path: {place / item.path.name}, image: {name}, "
                f"label: COLUMN}}, where COLUMN is one of {', '.join(others)}, perhaps {likely}."
            )
            if all(_PIECE.search(folder) for folder in folders):
                raise DataError(
                    f"{place}: the folders {first_ten(folders)} are pieces of a data set and no classes: column {name} "
                    f"of {item.path} names their images.",
                    hint,
                )
            return [f"column {name} of {item.path} names the images, too, but the folders are the classes. {hint}"]
    return []
