"""ONNX Runtime next to the exported program, on a network of every family: largest difference, and time.

    python benchmarks/onnx_latency.py --threads 1

Networks are fresh (random weights) and see random images of 32 x 32 x 3 pixels; those of libraries see 96 pixels.
Times are medians of --calls calls, for one image and for 64. Needs the extra onnx.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hpo.data.cache import models_folder
from hpo.data.prepare import TrialData
from hpo.models import build_model, export_program, save_ensemble, save_trained
from hpo.models.onnx_export import OnnxProgram, export_onnx
from hpo.models.safe_loader import Program
from hpo.models.views import View
from hpo.spec.models import FAMILIES
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import TrainingSpec

SHAPE = (32, 32, 3)
_FRESH = {"weights": "none", "input_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp", "hidden": [512, 256]},
    "cnn": {"kind": "cnn", "filters": 64},
    "convnet": {"kind": "convnet", "filters": [32, 64, 64, 128, 128], "pool_after": [2, 4], "head": "global"},
    "resnet": {"kind": "resnet"},
    "torchvision mobilenet_v2": {"kind": "torchvision", "name": "mobilenet_v2", **_FRESH},
    "timm tf_efficientnet_lite0": {"kind": "timm", "name": "tf_efficientnet_lite0", **_FRESH},
    "fusion of both": {
        "kind": "fusion",
        "backbones": [
            {"kind": "torchvision", "name": "mobilenet_v2", **_FRESH},
            {"kind": "timm", "name": "tf_efficientnet_lite0", **_FRESH},
        ],
    },
    "transfer from convnet": {"kind": "transfer", "from_model": "models:/m-1"},
}
_SYMMETRIES = [asdict(View(mirror, turns)) for mirror in (False, True) for turns in range(4)]


def _cases(folder: Path) -> dict[str, Path]:
    """Folders as logged models have them: each of MODELS, and what is made around networks."""
    _saved(MODELS["convnet"], models_folder() / "m-1")  # what transfer starts from
    made = {name: _saved(plain, folder / name) for name, plain in MODELS.items()}
    three = [_saved(MODELS["convnet"], folder / str(seed), seed=seed) for seed in range(3)]
    save_ensemble(three, ["s#0", "s#1", "s#2"], [2, 1, 1], made.setdefault("ensemble of 3 convnets", folder / "three"))
    seen = made.setdefault("convnet, 8 views, calibrated", _saved(MODELS["convnet"], folder / "seen"))
    config = json.loads((seen / "config.json").read_text())
    (seen / "config.json").write_text(json.dumps({**config, "views": _SYMMETRIES, "temperature": 1.5}))
    for each in made.values():
        export_program(each)
    return made


def _saved(plain: dict[str, Any], folder: Path, *, seed: int = 0) -> Path:
    model = FAMILIES[plain["kind"]].model_validate(plain)
    setup = Setup(data=DataSpec(name="npz"), split=SplitSpec(), model=model, training=TrainingSpec())
    rows = torch.arange(4)
    names = tuple("abcdefgh")
    data = TrialData(torch.zeros((4, *SHAPE), dtype=torch.uint8), rows, rows, rows, names, (0.4,) * 3, (0.2,) * 3)
    save_trained(build_model(model, image_shape=SHAPE, classes=8, seed=seed), setup, data, folder)
    return folder


def _milliseconds(predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray, calls: int) -> float:
    seconds = []
    for _ in range(calls + 3):  # the first three warm up
        began = time.perf_counter()
        predict(images)
        seconds.append(time.perf_counter() - began)
    return 1000 * median(seconds[3:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=30)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = np.random.default_rng(0)
    print("| network | largest difference | 1 image: program | ONNX | 64 images: program | ONNX |")
    print("|---|---|---|---|---|---|")
    images = generator.integers(0, 256, (64, *SHAPE), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HPO_DATA"] = scratch  # for the model that transfer starts from
        for name, folder in _cases(Path(scratch)).items():
            program = Program(folder / "net.pt2")
            onnx = OnnxProgram(export_onnx(folder, folder), threads=given.threads)
            far = float(np.abs(program.predict(images) - onnx.predict(images)).max())
            times = [
                f"{_milliseconds(each.predict, batch, given.calls):.2f} ms"
                for batch in (images[:1], images)
                for each in (program, onnx)
            ]
            print(f"| {name} | {far:.1g} | {' | '.join(times)} |", flush=True)


if __name__ == "__main__":
    main()
