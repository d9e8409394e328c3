"""Which image file is of which class and part: folders of classes, of parts, of files that name their class."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from hpo.data.image_files import AnyFile
from hpo.errors import DataError
from hpo.home import is_store

PART_NAMES: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "valid",
    "valid": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
_EVALUATION = ("eval", "evaluation")  # validation or test: the data's author knows
_AROUND_PARTS = frozenset(("data", "folder", "image", "images", "img", "imgs", "part", "photos", "pictures", "split"))
IMAGE_ENDINGS = frozenset(
    (
        *(".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
        *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tif", ".tiff", ".webp"),
    )
)
HIDDEN = "hidden or of the system"
NO_CLASS = "in no class folder"
_JUNK_FOLDERS = frozenset(("__macosx", "@eadir", "$recycle.bin", "system volume information", "__pycache__"))
_JUNK_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"))
_CLASS_IN_NAME = re.compile(r"([A-Za-z][\w -]*?)\.\d+(\.\w+)?")


@dataclass(frozen=True)
class Found:
    """A file with its path below the data set's folder."""

    file: AnyFile
    path: PurePosixPath


@dataclass(frozen=True)
class Labelled:
    """An image file with its class, its part (train, valid or test) and its group, "" where none is known."""

    file: AnyFile
    path: PurePosixPath
    label: str
    part: str = "train"
    group: str = ""


@dataclass
class Listing:
    """What a folder holds: its files, how many were left out and why, and the folders directly in it."""

    files: list[Found] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    folders: list[str] = field(default_factory=list)

    @property
    def seen(self) -> int:
        """Files that were found in all."""
        return len(self.files) + sum(self.skipped.values())


def is_junk(name: str, *, folder: bool) -> bool:
    """True for names that file managers, archives and hidden files have."""
    return name.startswith(".") or name.lower() in (_JUNK_FOLDERS if folder else _JUNK_FILES)


def list_files(place: AnyFile) -> Listing:
    """All files below a folder, or below a folder of a zip archive, in the order of their names; links are followed.

    The stores of hpo are not looked into: `hpo run labels.csv` keeps them next to the images, and they change.
    """
    found = Listing()
    walked = _walk_zip(place) if isinstance(place, zipfile.Path) else _walk(place)
    for path, file in walked:
        if file is None:
            if len(path.parts) == 1:
                found.folders.append(path.name)
        elif any(is_junk(name, folder=True) for name in path.parts[:-1]) or is_junk(path.name, folder=False):
            found.skipped[HIDDEN] += 1
        else:
            found.files.append(Found(file, path))
    found.folders = [name for name in sorted(found.folders) if not is_junk(name, folder=True)]
    found.files.sort(key=lambda item: item.path.parts)
    return found


def _walk(place: Path) -> Iterator[tuple[PurePosixPath, Path | None]]:
    """(path below place, file), None for a folder. Links are followed, but not back into a folder they lie in."""
    for folder, folders, names in os.walk(place, followlinks=True):
        here = Path(folder)
        below = PurePosixPath(here.relative_to(place).as_posix())
        folders[:] = [name for name in folders if not is_store(here / name)]
        links = [name for name in folders if (here / name).is_symlink()]
        if links:
            above = {os.path.realpath(place / parent) for parent in (below, *below.parents)}
            folders[:] = [name for name in folders if name not in links or os.path.realpath(here / name) not in above]
        yield from ((below / name, None) for name in folders)
        yield from ((below / name, file) for name in names if (file := here / name).is_file())


def _walk_zip(place: zipfile.Path) -> Iterator[tuple[PurePosixPath, zipfile.Path | None]]:
    stem = len(PurePosixPath(place.at).parts)
    queue = [place]
    while queue:
        for item in queue.pop().iterdir():
            path = PurePosixPath(*PurePosixPath(item.at).parts[stem:])
            if item.is_dir():
                queue.append(item)
            yield path, None if item.is_dir() else item


