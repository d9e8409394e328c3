"""Read the file formats that image data sets come in, as arrays; nothing here unpickles an unverified file."""

from __future__ import annotations

import gzip
import importlib.util
import math
import os
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.folders import Asked, Pair, Parts, read_folder
from hpo.errors import DataError, HpoError
from hpo.spec.own_code import load_function

_NPZ_PARTS = {"train": "train", "valid": "val", "test": "test"}
_IDX_PARTS = {"train": "train", "test": "t10k"}
# What numpy and zipfile raise on files that are cut off or overwritten.
_DAMAGE = (
    *(ValueError, OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error),
    MemoryError,  # for what a header promises
)
_MOST_IN_MEMORY = 1 << 28  # bytes of the images of a part; more are unpacked to the disk
_PIECE_BYTES = 1 << 22
_CIFAR10_BYTES = 1_000_000_000  # unpacked, at most: the official archive has 186 million


def package_file(package: str, *parts: str) -> Path:
    """A file inside an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the package {package} is not installed.", "Install hpo again, with its dependencies.")
    return Path(spec.submodule_search_locations[0]).joinpath(*parts)


def read_npz(place: Path, asked: Asked | None = None) -> Parts:
    """MedMNIST's keys: {train,val,test}_images and _labels, of which train is required; class_names is optional.

    {train,val,test}_groups, or groups where there is only train, name what must not be divided.
    """
    if not zipfile.is_zipfile(place):
        raise DataError(f"{place}: not an npz file, or a damaged one.", "Write it with numpy.savez, or copy it again.")
    group = asked.group if asked else None
    kinds = ("images", "labels", *([group] if group else []))
    wanted = {f"{prefix}_{kind}" for prefix in _NPZ_PARTS.values() for kind in kinds} | {"class_names", group}
    try:
        with np.load(place, allow_pickle=False) as file:
            large = _large(file.zip) if asked else {}
            _check_room(place, file.zip, large, asked)
            arrays = {
                key: _unpacked(file.zip, large[key], asked) if asked and key in large else file[key]
                for key in file.files
                if key in wanted
            }
            keys = file.files
    except HpoError:
        raise
    except Exception as error:  # noqa: BLE001 - numpy reads headers as Python, which fails in ways no list holds
        if "allow_pickle" in str(error) or "Python objects" in str(error):  # read, or mapped
            raise DataError(
                f"{place}: holds pickled Python objects, which could run code and are not opened.",
                "Save plain arrays: images as uint8, labels as int64, class_names as str.",
            ) from None
        raise DataError(f"{place}: the npz is damaged: {error}.", "Copy or write it again.") from None
    return _parts(arrays, place, keys, group)


def _large(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The arrays of images that are not read into memory, by their key."""
    images = {f"{prefix}_images.npy" for prefix in _NPZ_PARTS.values()}
    return {
        entry.filename.removesuffix(".npy"): entry
        for entry in archive.infolist()
        if entry.filename in images and entry.file_size > _MOST_IN_MEMORY
    }


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, asked: Asked) -> NDArray[Any]:
    """An array of an npz, unpacked piece by piece to a file in the scratch folder, and mapped from there."""
    target, done = asked.scratch / entry.filename, 0
    with archive.open(entry) as packed, target.open("wb") as file:
        while piece := packed.read(_PIECE_BYTES):
            file.write(piece)
            done += len(piece)
            asked.progress(f"unpacking {entry.filename}", done, entry.file_size)
    mapped: NDArray[Any] = np.load(target, mmap_mode="r", allow_pickle=False)
    return mapped


def _check_room(
    place: Path,
    archive: zipfile.ZipFile,
    large: Mapping[str, zipfile.ZipInfo] | None = None,
    asked: Asked | None = None,
) -> None:
    """Refuse what says it is larger, unpacked, than this machine's memory, or its disk for `large`. DataError."""
    on_disk = sum(entry.file_size for entry in (large or {}).values())
    if asked is not None and on_disk > (free := shutil.disk_usage(asked.scratch).free):
        raise DataError(
            f"{place}: its images have {on_disk / 1e9:,.1f} GB, unpacked, and {asked.scratch.parent} has "
            f"{free / 1e9:,.1f} GB left.",
            "Free the disk, or choose a cache folder of your own: the environment variable HPO_DATA.",
        )
    unpacked = sum(entry.file_size for entry in archive.infolist()) - on_disk
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else unpacked
    if unpacked > memory:
        raise DataError(
            f"{place}: unpacked it has {unpacked / 1e9:,.1f} GB, and this machine {memory / 1e9:,.1f} GB of memory.",
            "Take smaller images or fewer of them, or a larger machine.",
        )


def read_own(dotted: str, _place: Path, asked: Asked) -> Parts:
    """What the user's function answers: a mapping with the keys of an npz, called as function(size=...)."""
    try:
        arrays = dict(load_function(dotted, what="data")(size=asked.size))
    except HpoError:
        raise
    except Exception as error:
        raise DataError(
            f"data {dotted}: the function fails: {type(error).__name__}: {error}.",
            f"Call it yourself with size={asked.size}.",
        ) from error
    return _parts({key: np.asarray(value) for key, value in arrays.items()}, dotted, list(arrays), asked.group)


