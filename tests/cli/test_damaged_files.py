"""Whatever is in a file that hpo reads, its commands answer, or end with a line on which file and what to do."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hpo.cli.app import app

runner = CliRunner()
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def place(finished: Path) -> Path:
    """A folder with two trials of digits-mlp, their models, the prepared digits, and images of all kinds."""
    noise = np.random.default_rng(0)
    arrays = {"train_images": noise.integers(0, 256, (60, 8, 8, 3), np.uint8), "train_labels": np.arange(60) % 3}
    np.savez(finished / "own.npz", **arrays)
    np.savez_compressed(finished / "packed.npz", **arrays, class_names=np.array(["a", "b", "c"]))
    for ending in ("png", "jpg", "gif", "bmp", "tiff", "webp"):
        for label in "ab":
            target = finished / ending / label
            target.mkdir(parents=True)
            for number in range(8):
                Image.fromarray(noise.integers(0, 256, (8, 8, 3), np.uint8)).save(target / f"{number}.{ending}")
    return finished


def cut(raw: bytearray, chance: random.Random) -> bytearray:
    return raw[: chance.randrange(len(raw) or 1)]


def flip(raw: bytearray, chance: random.Random) -> bytearray:
    for _ in range(chance.choice([1, 3, 30])):
        raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return raw


def flip_first(raw: bytearray, chance: random.Random) -> bytearray:
    raw[chance.randrange(min(200, len(raw)))] ^= 1 << chance.randrange(8)
    return raw


def flip_last(raw: bytearray, chance: random.Random) -> bytearray:
    raw[-1 - chance.randrange(min(400, len(raw)))] ^= 1 << chance.randrange(8)
    return raw


def blank(raw: bytearray, chance: random.Random) -> bytearray:
    start = chance.randrange(len(raw))
    return raw[:start] + bytes(len(raw) - start)


def other(raw: bytearray, chance: random.Random) -> bytearray:
    return bytearray(chance.randbytes(500))


def empty(raw: bytearray, chance: random.Random) -> bytearray:
    return bytearray()


def odd_json(raw: bytearray, chance: random.Random) -> bytearray:
    texts = ["null", "[]", "{}", '"x"', "[" * 100_000, '{"a": NaN}', '{"flavors": 3}', '{"class_names": 1}', "\x00"]
    texts += ['{"class_names": ["a"], "image_shape": [8, 8]}', '{"class_names": null, "image_shape": [8, 8, 1]}']
    return bytearray(chance.choice(texts).encode())


DAMAGES: list[Callable[[bytearray, random.Random], bytearray]] = [cut, flip, flip_first, flip_last, blank, other, empty]


@contextmanager
def damaged(file: Path, damage: Callable[[bytearray, random.Random], bytearray], seed: int) -> Iterator[None]:
    """The file with that damage, and as it was afterwards."""
    whole = file.read_bytes()
    times = file.stat()
    file.write_bytes(damage(bytearray(whole), random.Random(f"{damage.__name__}{seed}")))  # noqa: S311
    try:
        yield
    finally:
        file.write_bytes(whole)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def ends_well(*words: object) -> None:
    """The command answers, or ends with one line `error:` and at most one more that says what to do."""
    result = runner.invoke(app, [str(word) for word in words])
    said = f"hpo {' '.join(map(str, words))}: {result.exit_code}\n{result.output}"
    assert result.exit_code in (0, 2), said
    assert "Traceback" not in result.output, said
    assert "unexpected error" not in result.output, said
    if result.exit_code == 2:
        lines = result.stderr.splitlines()
        assert lines[0].startswith('{"error": ' if "--json" in words else "error: "), said
        assert len(lines) <= 2, said


def model_folder(place: Path) -> Path:
    return next(place.glob("mlruns/artifacts/digits-mlp/models/m-*/artifacts/MLmodel")).parent


def read_model(place: Path, file: str, damage: Callable[[bytearray, random.Random], bytearray], seed: int) -> None:
    folder, image = model_folder(place), place / "png" / "a" / "0.png"
    with damaged(folder / file, damage, seed):
        ends_well("predict", folder, image)
        if seed == 0 or file == "artifacts/setup.json":
            ends_well("explain", folder, image, "--out", place / "explained", "--method", "gradient")


def read_images(place: Path, ending: str, damage: Callable[[bytearray, random.Random], bytearray], seed: int) -> None:
    image = place / ending / "a" / f"0.{ending}"
    with damaged(image, damage, seed):
        ends_well("predict", model_folder(place), image)
        if ending != "gif":  # of which a folder takes none
            ends_well("data", "show", "folder", "--path", place / ending, "--json")


def read_npz(place: Path, file: str, damage: Callable[[bytearray, random.Random], bytearray], seed: int) -> None:
    with damaged(place / file, damage, seed):
        ends_well("data", "show", "npz", "--path", place / file, "--json")


def read_prepared(place: Path, file: str, damage: Callable[[bytearray, random.Random], bytearray], seed: int) -> None:
    for found in [*place.glob(f"data/prepared/*/*/{file}"), *place.glob(f"data/prepared/index/{file}")]:
        with damaged(found, damage, seed):
            ends_well("data", "show", "digits", "--json")
            if seed == 0:
                ends_well("report", "digits-mlp", "--home", place, "--out", place / "report.html")
    ends_well("data", "show", "digits", "--json")


def read_store(place: Path, file: str, damage: Callable[[bytearray, random.Random], bytearray], seed: int) -> None:
    home = place / f"store-{file}-{damage.__name__}-{seed}"
    shutil.copytree(
        place / "mlruns", home / "mlruns", ignore=shutil.ignore_patterns("artifacts", "work", "*-wal", "*-shm")
    )
    for name in ("optuna.db", "mlflow.db"):
        with sqlite3.connect(place / "mlruns" / name) as source, sqlite3.connect(home / "mlruns" / name) as target:
            source.backup(target)
    with damaged(home / "mlruns" / file, damage, seed):
        ends_well("trials", "digits-mlp", "--home", home)
        ends_well("models", "--home", home)
        ends_well("predict", "digits-mlp", place / "png" / "a" / "0.png", "--home", home)
        if seed == 0:
            ends_well("report", "digits-mlp", "--home", home, "--out", place / "report.html")
            ends_well("promote", "digits-mlp", "--home", home)
    shutil.rmtree(home)


CASES = [(read_model, f"artifacts/{name}") for name in ("net.pt2", "config.json", "setup.json")]
CASES += [(read_model, "MLmodel")]
CASES += [(read_images, ending) for ending in ("png", "jpg", "gif", "bmp", "tiff", "webp")]
CASES += [(read_npz, "own.npz"), (read_npz, "packed.npz")]
CASES += [(read_prepared, name) for name in ("development_images.npy", "development_labels.npy", "*.json")]
CASES += [(read_store, name) for name in ("optuna.db", "mlflow.db", "openings.jsonl")]
FILES = [f"{read.__name__}-{file}".replace("/", "-") for read, file in CASES]


def kinds(file: str) -> list[Callable[[bytearray, random.Random], bytearray]]:
    return [*DAMAGES, odd_json] if file.endswith((".json", "MLmodel", ".jsonl")) else DAMAGES


@pytest.fixture
def whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, with a ledger of one opening."""
    monkeypatch.setenv("HPO_DATA", str(place / "data"))
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(place)
    if not (place / "mlruns" / "openings.jsonl").is_file():
        ends_well("promote", "digits-mlp", "--home", place)
    return place


# Of the image files one format here; each of them below.
FEW = [case for case in zip(CASES, FILES, strict=True) if case[0][0] is not read_images or case[0][1] == "png"]


@pytest.mark.parametrize(("read", "file"), [case for case, _ in FEW], ids=[name for _, name in FEW])
def test_a_damaged_file_is_told_in_a_line(whole: Path, read: Callable[..., None], file: str) -> None:
    for damage in {cut, kinds(file)[-1]}:
        read(whole, file, damage, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("read", "file"), CASES, ids=FILES)
def test_a_file_damaged_in_each_way_is_told_in_a_line(whole: Path, read: Callable[..., None], file: str) -> None:
    for damage in kinds(file):
        read(whole, file, damage, 2)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("read", "file"), CASES, ids=FILES)
def test_a_file_damaged_in_many_ways_is_told_in_a_line(whole: Path, read: Callable[..., None], file: str) -> None:
    for seed in [0, 1, *range(3, 20)]:
        for damage in kinds(file):
            read(whole, file, damage, seed)
