"""A network of every family answers in ONNX Runtime as its exported program does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo.data.prepare import TrialData
from hpo.errors import HpoError
from hpo.models import build_model, export_program, onnx_export, save_trained
from hpo.models.safe_loader import Program
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
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("weights")
    return {net["name"]: str(weights_file(net, folder)) for net in (SQUEEZE, TINY)}


def exported(plain: dict[str, Any], weights: dict[str, str], folder: Path) -> Path:
    """A folder as a logged model has it, of a fresh network; those of libraries with the weights of a file."""
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
    data = TrialData(torch.zeros((4, *SHAPE), dtype=torch.uint8), rows, rows, rows, CLASSES, (0.4,) * 3, (0.2,) * 3)
    save_trained(build_model(model, image_shape=SHAPE, classes=3, seed=0), setup, data, folder)
    export_program(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_onnx_answers_as_the_program_for_any_number_of_images(
    name: str, weights: dict[str, str], tmp_path: Path
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"the extra onnx is not installed: {package}")
    folder = exported(MODELS[name], weights, tmp_path / "model")
    program = onnx_export.OnnxProgram(onnx_export.export_onnx(folder, tmp_path))
    for count in (1, 2, 7):
        images = np.random.default_rng(count).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
        np.testing.assert_allclose(program.predict(images), Program(folder / "net.pt2").predict(images), atol=1e-4)
    assert program.metadata["class_names"] == '["a", "b", "c"]'


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HpoError, match="onnx, onnxruntime, onnxscript are not installed") as caught:
        onnx_export.check_installed()
    assert "--extra onnx" in caught.value.hint
