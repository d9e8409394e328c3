"""Prepare a data set once, as plain arrays on disk; open what a trial may see of it as tensors."""

# torch is imported where tensors are made: the supervisor prepares data and never needs it.

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpo.data.cache import Progress, intact, write_folder, write_text
from hpo.data.duplicates import judge, look_at, shared_images
from hpo.data.folders import Asked
from hpo.data.layouts import list_files
from hpo.data.parts import (
    Part,
    check_classes,
    check_groups,
    checked,
    class_codes,
    digest_of,
    joined,
    near_clusters,
    regrouped,
    sealed,
)
from hpo.data.pixels import Ranges
from hpo.data.sources import Gathered, Source, find, gather, scores_of
from hpo.data.split import rows_of
from hpo.errors import DataError
from hpo.home import cache_folder
from hpo.records import DataCard
from hpo.spec.study import DataSpec, SplitSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Part of every key: raise it when prepared files of an earlier version must not be used any more.
_FORMAT = 2
_STATISTICS_ROWS = 4096


def prepare(
    data: DataSpec, split: SplitSpec, *, cache: Path | None = None, progress: Progress | None = None
) -> DataCard:
    """The data set as checked arrays on disk: found, downloaded if need be, and written once per content.

    Where the data set has no test part, `split.test_share` of its training images is sealed away as one, stratified,
    by `split.seed`. cache defaults to cache_folder(); progress(text, done_bytes, total_bytes) hears of downloads. An
    unchanged source answers from an index in milliseconds. Safe when two processes prepare at once. Raises DataError.
    """
    root = (cache or cache_folder()).absolute()
    try:
        source = find(data.name, size=data.size, path=data.path)
        entry = root / "prepared" / "index" / f"{_request(data, split)}.json"
        own = ":" in data.name  # a function's answer may change: it is asked each time
        if not own and (card := _indexed(entry)):
            return card
        import filelock

        entry.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / "prepared" / ".lock"):
            # Another process may have prepared it while this one waited.
            card = None if own else _indexed(entry)
            return card or _prepare(source, data, split, root, entry, progress or (lambda *_: None))
    except OSError as error:
        raise DataError(
            f"{error.filename or root}: cannot be read or written: {error.strerror or error}.",
            "Free the disk, or choose a cache folder of your own: the environment variable HPO_DATA.",
        ) from None


def prepared(digest: str) -> DataCard | None:
    """The card of prepared data with this digest in the cache, wherever it was prepared; None where there is none."""
    folder = cache_folder() / "prepared" / digest.removeprefix("sha256:")[:32]
    card = _card(folder / "development" / "card.json")
    if card is None or not intact(folder):
        return None
    return replace(card, folder=str(folder / "development"), test_folder=str(folder / "test"))


def at_hand(card: DataCard, data: DataSpec, split: SplitSpec) -> DataCard:
    """The sealed card of the same data on this machine, which need not be the one that the card was made on.

    Those are the files that the card names, else those in the cache, else they are prepared. Raises DataError, also
    where what is here are other data.
    """
    there = _card(Path(card.folder) / "card.json")
    if there is not None and there.digest == card.digest and intact(Path(card.folder).parent):
        return card.sealed
    found = prepared(card.digest) or prepare(data, split)
    if found.digest != card.digest:
        raise DataError(
            f"{found.source}: has other images or labels ({found.digest}) than the study ({card.digest}).",
            "Bring the study's data there, to the same path, or share the folder.",
        )
    return replace(card, folder=found.folder).sealed  # all else as the study knows it


def _request(data: DataSpec, split: SplitSpec) -> str:
    """A key of what was asked for: another file, size, or share to seal away is another request."""
    files: list[tuple[str, int, int, int]] = []
    if data.path is not None:
        place = Path(data.path).absolute()
        # A table names files anywhere below its folder.
        folder = place.parent if data.name == "table" else place
        found = [item.file for item in list_files(folder).files] if folder.is_dir() else [place]
        files = sorted(each for path in found if isinstance(path, Path) and (each := _version(path, data)))
    asked = [_FORMAT, data.model_dump(mode="json"), files]
    asked += [split.test_share, split.seed, split.group, split.near_duplicates]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _version(path: Path, data: DataSpec) -> tuple[str, int, int, int] | None:
    """What changes with a file's content; None where the file is gone by now, or is no part of the data."""
    if data.name == "table" and path.suffix.lower() in (".yaml", ".yml"):
        return None  # the study file, which hpo new writes next to a table
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    # The time of the last change, which nobody sets, tells of other content under the same size and time.
    return str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _indexed(entry: Path) -> DataCard | None:
    """The card of an earlier preparation whose files are still as they were written."""
    card = _card(entry)
    return card if card is not None and intact(Path(card.folder).parent) else None


