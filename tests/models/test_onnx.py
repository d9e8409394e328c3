"""A network of every family, and what is made around networks, answers in ONNX Runtime as its program does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo.data.cache import models_folder
from hpo.data.prepare import TrialData
from hpo.errors import HpoError
from hpo.models import TrainedNet, build_model, export_program, onnx_export, save_ensemble, save_trained
from hpo.models.safe_loader import Program, pieces
from hpo.models.views import View
from hpo.spec.models import FAMILIES
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import TrainingSpec
from small_nets import SQUEEZE, TINY, weights_file

SHAPE, CLASSES = (32, 32, 3), ("a", "b", "c")
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "hidden": [16, 8], "batch_norm": True},
    "cnn": {"kind": "cnn", "filters": 4, "pool_type": "average"},
    "convnet": {"kind": "convnet", "filters": [8, 16], "head": "global", "activation": "gelu"},
    "resnet": {"kind": "resnet", "width": 8, "shortcut_batch_norm": True},
    "torchvision": {**SQUEEZE, "levels": "all", "freeze": "all", "input_size": 48},
    "timm": {**TINY, "freeze": "all", "input_size": 64},
    "fusion": {"kind": "fusion", "backbones": [SQUEEZE, TINY], "freeze": "all"},
    "transfer": {"kind": "transfer", "from_model": "models:/m-1", "freeze": "all"},
}
VIEWS = [
    View(),
    View(mirror=True, turns=1),
    View(right=2, down=-1),
    View(crop=(2, 2, 28, 28)),
    View(down=1, fill="black"),
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {net["name"]: str(weights_file(net, folder)) for net in (SQUEEZE, TINY)}


def saved(plain: dict[str, Any], weights: dict[str, str], folder: Path, *, seed: int = 0, mean: float = 0.4) -> Path:
    """A folder as export_program takes it, of a fresh network; those of libraries with the weights of a file."""
    plain = {**plain}
    if plain["kind"] == "fusion":
        plain["backbones"] = [
            {**each, "weights": weights[each["name"]], "input_size": 64, "levels": "all"} for each in plain["backbones"]
        ]
    elif "name" in plain:
        plain["weights"] = weights[plain["name"]]
    model = FAMILIES[plain["kind"]].model_validate(plain)
    setup = Setup(data=DataSpec(name="npz"), split=SplitSpec(), model=model, training=TrainingSpec())
    rows = torch.arange(4)
    data = TrialData(torch.zeros((4, *SHAPE), dtype=torch.uint8), rows, rows, rows, CLASSES, (mean,) * 3, (0.2,) * 3)
    save_trained(build_model(model, image_shape=SHAPE, classes=3, seed=seed), setup, data, folder)
    return folder


def ensemble(weights: dict[str, str], folder: Path) -> Path:
    """Of two networks of other families, which normalise images otherwise, one of which counts twice."""
    members = [
        saved(MODELS[name], weights, folder / name, mean=mean) for name, mean in (("convnet", 0.4), ("mlp", 0.6))
    ]
    save_ensemble(members, ["s#0", "s#1"], [2, 1], folder / "both")
    return folder / "both"


def with_config(**more: Any) -> Callable[[dict[str, str], Path], Path]:
    def make(weights: dict[str, str], folder: Path) -> Path:
        saved(MODELS["convnet"], weights, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **more}))
        return folder

    return make


AROUND = {
    "ensemble": ensemble,
    "views": with_config(views=[asdict(view) for view in VIEWS]),
    "calibrated": with_config(temperature=1.7),
    "several labels": with_config(several_labels=True),
}


@pytest.mark.parametrize("name", [*MODELS, *AROUND])
def test_onnx_answers_as_the_program_for_any_number_of_images(
    name: str, weights: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"the extra onnx is not installed: {package}")
    monkeypatch.setenv("HPO_DATA", str(tmp_path))
    saved(MODELS["cnn"], weights, models_folder() / "m-1")  # what transfer starts from
    folder = tmp_path / "model"
    folder = AROUND[name](weights, folder) if name in AROUND else saved(MODELS[name], weights, folder)
    export_program(folder)
    program = onnx_export.OnnxProgram(onnx_export.export_onnx(folder, tmp_path))
    for count in (0, 1, 2, 7):
        images = np.random.default_rng(count).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
        np.testing.assert_allclose(program.predict(images), Program(folder / "net.pt2").predict(images), atol=1e-4)
    assert program.metadata["class_names"] == '["a", "b", "c"]'


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HpoError, match="onnx, onnxruntime, onnxscript are not installed") as caught:
        onnx_export.check_installed()
    assert "--extra onnx" in caught.value.hint


def test_every_family_has_a_case() -> None:
    assert {plain["kind"] for plain in MODELS.values()} == {*FAMILIES}


def test_large_images_are_few_at_a_time_in_every_format(weights: dict[str, str], tmp_path: Path) -> None:
    """64 photographs of 1,000 pixels at a time would be gigabytes within a network."""
    images = np.zeros((20, 1000, 1000, 1), np.uint8)
    assert [len(piece) for piece in pieces(images)] == [8, 8, 4]
    assert [len(piece) for piece in pieces(images[:, :32, :32])] == [20]
    seen: list[int] = []
    net = TrainedNet(saved(MODELS["mlp"], weights, tmp_path))
    net._whole = lambda batch: seen.append(len(batch)) or torch.zeros(len(batch), 3)  # type: ignore[assignment]
    assert net.predict(images).shape == (20, 3)
    assert seen == [8, 8, 4]
