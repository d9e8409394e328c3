"""The table of data sets: where each comes from, at which sizes, under which licence."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from hpo.data.cache import fetch, md5_of
from hpo.data.folders import Asked, Parts, read_folder, read_labelled_table
from hpo.data.readers import package_file, read_cifar10, read_digits, read_eurosat, read_idx, read_npz, read_own
from hpo.errors import DataError


@dataclass(frozen=True)
class Download:
    """One published file; name is its place in the cache's folder of downloads."""

    url: str
    md5: str
    name: str


@dataclass(frozen=True)
class Source:
    """How to get one data set.

    read(place, asked) reads its files; only a folder's images are resized. sizes are the sides in pixels that it comes
    at, the first by default; empty: any, as the user's own files are. downloads(size) lists the published files; one is
    read as a file, several as the folder they lie in. installed() is where a package puts the data.
    """

    read: Callable[[Path, Asked], Parts]
    sizes: tuple[int, ...] = ()
    downloads: Callable[[int], tuple[Download, ...]] = lambda _: ()
    installed: Callable[[], Path | None] = lambda: None
    takes_path: bool = True
    class_names: Callable[[], tuple[str, ...]] = lambda: ()
    licence: str = ""
    citation: str = ""

    @property
    def needs_path(self) -> bool:
        """Whether the user must say where the images are."""
        return not self.sizes


