"""Prepare a data set once, as plain arrays on disk; open what a trial may see of it as tensors."""

# torch is imported where tensors are made: the supervisor prepares data and never needs it.

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.atomic_folder import intact, write_folder, write_text
from hpo.data.download import Progress
from hpo.data.duplicates import shared_images
from hpo.data.readers import Pair, Parts
from hpo.data.sources import Source, find, gather
from hpo.data.split import indices, stratified
from hpo.errors import DataError
from hpo.records import DataCard
from hpo.spec.study import DataSpec, SplitSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Part of every key: raise it when prepared files of an earlier version must not be used any more.
_FORMAT = 1
_STATISTICS_ROWS = 4096


def cache_folder() -> Path:
    """HPO_DATA, else `hpo` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    own = os.environ.get("HPO_DATA")
    folder = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hpo"
    return folder.expanduser().absolute()


def models_folder() -> Path:
    """Where models of a store lie that other networks stand on, each in a folder named by its id."""
    return cache_folder() / "models"


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
    # Names of classes are not in the digest: those of the card count, not those of other data with the same pixels.
    return replace(found, class_names=card.class_names).sealed


def _request(data: DataSpec, split: SplitSpec) -> str:
    """A key of what was asked for: another file, size, or share to seal away is another request."""
    files: list[tuple[str, int, int, int]] = []
    if data.path is not None:
        place = Path(data.path).absolute()
        stats = {str(path): path.stat() for path in _files_below(place)}
        # The time of the last change, which nobody sets, tells of other content under the same size and time.
        files = sorted((path, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for path, each in stats.items())
    asked = [_FORMAT, data.name, data.size, data.path, files, data.groups, split.test_share, split.seed]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]


def _files_below(place: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Every file of a folder, through links to folders too; the file itself where it is one."""
    if place.is_file():
        yield place
    elif place.is_dir() and (real := place.resolve()) not in above:  # not a link back to a folder above
        for item in place.iterdir():
            yield from _files_below(item, above | {real})


def _indexed(entry: Path) -> DataCard | None:
    """The card of an earlier preparation whose files are still as they were written."""
    card = _card(entry)
    return card if card is not None and intact(Path(card.folder).parent) else None


def _card(file: Path) -> DataCard | None:
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        plain.update(class_names=tuple(plain["class_names"]), image_shape=tuple(plain["image_shape"]))
        plain.update(shared=tuple(plain.get("shared", ())))
        return DataCard(**plain)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prepare(source: Source, data: DataSpec, split: SplitSpec, root: Path, entry: Path, report: Progress) -> DataCard:
    found = gather(source, size=data.size, path=data.path, downloads=root / "downloads", progress=report)
    sides = (data.size,) if data.size else source.sizes
    pairs, class_names = _checked(found.parts, sides, found.origin)
    if data.groups:
        pairs, class_names = _grouped(pairs, class_names, data.groups)
    # Published sets are what they are; copies between parts that are drawn here are counted by hpo data show.
    shared = () if source.sizes else shared_images({part: images for part, (images, _) in pairs.items()})
    if "test" not in pairs:
        pairs = _sealed(pairs, split)
    _check_classes(pairs, class_names, found.origin)
    digest = _digest(pairs)
    folder = root / "prepared" / digest[:32]
    development = [pairs[part] for part in ("train", "valid") if part in pairs]
    card = DataCard(
        name=data.name,
        folder=str(folder / "development"),
        test_folder=str(folder / "test"),
        digest=f"sha256:{digest}",
        class_names=class_names,
        image_shape=pairs["train"][0].shape[1:],
        development_count=sum(len(labels) for _, labels in development),
        test_count=len(pairs["test"][1]),
        valid_start=len(pairs["train"][1]) if "valid" in pairs else None,
        official=found.official,
        source=found.origin,
        licence=source.licence,
        citation=source.citation,
        shared=shared,
    )
    if not intact(folder):
        parts = {"development": development, "test": [pairs["test"]]}
        write_folder(folder, lambda made: _write(made, parts, card))
    write_text(entry, json.dumps(asdict(card)))
    return card


