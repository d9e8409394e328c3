"""Own images in one command (`hpo run SOURCE --minutes M`) beside the shipped study of the same minutes.

    python benchmarks/own_data.py --minutes 10 --data FOLDER --work SCRATCH digits fashion blood eurosat cifar pets

FOLDER holds bloodmnist_from_pbc.npz, eurosat_part.tar, cifar10_part.npz, mobilenet_v2_imagenet.pth and
tf_efficientnet_lite0_timm.pth; a set whose files are missing is left out. Each set is written as a user would have it
(a folder, a table or an npz), with a test part that both sides share. Each side runs in a folder of its own, one after
the other. The test part is opened once for each side. --side ours or shipped runs one of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_FASHION = Path("/usr/share/datasets/fashion-mnist")
_PETS = ("cat", "dog")


@dataclass(frozen=True)
class Set:
    """make(data, folder) writes the source and returns it; shipped is the study beside, and what it overrides."""

    make: Callable[[Path, Path], Path]
    shipped: str
    settings: tuple[str, ...] = ()


def _digits(_data: Path, folder: Path) -> Path:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    found = load_digits()
    images = (found.images * (255 / 16)).round().astype(np.uint8)
    rows = train_test_split(np.arange(len(images)), test_size=0.2, stratify=found.target, random_state=0)
    for part, chosen in zip(("train", "test"), rows, strict=True):
        for row in chosen:
            _save(images[row], folder / "digit-photos" / part / str(found.target[row]) / f"{row}.png")
    return folder / "digit-photos"


def _fashion(_data: Path, folder: Path) -> Path:
    import gzip

    arrays = {}
    for part, name in (("train", "train"), ("test", "t10k")):
        for kind, ending, offset in (("images", "idx3", 16), ("labels", "idx1", 8)):
            file = next(_FASHION.glob(f"{name}-{kind}*{ending}*"))
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            values = np.frombuffer(content, np.uint8, offset=offset)
            arrays[f"{part}_{kind}"] = values.reshape(-1, 28, 28) if kind == "images" else values
    np.savez(folder / "clothes.npz", **arrays)
    return folder / "clothes.npz"


def _blood(data: Path, folder: Path) -> Path:
    (folder / "cells.npz").symlink_to((data / "bloodmnist_from_pbc.npz").resolve())
    return folder / "cells.npz"


def _eurosat(data: Path, folder: Path) -> Path:
    with tarfile.open(data / "eurosat_part.tar") as archive:
        names = [name for name in archive.getnames() if name.endswith(".jpg")]
        generator = np.random.default_rng(0)
        by_class: dict[str, list[str]] = {}
        for name in sorted(names):
            by_class.setdefault(Path(name).parent.name, []).append(name)
        for kind, files in by_class.items():
            chosen = set(generator.permutation(len(files))[: len(files) // 5].tolist())
            for number, name in enumerate(files):
                target = folder / "fields" / ("test" if number in chosen else "train") / kind / Path(name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(name).read())  # type: ignore[union-attr]
    return folder / "fields"


_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar_images(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    with np.load(data / "cifar10_part.npz") as file:
        return {part: (file[f"{part}_images"], file[f"{part}_labels"].reshape(-1)) for part in ("train", "test")}


def _cifar(data: Path, folder: Path) -> Path:
    place = folder / "things"
    rows = []
    for part, (images, labels) in _cifar_images(data).items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            _save(image, place / "images" / f"{part}{number}.png")
            rows.append([f"{part}{number}.png", _CIFAR[label], part])
    with (place / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([["image", "label", "part"], *rows])
    return place / "labels.csv"


def _pets(data: Path, folder: Path) -> Path:
    for part, (images, labels) in _cifar_images(data).items():
        for name in _PETS:
            rows = np.flatnonzero(labels == _CIFAR.index(name))
            for row in rows[: 100 if part == "train" else None]:
                _save(images[row], folder / "pets" / part / name / f"{row}.png")
    return folder / "pets"


def _save(image: np.ndarray, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(target)


# The shipped studies are those of the README; eurosat-head is also what a user would take for few photographs.
SETS: dict[str, Set] = {
    "digits": Set(_digits, "digits-cnn"),
    "fashion": Set(_fashion, "fashionmnist-cnn"),
    "blood": Set(_blood, "bloodmnist-best"),
    "eurosat": Set(_eurosat, "eurosat-head", ("model.weights={mobilenet}",)),
    "cifar": Set(_cifar, "cifar10-v3"),
    "pets": Set(_pets, "eurosat-head", ("model.weights={mobilenet}", "training.batch_size=32")),
}
_NAMES = {"": "folder", ".npz": "npz", ".csv": "table"}


@dataclass(frozen=True)
class Side:
    """What one side reached: accuracy on n test images, and the wall time of its run in seconds."""

    accuracy: float
    images: int
    seconds: float
    trials: int

    @property
    def margin(self) -> float:
        """Half of the 95 % interval of a share of n images (normal approximation)."""
        return 1.96 * math.sqrt(self.accuracy * (1 - self.accuracy) / self.images)


def _hpo(words: list[str], home: Path, *, check: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HPO_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-m", "hpo", *words], cwd=home, env=environment, capture_output=True, text=True, check=check
    )


def _run(words: list[str], study: Callable[[], str], home: Path, images: int) -> Side:
    home.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    ended = _hpo(["run", *words], home, check=False)
    seconds = time.monotonic() - began
    print(ended.stdout[-2000:], ended.stderr[-2000:], sep="\n", file=sys.stderr)
    name = study()
    listed = json.loads(_hpo(["trials", name, "--json"], home).stdout)
    registered = json.loads(_hpo(["models", name, "--json"], home).stdout)
    # A run that was cut off before its final training registers none: its best trial stands for it then.
    model = name if registered else f"{name}#{_best(home, name)}"
    (found,) = json.loads(_hpo(["evaluate", model, "--json"], home).stdout)
    return Side(found["scores"]["test_accuracy"], images, seconds, len(listed["trials"]))


def _best(home: Path, study: str) -> int:
    rows = json.loads(_hpo(["status", "--json"], home).stdout)
    return next(int(row["best"]["trial"]) for row in rows if row["study"] == study)


def _test_images(source: Path) -> int:
    if source.suffix == ".npz":
        with np.load(source) as file:
            return len(file["test_labels"])
    if source.suffix == ".csv":
        return source.read_text(encoding="utf-8").count(",test\n")
    return sum(1 for file in (source / "test").rglob("*") if file.is_file())


def main() -> None:
    """Run the sets that are asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="SET", help=", ".join(SETS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--preset", default="good")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the files above")
    parser.add_argument("--work", type=Path, required=True, help="an empty scratch folder")
    parser.add_argument("--side", choices=("ours", "shipped", "both"), default="both")
    given = parser.parse_args()
    given.work, data = given.work.absolute(), given.data.absolute()
    files = {"mobilenet": data / "mobilenet_v2_imagenet.pth", "efficientnet": data / "tf_efficientnet_lite0_timm.pth"}
    weights = [
        f"--weights=tf_efficientnet_lite0={files['efficientnet']}",
        f"--weights=mobilenet_v2={files['mobilenet']}",
    ]
    rows: list[dict[str, Any]] = []
    for name in given.sets:
        chosen, folder = SETS[name], given.work / name
        folder.mkdir(parents=True)
        try:
            source = chosen.make(data, folder)
        except (OSError, StopIteration) as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        row: dict[str, Any] = {"set": name}
        images = _test_images(source)
        if given.side != "shipped":
            home = folder / "ours"
            words = [str(source), "--minutes", str(given.minutes), "--preset", given.preset, *weights]
            row["ours"] = _run(words, lambda home=home: next((home / "studies").glob("*.yaml")).stem, home, images)
        if given.side != "ours":
            settings = [f"data.name={_NAMES[source.suffix]}", f"data.path={source}", *chosen.settings]
            settings += ["data.size=null"] if source.suffix == ".npz" else []
            settings += ["data.part=part"] if source.suffix == ".csv" else []
            words = [chosen.shipped, "--timeout", f"{int(60 * given.minutes)}"]
            words += [word for text in settings for word in ("--set", text.format(**files))]
            row["shipped"] = _run(words, lambda chosen=chosen: chosen.shipped, folder / "shipped", images)
        rows.append(row)
        print(json.dumps({key: vars(value) if isinstance(value, Side) else value for key, value in row.items()}))
    print("\n| set | test images | hpo run SOURCE | wall | trials | shipped study | wall | trials |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"| {row['set']} "]
        sides = [row.get("ours"), row.get("shipped")]
        cells.append(f"| {next(side.images for side in sides if side)} ")
        for side in sides:
            told = (
                f"{side.accuracy:.4f} ± {side.margin:.4f} | {side.seconds:.0f} s | {side.trials}"
                if side
                else "- | - | -"
            )
            cells.append(f"| {told} ")
        print("".join(cells) + "|")


if __name__ == "__main__":
    main()