@cache
def medmnist_info() -> Mapping[str, Mapping[str, Any]]:
    """medmnist.INFO: flag -> url, MD5, task, label, license, ... for each data set of the installed package."""
    # Read, not imported: importing medmnist imports torch and torchvision and makes a folder in the user's home.
    tree = ast.parse(package_file("medmnist", "info.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "INFO":
            info: dict[str, dict[str, Any]] = ast.literal_eval(node.value)
            return info
    raise DataError("the installed medmnist has no table INFO.", "Install a tested version: medmnist 3.0.2")


def _medmnist_downloads(flag: str, size: int) -> tuple[Download, ...]:
    info, suffix = medmnist_info()[flag], "" if size == 28 else f"_{size}"
    return (Download(info[f"url{suffix}"], info[f"MD5{suffix}"], f"{flag}{suffix}.npz"),)


def _medmnist_names(flag: str) -> tuple[str, ...]:
    label = medmnist_info()[flag]["label"]
    return tuple(label[str(number)] for number in range(len(label)))


# As in torchvision.datasets, whose import would take seconds; a test compares.
_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
_FASHION = tuple(Download(_FASHION_URL + name, md5, f"fashionmnist/{name}") for name, md5 in _FASHION_FILES.items())
_CIFAR10 = Download(
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
    "cifar-10-python.tar.gz",
)
_EUROSAT = Download(
    "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/EuroSAT.zip",
    "c8fa014336c82ac7804f0398fcb19387",
    "EuroSAT.zip",
)


def _fashion_installed() -> Path | None:
    folder = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
    return folder if folder.is_dir() else None


def _words(text: str) -> Callable[[], tuple[str, ...]]:
    return lambda: tuple(text.split(", "))


# All 2D sets of medmnist, with their licences.
_MEDMNIST = {
    "pathmnist": "CC BY 4.0",
    "chestmnist": "CC BY 4.0",
    "dermamnist": "CC BY-NC 4.0",
    "octmnist": "CC BY 4.0",
    "pneumoniamnist": "CC BY 4.0",
    "retinamnist": "CC BY 4.0",
    "breastmnist": "CC BY 4.0",
    "bloodmnist": "CC BY 4.0",
    "tissuemnist": "CC BY 4.0",
    "organamnist": "CC BY 4.0",
    "organcmnist": "CC BY 4.0",
    "organsmnist": "CC BY 4.0",
}

DATASETS: dict[str, Source] = {
    flag: Source(
        read=read_npz,
        sizes=(28, 64, 128, 224),
        downloads=partial(_medmnist_downloads, flag),
        class_names=partial(_medmnist_names, flag),
        licence=licence,
        citation="Yang et al. 2023, MedMNIST v2, Scientific Data 10:41, doi:10.1038/s41597-022-01721-8",
    )
    for flag, licence in _MEDMNIST.items()
} | {
    "fashionmnist": Source(
        read=read_idx,
        sizes=(28,),
        downloads=lambda _: _FASHION,
        installed=_fashion_installed,
        class_names=_words("T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"),
        licence="MIT",
        citation="Xiao et al. 2017, Fashion-MNIST, arXiv:1708.07747",
    ),
    "cifar10": Source(
        read=read_cifar10,
        sizes=(32,),
        downloads=lambda _: (_CIFAR10,),
        class_names=_words("airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"),
        citation="Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images",
    ),
    "eurosat": Source(
        read=read_eurosat,
        sizes=(64,),
        downloads=lambda _: (_EUROSAT,),
        licence="MIT",
        citation="Helber et al. 2019, EuroSAT, IEEE JSTARS 12(7), doi:10.1109/JSTARS.2019.2918242",
    ),
    "digits": Source(
        read=read_digits,
        sizes=(8,),
        installed=lambda: package_file("sklearn", "datasets", "data", "digits.csv.gz"),
        takes_path=False,
        licence="CC BY 4.0",
        citation="Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, doi:10.24432/C50P49",
    ),
    "npz": Source(read=read_npz),
    "folder": Source(read=read_folder),
    "table": Source(read=read_labelled_table),
}

# What medmnist's table says of its tasks, where they are more than to tell classes apart.
_TASK_SCORES = {"ordinal-regression": ("valid_class_error", "valid_quadratic_kappa")}


def task_of(name: str) -> str:
    """The task of a data set in medmnist's words, such as multi-class; "" for data sets of elsewhere."""
    return str(medmnist_info()[name]["task"]) if name in _MEDMNIST else ""


def scores_of(name: str) -> tuple[str, ...]:
    """The scores that a data set has beyond those of every classifier: for grades, how far a prediction is off."""
    return _TASK_SCORES.get(task_of(name), ())


@dataclass(frozen=True)
class Gathered:
    """What a source gave, and the story of its files: origin is a URL or a path, official as in DataCard."""

    parts: Parts
    origin: str
    official: bool
    licence: str = ""
    citation: str = ""


def find(name: str, *, size: int | None, path: str | None) -> Source:
    """The data set's source, once name, size and path are known to fit together. Raises DataError.

    A name with a colon is a function of the user's own (see read_own).
    """
    if ":" in name:
        return Source(read=partial(read_own, name), installed=lambda: Path(name))
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1)
        raise DataError(
            f"data.name: there is no data set {name!r}.",
            f"Did you mean {close[0]}?" if close else f"Known: {', '.join(DATASETS)}.",
        )
    source = DATASETS[name]
    if size is not None and source.sizes and size not in source.sizes:
        sides = " or ".join(map(str, source.sizes))
        raise DataError(f"data.size: {name} comes at {sides} pixels, got {size}.", f"--set data.size={source.sizes[0]}")
    if path is None and source.needs_path:
        raise DataError(f"data.path: {name} needs the place of your images.", "Add it: --set data.path=PATH")
    if path is not None and not source.takes_path:
        raise DataError(f"data.path: {name} comes with hpo, got {path}.", "Remove data.path.")
    if path is not None and not Path(path).exists():
        raise DataError(f"data.path: {path}: no such file or folder.", "Correct the path.")
    if path is not None and not (Path(path).is_file() or Path(path).is_dir()):
        raise DataError(f"data.path: {path}: it is a pipe or a device, not a file.", "Correct the path.")
    return source


def gather(source: Source, asked: Asked, *, downloads: Path) -> Gathered:
    """Find or fetch the files of a source, as found for this size and path, and read them.

    downloads is the folder that keeps published files. A path of the user's own is read whatever its checksum;
    anything else has the publisher's, or comes with an installed package. Raises DataError.
    """
    path, size = asked.data.path, asked.size
    if path is not None:
        place, origin = Path(path), path
        official = _is_official(place, [file for side in source.sizes for file in source.downloads(side)])
    elif installed := source.installed():
        # What a package manager has put there, it has verified; it need not be the publisher's, byte for byte.
        published = source.downloads(source.sizes[0]) if source.sizes else ()
        place, origin = installed, str(installed)
        official = not published or _is_official(place, published)
    else:
        wanted = source.downloads(size or source.sizes[0])
        files = [fetch(file.url, md5=file.md5, path=downloads / file.name, progress=asked.progress) for file in wanted]
        place, origin, official = files[0] if len(files) == 1 else files[0].parent, wanted[0].url, True
    asked.progress(f"reading {place}", 0, 0)
    parts = source.read(place, asked)
    if asked.group and not parts.groups:
        raise DataError(f"split.group: {asked.data.name} knows no groups of images.", "Leave split.group out.")
    if not parts.class_names:
        parts = replace(parts, class_names=source.class_names())
    return Gathered(parts, origin, official or parts.verified, source.licence, source.citation)


def _is_official(place: Path, published: Sequence[Download]) -> bool:
    """Whether a file is one of those published, or a folder holds all of them."""
    if place.is_file():
        return bool(published) and md5_of(place) in {file.md5 for file in published}
    files = [(place / Path(file.name).name, file.md5) for file in published]
    return len(files) > 1 and all(path.is_file() and md5_of(path) == md5 for path, md5 in files)
