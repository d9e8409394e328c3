"""Every study that ships runs from end to end: one epoch, few trials, on small images made here."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import models

from hpo.execute.run_study import run_study
from hpo.jobs.promote import promote
from hpo.records import FINAL, TrialState
from hpo.spec.files import study_files
from hpo.spec.load import load_study
from hpo.spec.models import FusionSpec, TimmSpec, TorchvisionSpec
from hpo.spec.study import StudySpec


def _images(count: int, side: int, channels: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise around a grey level that tells the class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    levels = np.linspace(30, 220, classes)[labels][:, None, None, None]
    pixels = generator.normal(levels, 20, (count, side, side, channels)).clip(0, 255).astype(np.uint8)
    return pixels, labels


@pytest.fixture(scope="module")
def data_paths(tmp_path_factory) -> dict[str, Path]:
    """A small file in the format of each data set that a study names."""
    folder = tmp_path_factory.mktemp("data")
    for name, side, classes, parts in (
        ("bloodmnist", 28, 8, ("train", "val", "test")),
        ("bloodmnist-64", 64, 8, ("train", "val", "test")),
        ("cifar10", 32, 10, ("train", "test")),
    ):
        arrays = {}
        for seed, part in enumerate(parts):
            images, labels = _images(240 if part == "train" else 80, side, 3, classes, seed)
            arrays |= {f"{part}_images": images, f"{part}_labels": labels[:, None]}
        np.savez(folder / f"{name}.npz", **arrays)
    idx = folder / "fashionmnist"
    idx.mkdir()
    for seed, (prefix, count) in enumerate((("train", 300), ("t10k", 100))):
        images, labels = _images(count, 28, 1, 10, seed)
        for kind, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels.astype(np.uint8))):
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (idx / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    images, labels = _images(200, 64, 3, 10, 0)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / "eurosat" / "2750" / f"class {label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.jpg")
    files = {name: folder / f"{name}.npz" for name in ("bloodmnist", "bloodmnist-64", "cifar10")}
    return files | {"fashionmnist": idx, "eurosat": folder / "eurosat"}


def _weights(spec: StudySpec, folder: Path) -> dict[str, object]:
    """Overrides that let the networks of others begin with random weights from a file, on small images."""
    places = {}
    for name, made in (("mobilenet_v2", models.mobilenet_v2), ("tf_efficientnet_lite0", timm.create_model)):
        file = folder / f"{name}.pth"
        torch.save((made(name) if made is timm.create_model else made()).state_dict(), file)
        places[name] = {"weights": str(file), "input_size": 32}
    model = spec.model
    if isinstance(model, FusionSpec):
        backbones = [{"kind": each.kind, "name": each.name, **places[each.name]} for each in model.backbones]
        return {"model.backbones": backbones}
    if not isinstance(model, (TorchvisionSpec, TimmSpec)):
        return {}
    if model.name not in places:  # from scratch only: a file of AlexNet would be 240 MB
        return {"model.weights": "none", "search.start": [], "search.space": {"model.dropout": {"float": [0.0, 0.5]}}}
    given: dict[str, object] = {f"model.{key}": value for key, value in places[model.name].items()}
    if "model.weights" in spec.search.space.root:
        given["search.space.model.weights"] = {"choice": [places[model.name]["weights"], "none"]}
        given["search.space.model.freeze"] = {
            "choice": ["none", 8, "all"],
            "when": {"model.weights": places[model.name]["weights"]},
        }
        given["search.start"] = []
    return given


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(study_files()))
def test_study_runs_offline(name, data_paths, tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plain = load_study(name)
    overrides = {"training.epochs": 1, "training.patience": None, "training.precision": "float32"}
    source = "bloodmnist-64" if plain.data.size == 64 else plain.data.name
    if source in data_paths:
        overrides["data.path"] = data_paths[source]
    overrides |= _weights(plain, tmp_path)
    if plain.model.kind == "transfer":
        first = {
            "training.epochs": 1,
            "training.precision": "float32",
            "data.path": data_paths["bloodmnist"],
            "final": None,
        }
        run_study(load_study("bloodmnist-cnn", overrides=first), trials=1, workers=0, home=tmp_path)
        promote("bloodmnist-cnn", home=tmp_path)
    if plain.final is not None:
        overrides["final.set"] = {"training.epochs": 1}
    spec = load_study(name, overrides=overrides)
    study = run_study(spec, trials=None if spec.search.stages else 2, workers=0, home=tmp_path)
    states = {trial.state for trial in study.trials}
    assert states <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert study.best is not None
    stages = [trial.candidate.stage for trial in study.trials]
    assert {stage.name for stage in spec.search.stages} <= set(stages)
    assert (FINAL in stages) == (spec.final is not None)