def parts_of(folders: Sequence[str]) -> dict[str, str]:
    """Folder -> part, where these folders are a data set's official parts; else empty. Raises DataError.

    They are where one is train and another is valid or test, or where there is nothing but train: a folder train among
    others is a class (of vehicles).
    """
    parts = {name: PART_NAMES[name.lower()] for name in folders if name.lower() in PART_NAMES}
    if "train" not in parts.values() or not (len(set(parts.values())) > 1 or set(parts) == set(folders)):
        return {}
    for part in set(parts.values()):
        if len(same := [name for name, each in parts.items() if each == part]) > 1:
            raise DataError(f"folders {' and '.join(same)} are both the {part} part.", "Merge them, or rename one.")
    return parts


def label_by_folders(listing: Listing, *, place: AnyFile, label: str | None, images: Sequence[Found]) -> list[Labelled]:
    """The images with the class and part that their folders, or their names, say; others are counted as skipped.

    images are the files of the listing that hold an image. label is a regular expression on the path below place, whose
    first group is the class. Raises DataError where the layout is not one that is known.
    """
    parts = parts_of(listing.folders)
    inside: dict[str, list[tuple[Found, tuple[str, ...]]]] = {}
    for item in images:
        top, *rest = item.path.parts
        if not parts:
            inside.setdefault("train", []).append((item, item.path.parts))
        elif rest and top in parts:
            inside.setdefault(parts[top], []).append((item, tuple(rest)))
        else:
            listing.skipped["outside the folders of the parts"] += 1
    if label is not None:
        return [each for part, items in inside.items() for each in _by_pattern(items, part, label)]
    if not parts:
        _refuse_unclear_parts(place, images)
    found: list[Labelled] = []
    for part, items in inside.items():
        flat = bool(items) and all(len(rest) == 1 for _, rest in items)
        found += _by_names(items, part, listing, place) if flat else _by_class_folders(items, part, listing)
    if not found:
        raise DataError(f"{place}: holds no class folders.", "Put the images of each class into a folder of its own.")
    if not parts:
        _refuse_empty(listing, place, {item.label for item in found})
        found = _parts_below_classes(found)
        _refuse_wrapper(place, found)
    return found


def _plain_part(folder: str) -> str:
    """The name of the part that a folder's name has in it, such as training of training_set; "" where it has none."""
    plain = re.sub(r"[\W\d_]+", " ", folder.lower())
    words = re.sub(r"(?:data)?sets?\b", " ", plain).split()
    names = [word for word in words if word not in _AROUND_PARTS]
    return names[0] if len(names) == 1 and names[0] in (*PART_NAMES, *_EVALUATION) else ""


def _refuse_unclear_parts(place: AnyFile, images: Sequence[Found]) -> None:
    """Refuse folders that would become classes and read like the parts of a data set: their test images would train."""
    inner: dict[str, set[str]] = {}  # the folders with images in each folder; "" for images directly in it
    for item in images:
        if len(item.path.parts) > 1:
            inner.setdefault(item.path.parts[0], set()).add(item.path.parts[1] if len(item.path.parts) > 2 else "")
    named = {folder: part for folder in inner if (part := _plain_part(folder))}
    training = [folder for folder, part in named.items() if PART_NAMES.get(part) == "train"]
    others = [folder for folder in named if folder not in training]
    # Classes in the folder train, and beside it images that nobody has sorted: unlabeled, samples, meta.
    sorted_ones = [folder for folder in training if len(inner[folder] - {""}) > 1]
    unsorted = [folder for folder in inner if inner[folder] == {""}]
    if training and others:
        why = f"the folders {first_ten([*training, *others])} read like parts of a data set, and would become classes"
    elif sorted_ones and unsorted:
        why = (
            f"the folder {sorted_ones[0]} holds folders of images, such as {min(inner[sorted_ones[0]] - {''})}, but "
            f"{first_ten(unsorted)} none, so {sorted_ones[0]} reads like a part of a data set, and would become a class"
        )
    else:
        return
    raise DataError(
        f"{place}: {why}.",
        "If they are parts: rename them train, val and test, and move all other folders away. If they are classes: "
        "--set data.label='^([^/]+)/'",
    )