def _checked(parts: Parts, sides: Sequence[int], origin: str) -> tuple[dict[str, Pair], tuple[str, ...]]:
    """Each part as images (n, height, width, channels) uint8 and labels (n,) int64, and a name for each class."""
    pairs: dict[str, Pair] = {}
    for part, (images, labels) in parts.pairs.items():
        place = f"{origin}: {part}"
        if images.dtype != np.uint8:
            raise DataError(
                f"{place} images are {images.dtype}, not uint8.", "Save pixel values 0 to 255 as numpy.uint8."
            )
        if images.ndim not in (3, 4) or 0 in images.shape or (images.ndim == 4 and images.shape[3] > 4):
            raise DataError(
                f"{place} images have shape {images.shape}.",
                "Save them as (n, height, width) or (n, height, width, channels) with 1 to 4 channels, none empty.",
            )
        if labels.shape not in ((len(images),), (len(images), 1)):
            raise DataError(
                f"{place} labels have shape {labels.shape} for {len(images)} images.", "Save one label for each image."
            )
        if labels.dtype.kind not in "iu":
            raise DataError(
                f"{place} labels are {labels.dtype}, not integers.", "Number the classes 0, 1, 2, ... as int64."
            )
        images = np.ascontiguousarray(images.reshape(*images.shape[:3], -1))
        pairs[part] = images, labels.reshape(-1).astype(np.int64)
        high, wide, channels = images.shape[1:]
        if sides and (high, wide) not in ((side, side) for side in sides):
            raise DataError(
                f"{place} images are {wide}x{high} pixels, wanted: {' or '.join(f'{side}x{side}' for side in sides)}.",
                "Correct data.size, or name another file.",
            )
        if images.shape[1:] != pairs["train"][0].shape[1:]:
            raise DataError(
                f"{place} images are {high}x{wide}x{channels}, train images "
                f"{'x'.join(map(str, pairs['train'][0].shape[1:]))}.",
                "Save all parts at one size.",
            )
    labels = np.concatenate([labels for _, labels in pairs.values()])
    if not len(labels) or labels.max() >= max(len(labels), len(parts.class_names)):
        raise DataError(
            f"{origin}: {len(labels)} labels, the highest {labels.max() if len(labels) else 'missing'}.",
            "Number the classes 0, 1, 2, ... without gaps.",
        )
    class_names = parts.class_names or tuple(map(str, range(int(labels.max()) + 1)))
    if len(set(class_names)) < len(class_names):
        raise DataError(f"{origin}: two classes have one name: {', '.join(class_names)}.", "Name each differently.")
    if labels.min() < 0 or labels.max() >= len(class_names):
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise DataError(
            f"{origin}: label {wrong} is outside 0 to {len(class_names) - 1}.",
            f"Number the {len(class_names)} classes 0, 1, 2, ...",
        )
    return pairs, class_names


def _grouped(
    pairs: Mapping[str, Pair], class_names: tuple[str, ...], groups: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Pair], tuple[str, ...]]:
    """The pairs with the classes of each group as one new class, in the order of groups, and without other images."""
    group_of = np.full(len(class_names), -1, dtype=np.int64)
    for label, members in enumerate(groups.values()):
        for name in members:
            if name not in class_names:
                raise DataError(
                    f"data.groups: there is no class {name!r} (known: {', '.join(class_names)}).", "Correct the name."
                )
            if group_of[class_names.index(name)] >= 0:
                raise DataError(f"data.groups: class {name!r} is in two groups.", "Leave it out of one.")
            group_of[class_names.index(name)] = label
    grouped: dict[str, Pair] = {}
    for part, (images, labels) in pairs.items():
        kept = group_of[labels] >= 0
        whole = bool(kept.all())
        grouped[part] = (images if whole else images[kept]), group_of[labels if whole else labels[kept]]
    return grouped, tuple(groups)