def _parts(arrays: Mapping[str, NDArray[Any]], place: Path | str, keys: Sequence[str], group: str | None) -> Parts:
    pairs: dict[str, Pair] = {}
    for part, prefix in _NPZ_PARTS.items():
        images, labels = arrays.get(f"{prefix}_images"), arrays.get(f"{prefix}_labels")
        if images is not None and labels is not None:
            pairs[part] = images, labels
        elif images is not None or labels is not None or part == "train":
            raise DataError(
                f"{place}: {prefix}_images and {prefix}_labels are not both there (keys: {', '.join(keys)}).",
                "Save both under these names; val_* and test_* may be left out in pairs.",
            )
    names = tuple(str(name) for name in arrays.get("class_names", np.array([])).reshape(-1))
    groups = _groups(arrays, place, pairs, group) if group else {}
    unused = [key for key in keys if key == "groups" or key.endswith("_groups")] if not group else []
    warnings = (
        [f"{place} has {', '.join(unused)}, which nothing uses: --set split.group=groups keeps each group in one part"]
        if unused
        else []
    )
    return Parts(pairs, names, groups=groups, warnings=tuple(warnings))


def _groups(
    arrays: Mapping[str, NDArray[Any]], place: Path | str, pairs: Mapping[str, Pair], group: str
) -> dict[str, NDArray[Any]]:
    found = {}
    for part, (images, _) in pairs.items():
        key = f"{_NPZ_PARTS[part]}_{group}"
        values = arrays.get(key, arrays.get(group) if len(pairs) == 1 else None)
        if values is None:
            raise DataError(f"split.group: {place} has no {key}.", "Save one name or number for each image there.")
        if values.size != len(images) or values.dtype.kind not in "iuUS":
            raise DataError(
                f"{place}: {key} is {values.dtype} of shape {values.shape} for {len(images):,} images.",
                "Save one name or whole number for each image.",
            )
        found[part] = values.reshape(-1).astype(str)
    return found


def read_digits(place: Path, _asked: Asked | None = None) -> Parts:
    """scikit-learn's digits.csv.gz: 64 grey values 0..16 and the digit in each line; scaled to 0..255."""
    # As sklearn.datasets.load_digits does, without the seconds that importing scikit-learn takes.
    table = np.loadtxt(place, delimiter=",")
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    return Parts({"train": (images, table[:, -1].astype(np.int64))}, tuple("0123456789"))


def read_idx(place: Path, _asked: Asked | None = None) -> Parts:
    """A folder with the four files of MNIST's format, {train,t10k}-{images-idx3,labels-idx1}-ubyte, gzipped or not."""
    return Parts(
        {
            part: (_idx(place, f"{prefix}-images-idx3-ubyte", 3), _idx(place, f"{prefix}-labels-idx1-ubyte", 1))
            for part, prefix in _IDX_PARTS.items()
        }
    )


def _idx(folder: Path, name: str, dims: int) -> NDArray[np.uint8]:
    """One idx file: 0, 0, 8 (uint8), dims, then the lengths as big-endian uint32, then the values."""
    path = next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: {name}.gz is missing there.", "Name a folder that holds all four idx files.")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            if file.read(4) != bytes((0, 0, 8, dims)):
                raise ValueError(f"it does not begin as uint8 idx of {dims} dimensions")
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            # One more than is due: a file that unpacks to more is reported, not unpacked.
            values = file.read(math.prod(shape) + 1)
        return np.frombuffer(values, np.uint8).reshape(shape)
    except _DAMAGE as error:
        raise DataError(f"{path}: the idx file is damaged: {error}.", "Copy or download it again.") from None


def read_cifar10(place: Path, asked: Asked | None = None) -> Parts:
    """An npz, the publisher's cifar-10-python.tar.gz, or the folder cifar-10-batches-py that lies in it."""
    if place.suffix == ".npz":
        return read_npz(place, asked)
    from torchvision.datasets import CIFAR10

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if place.is_dir():
            root = place.parent if place.name == CIFAR10.base_folder else place
        else:
            try:
                with tarfile.open(place) as archive:
                    unpacked = 0
                    for member in archive:
                        unpacked += member.size
                        if unpacked > _CIFAR10_BYTES:
                            raise tarfile.TarError(f"it unpacks to more than {_CIFAR10_BYTES:,} bytes")
                    # The filter lets nothing out of the folder: no path upwards, no link to elsewhere, no device.
                    archive.extractall(root, filter="data")
            except (tarfile.TarError, *_DAMAGE) as error:
                raise DataError(f"{place}: the archive is damaged: {error}.", "Copy or download it again.") from None
        try:
            # The batches are pickles: torchvision opens them only after it has compared their published checksums.
            train, test = (CIFAR10(str(root), train=part, download=False) for part in (True, False))
        except RuntimeError:
            raise DataError(
                f"{place}: {CIFAR10.base_folder} is not complete there, or not the official one.",
                "Its files are pickles, so no others are opened. Other CIFAR images: save them as npz.",
            ) from None
        pairs = {name: (part.data, np.array(part.targets)) for name, part in (("train", train), ("test", test))}
        return Parts(pairs, tuple(train.classes), verified=True)


def read_eurosat(place: Path, asked: Asked) -> Parts:
    """The publisher's EuroSAT.zip, a folder with `2750` in it, or one with the class folders."""
    if place.is_dir():
        return read_folder(place / "2750" if (place / "2750").is_dir() else place, asked)
    try:
        with zipfile.ZipFile(place) as archive:
            _check_room(place, archive)
            # Read inside the archive: what is never extracted cannot escape.
            root = zipfile.Path(archive)
            return read_folder(root / "2750" if (root / "2750").is_dir() else root, asked)
    except zipfile.BadZipFile as error:
        raise DataError(f"{place}: the archive is damaged: {error}.", "Copy or download it again.") from None