def _card(file: Path) -> DataCard | None:
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        for name in ("class_names", "image_shape", "warnings", "shared"):
            plain[name] = tuple(plain.get(name, ()))
        plain["ranges"] = {kind: tuple(limits) for kind, limits in plain.get("ranges", {}).items()}
        return DataCard(**plain)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # damaged: read again
        return None


def _prepare(source: Source, data: DataSpec, split: SplitSpec, root: Path, entry: Path, report: Progress) -> DataCard:
    for abandoned in (root / "prepared").glob(".reading-*"):
        shutil.rmtree(abandoned)
    with tempfile.TemporaryDirectory(dir=root / "prepared", prefix=".reading-") as scratch:
        asked = Asked(data, split.group or data.group, Path(scratch), report)
        found = gather(source, asked, downloads=root / "downloads")
        parts, class_names, ranges = checked(found, source, data)
        if data.groups:
            parts, class_names = regrouped(parts, class_names, data.groups)
        report("comparing images", 0, 0)
        looks = {part: look_at(each.images) for part, each in parts.items()}
        classes = {part: class_codes(each.labels) for part, each in parts.items()}
        warnings = judge(looks, classes, ranges, found.origin)
        # Published sets are what they are; copies between parts that are drawn here are counted as near-duplicates.
        shared = () if source.sizes else shared_images({part: look.digests.tolist() for part, look in looks.items()})
        near = near_clusters(parts, looks)
        if split.near_duplicates == "together":
            parts = joined(parts, near)
        if "test" not in parts:
            parts, near = sealed(parts, near, split)
        check_classes(parts, class_names, found.origin)
        check_groups(parts, found.origin, split)
        report("writing the prepared images", 0, 0)
        told = (*found.parts.warnings, *warnings)
        return _written(data, found, parts, near, class_names, ranges, told, shared, root, entry)


def _written(
    data: DataSpec,
    found: Gathered,
    parts: Mapping[str, Part],
    near: Mapping[str, NDArray[np.int64]],
    class_names: tuple[str, ...],
    ranges: Ranges,
    warnings: tuple[str, ...],
    shared: tuple[str, ...],
    root: Path,
    entry: Path,
) -> DataCard:
    """Write the parts and their card, unless the same content is there already."""
    digest = digest_of(parts, ranges)
    folder = root / "prepared" / digest[:32]
    development = [part for part in ("train", "valid") if part in parts]
    grouped = [part.groups for part in parts.values() if part.groups is not None]
    card = DataCard(
        name=data.name,
        folder=str(folder / "development"),
        test_folder=str(folder / "test"),
        digest=f"sha256:{digest}",
        class_names=class_names,
        image_shape=parts["train"].images.shape[1:],
        development_count=sum(len(parts[part].labels) for part in development),
        test_count=len(parts["test"].labels),
        valid_start=len(parts["train"].labels) if "valid" in parts else None,
        official=found.official,
        source=found.origin,
        licence=found.licence,
        citation=found.citation,
        files=found.parts.files,
        ranges=ranges,
        warnings=warnings,
        several_labels=parts["train"].labels.ndim == 2,
        shared=shared,
        groups=len(np.unique(np.concatenate(grouped))) if grouped else 0,
    )
    # What an older version of hpo prepared lacks the clusters of near-duplicates.
    if not intact(folder) or not (folder / "development" / "development_near.npy").is_file():
        places = {"development": development, "test": ["test"]}
        write_folder(folder, lambda made: _write(made, places, parts, near, card))
    write_text(entry, json.dumps(asdict(card)))
    return card


def _write(
    made: Path,
    places: Mapping[str, Sequence[str]],
    parts: Mapping[str, Part],
    near: Mapping[str, NDArray[np.int64]],
    card: DataCard,
) -> None:
    for place, names in places.items():
        (made / place).mkdir()
        pieces = [parts[name] for name in names]
        shape = (sum(len(piece.labels) for piece in pieces), *pieces[0].images.shape[1:])
        _save(made / place / f"{place}_images.npy", shape, (c for piece in pieces for c in piece.images.chunks()))
        np.save(made / place / f"{place}_labels.npy", np.concatenate([piece.labels for piece in pieces]))
        np.save(made / place / f"{place}_near.npy", np.concatenate([near[name] for name in names]))
        groups = [piece.groups for piece in pieces if piece.groups is not None]
        if groups:
            np.save(made / place / f"{place}_groups.npy", np.concatenate(groups))
    write_text(made / "development" / "card.json", json.dumps(asdict(card), indent=1))