def _sealed(pairs: Mapping[str, Pair], split: SplitSpec) -> dict[str, Pair]:
    """The pairs with a test part drawn from train; an official validation part stays whole."""
    images, labels = pairs["train"]
    test = stratified(labels, share=split.test_share, seed=split.seed)
    kept = np.setdiff1d(np.arange(len(labels)), test, assume_unique=True)
    return {**pairs, "train": (images[kept], labels[kept]), "test": (images[test], labels[test])}


def _check_classes(pairs: Mapping[str, Pair], class_names: Sequence[str], origin: str) -> None:
    present = np.unique(pairs["train"][1])
    if len(present) < 2:
        raise DataError(
            f"{origin}: one-class data: every training image is of class {class_names[int(present[0])]!r}.",
            "Add images of at least one more class.",
        )
    development = np.concatenate([labels for part, (_, labels) in pairs.items() if part != "test"])
    lacking = [name for label, name in enumerate(class_names) if label not in development]
    if lacking:
        shown = ", ".join(map(repr, lacking[:5])) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise DataError(
            f"{origin}: no image to train on is of class {shown}.",
            "Number the classes without gaps and give each an image.",
        )
    if not len(pairs["test"][1]):
        raise DataError(f"{origin}: too few images to seal a test part away.", "Add images, or raise split.test_share.")


def _digest(pairs: Mapping[str, Pair]) -> str:
    """SHA-256 over name, shape, pixels and labels of every part, as hexadecimal digits."""
    digest = hashlib.sha256()
    for part in sorted(pairs):
        images, labels = pairs[part]
        digest.update(f"{part} {images.shape}".encode())
        digest.update(images.data)
        digest.update(labels.astype("<i8").data)
    return digest.hexdigest()


def _write(made: Path, parts: Mapping[str, Sequence[Pair]], card: DataCard) -> None:
    for part, pairs in parts.items():
        (made / part).mkdir()
        _save(made / part / f"{part}_images.npy", [images for images, _ in pairs])
        _save(made / part / f"{part}_labels.npy", [labels for _, labels in pairs])
    write_text(made / "development" / "card.json", json.dumps(asdict(card), indent=1))


def _save(path: Path, pieces: Sequence[NDArray[Any]]) -> None:
    """One npy of all pieces in a row, without a second copy of them in memory."""
    header = {
        "descr": np.lib.format.dtype_to_descr(pieces[0].dtype),
        "fortran_order": False,
        "shape": (sum(map(len, pieces)), *pieces[0].shape[1:]),
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            piece.tofile(file)


@dataclass(frozen=True)
class TrialData:
    """All that a trial sees: the development images, on its device. It knows nothing of the test part.

    images (n, height, width, channels) uint8 and labels (n,) int64; train and valid are ascending int64 rows of them.
    Where a frozen backbone has seen the images before, images are its features instead, float32 (n, count), or
    (n, 1 + views, count): of the image as it is, then of augmented views. mean and std have one value a channel, in
    [0, 1] as pixel / 255, exact over the training rows; std is at least 1e-6.
    """

    images: Tensor
    labels: Tensor
    train: Tensor
    valid: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_trial(card: DataCard, split: SplitSpec, *, device: torch.device, fold: int = 0) -> TrialData:
    """The development part of a prepared data set, split. On the CPU it stays memory-mapped and is not copied.

    Raises DataError where the split is impossible or the prepared files are gone.
    """
    import torch

    folder = Path(card.folder)
    images = load_tensor(folder / "development_images.npy", device)
    labels = load_tensor(folder / "development_labels.npy", device)
    rows = indices(labels.cpu().numpy(), split=split, valid_start=card.valid_start, fold=fold)
    train, valid = (torch.from_numpy(part).to(device) for part in rows)
    mean, std = _statistics(images, train)
    return TrialData(images, labels, train, valid, card.class_names, mean, std)


def load_tensor(path: Path, device: torch.device) -> Tensor:
    """The array of an npy file on the device, memory-mapped where the device is the CPU.

    Remembered while the file stays as it is: folds and candidates share it, and may train side by side then.
    """
    try:
        seen = path.stat()
        return _mapped(path, device, (seen.st_ino, seen.st_size, seen.st_mtime_ns))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: the prepared data cannot be read: {error}.", "Run again: it is prepared anew."
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