def _by_pattern(items: Sequence[tuple[Found, tuple[str, ...]]], part: str, label: str) -> Iterator[Labelled]:
    lacking = []
    for item, _ in items:
        name = matched(label, item.path)
        if name:
            yield Labelled(item.file, item.path, name, part)
        else:
            lacking.append(str(item.path))
    if lacking:
        raise DataError(
            f"data.label: {label!r} finds no class in {len(lacking):,} paths: {first_ten(lacking)}.",
            "Correct the pattern: its first group, in parentheses, is the class.",
        )


def matched(pattern: str, path: PurePosixPath) -> str:
    """The first group, else the whole, of what a regular expression finds in a path; "" where it finds nothing."""
    found = re.search(pattern, path.as_posix())
    return "" if found is None else (found.group(1) or "") if found.re.groups else found.group(0)


def first_ten(names: Sequence[str]) -> str:
    """The first ten, and how many more."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _by_class_folders(
    items: Sequence[tuple[Found, tuple[str, ...]]], part: str, listing: Listing
) -> Iterator[Labelled]:
    for item, rest in items:
        if len(rest) > 1:
            yield Labelled(item.file, item.path, rest[0], part)
        else:
            listing.skipped[NO_CLASS] += 1


def _by_names(
    items: Sequence[tuple[Found, tuple[str, ...]]], part: str, listing: Listing, place: AnyFile
) -> list[Labelled]:
    """Images without class folders, named cat.0.jpg, dog.0.jpg, ...; a test part with other names has no labels."""
    names = [_CLASS_IN_NAME.fullmatch(rest[0]) for _, rest in items]
    if all(names) and (part != "train" or len({name.group(1) for name in names if name}) > 1):
        return [
            Labelled(item.file, item.path, name.group(1), part)
            for (item, _), name in zip(items, names, strict=True)
            if name
        ]
    if part != "train":
        listing.skipped[f"in no class folder ({part})"] += len(items)
        return []
    raise DataError(
        f"{place}: holds no class folders: {len(items):,} images lie side by side, such as {items[0][0].path}.",
        "Put each class into a folder of its own. A table of classes: hpo run FILE.csv, or --set data.name=table "
        "--set data.path=FILE.csv. "
        "Names such as cat_12.jpg: --set data.label='([a-z]+)_[0-9]+'",
    )


def _refuse_empty(listing: Listing, place: AnyFile, labels: set[str]) -> None:
    empty = [name for name in listing.folders if name not in labels]
    if empty and labels - {""}:
        raise DataError(f"{place / empty[0]}: no image in this class folder.", "Add images, or remove the folder.")


def _parts_below_classes(found: list[Labelled]) -> list[Labelled]:
    """The same with official parts where each class has folders train, test, ... and nothing else."""
    below = {item.path.parts[1] if len(item.path.parts) > 2 else "" for item in found}
    parts = parts_of(sorted(below)) if below and all(name.lower() in PART_NAMES for name in below) else {}
    if len(set(parts.values())) < 2:
        return found
    return [Labelled(item.file, item.path, item.label, parts[item.path.parts[1]]) for item in found]


def _refuse_wrapper(place: AnyFile, found: Sequence[Labelled]) -> None:
    tops = {item.path.parts[0] for item in found}
    below = sorted({item.path.parts[1] for item in found if len(item.path.parts) > 2})
    if len(tops) == 1 and below and all(len(item.path.parts) > 2 for item in found):
        top = tops.pop()
        raise DataError(
            f"{place}: holds one folder, {top}, which holds {first_ten(below)}.",
            f"Are those the classes or parts? hpo run {place / top}, or --set data.path={place / top}",
        )


def doubtful(found: Sequence[Labelled]) -> list[str]:
    """What in a layout reads like a misunderstanding: folders that all hold the same folders may be no classes."""
    below: dict[str, set[str]] = {}
    for item in found:
        inner = item.path.parts[item.path.parts.index(item.label) + 1 : -1] if item.label in item.path.parts else ()
        below.setdefault(item.label, set()).add(inner[0] if inner else "")
    kinds = {frozenset(names) for names in below.values()}
    if len(below) > 1 and len(kinds) == 1 and len(names := next(iter(kinds))) > 1 and "" not in names:
        inside = f"all hold the folders {first_ten(sorted(names))}: are those the classes?"
        return [f"the class folders {first_ten(sorted(below))} {inside}"]
    return []