def _save(path: Path, shape: tuple[int, ...], chunks: Iterator[NDArray[np.uint8]]) -> None:
    """One npy of images, piece by piece."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            chunk.tofile(file)


@dataclass(frozen=True)
class TrialData:
    """All that a trial sees: the development images, on its device. It knows nothing of the test part.

    images (n, height, width, channels) uint8 and labels (n,) int64, or (n, labels) of 0 and 1 where an image has
    several; train and valid are ascending int64 rows of them. scores are those of sources.scores_of.
    Where a frozen backbone has seen the images before, images are its features instead, float32 (n, count), or
    (n, 1 + views, count): of the image as it is, then of augmented views. mean and std have one value a channel, in
    [0, 1] as pixel / 255, exact over the training rows; std is at least 1e-6. ranges are the card's. taught are the
    probabilities (n, classes) float32 of a teacher, of the training rows only.
    """

    images: Tensor
    labels: Tensor
    train: Tensor
    valid: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ranges: Ranges = field(default_factory=dict, hash=False)
    scores: tuple[str, ...] = ()
    taught: Tensor | None = None


def check_task(card: DataCard, task: str) -> None:
    """Refuse a task for other labels than the data has. Raises DataError."""
    if card.several_labels and task != "multilabel":
        raise DataError(
            f"task: {task}, but an image of {card.name} has any number of its {len(card.class_names)} labels.",
            "Say so: --set task=multilabel",
        )
    if task == "multilabel" and not card.several_labels:
        raise DataError(
            f"task: multilabel, but each image of {card.name} has one class.",
            "Leave task out, or save its labels as (n, labels) of 0 and 1.",
        )


def open_trial(card: DataCard, split: SplitSpec, *, device: torch.device, fold: int = 0) -> TrialData:
    """The development part of a prepared data set, split. On the CPU it stays memory-mapped and is not copied.

    Raises DataError where the split is impossible or the prepared files are gone.
    """
    import torch

    folder = Path(card.folder)
    images = load_tensor(folder / "development_images.npy", device)
    labels = load_tensor(folder / "development_labels.npy", device)
    rows = rows_of(card, split, labels.cpu().numpy(), fold=fold)
    train, valid = (torch.from_numpy(part).to(device) for part in rows)
    mean, std = _statistics(images, train)
    return TrialData(images, labels, train, valid, card.class_names, mean, std, card.ranges, scores_of(card.name))


def load_tensor(path: Path, device: torch.device) -> Tensor:
    """The array of an npy file on the device, memory-mapped where the device is the CPU.

    Remembered while the file stays as it is: folds and candidates share it, and may train side by side then.
    """
    try:
        seen = path.stat()
        return _mapped(path, device, (seen.st_ino, seen.st_size, seen.st_mtime_ns))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: the prepared data cannot be read: {error}.", "Run again: it is prepared again."
        ) from None


@lru_cache(maxsize=4)
def _mapped(path: Path, device: torch.device, _version: tuple[int, int, int]) -> Tensor:
    import torch

    # Mode "c" (copy on write) shares the pages as "r" does, but torch takes it without a warning.
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)).to(device)


def _statistics(images: Tensor, rows: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the rows, in [0, 1] units, from counts of the 256 values."""
    import torch

    counts = torch.zeros(images.shape[3], 256, dtype=torch.int64, device=images.device)
    for start in range(0, len(rows), _STATISTICS_ROWS):
        pixels = images[rows[start : start + _STATISTICS_ROWS]].flatten(0, 2)
        for channel in range(len(counts)):
            counts[channel] += torch.bincount(pixels[:, channel], minlength=256)
    moments = [_moments(channel) for channel in counts.tolist()]
    return tuple(mean for mean, _ in moments), tuple(std for _, std in moments)


def _moments(counts: Iterable[int]) -> tuple[float, float]:
    # Sums of Python integers are exact, so neither the order of the rows nor the device shows.
    total = first = second = 0
    for value, count in enumerate(counts):
        total, first, second = total + count, first + value * count, second + value * value * count
    variance = (total * second - first * first) / total**2
    return first / total / 255, max(variance**0.5 / 255, 1e-6)
