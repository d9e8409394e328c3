"""ONNX Runtime beside the exported program, on a network of every family: largest difference, and time an image.

    python benchmarks/onnx_latency.py --threads 1

Networks are fresh (random weights) and see random images of 32 x 32 x 3 pixels; those of libraries see 96 pixels.
Times are medians of 30 calls, for one image and for 64. Needs the extra onnx.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hpo.data.prepare import TrialData
from hpo.models import build_model, export_program, save_trained
from hpo.models.onnx_export import OnnxProgram, export_onnx
from hpo.models.safe_loader import Program
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
}


def _exported(plain: dict[str, Any], folder: Path) -> Path:
    model = FAMILIES[plain["kind"]].model_validate(plain)
    setup = Setup(data=DataSpec(name="npz"), split=SplitSpec(), model=model, training=TrainingSpec())
    rows = torch.arange(4)
    names = tuple("abcdefgh")
    data = TrialData(torch.zeros((4, *SHAPE), dtype=torch.uint8), rows, rows, rows, names, (0.4,) * 3, (0.2,) * 3)
    save_trained(build_model(model, image_shape=SHAPE, classes=8, seed=0), setup, data, folder)
    export_program(folder)
    return folder


def _milliseconds(predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> float:
    seconds = []
    for _ in range(33):  # the first three warm up
        began = time.perf_counter()
        predict(images)
        seconds.append(time.perf_counter() - began)
    return 1000 * median(seconds[3:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    generator = np.random.default_rng(0)
    print("| network | largest difference | 1 image: program | ONNX | 64 images: program | ONNX |")
    print("|---|---|---|---|---|---|")
    for name, plain in MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = _exported(plain, Path(scratch) / "model")
            program = Program(folder / "net.pt2")
            onnx = OnnxProgram(export_onnx(folder, Path(scratch)), threads=given.threads)
            images = generator.integers(0, 256, (64, *SHAPE), dtype=np.uint8)
            far = float(np.abs(program.predict(images) - onnx.predict(images)).max())
            times = [
                f"{_milliseconds(each.predict, batch):.2f} ms"
                for batch in (images[:1], images)
                for each in (program, onnx)
            ]
        print(f"| {name} | {far:.1g} | {' | '.join(times)} |", flush=True)


if __name__ == "__main__":
    main()
