"""The code inside every logged model: raw uint8 images in, class probabilities out, without the platform.

MLflow copies this file beside net.pt2 and config.json, runs it when the model is logged and when it is loaded; so torch
is imported only where it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

# Bounds the memory of a request; larger chunks are not faster on a CPU.
CHUNK_IMAGES = 64


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """An exported program with the names of its classes; it runs on the CPU."""

    def load_context(self, context: Any) -> None:
        """Read net.pt2, a program from (n, height, width, channels) uint8 to (n, classes) float32, and config.json."""
        import torch

        config = json.loads(Path(context.artifacts["config"]).read_text(encoding="utf-8"))
        self._class_names = list(config["class_names"])
        self._net = torch.export.load(context.artifacts["net"]).module()

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """Images (n, height, width, channels) uint8 -> one row of float32 probabilities per image, a column a class."""
        import torch

        rows = [np.empty((0, len(self._class_names)), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(model_input), CHUNK_IMAGES):
                # A copy, because torch wants memory that may be written.
                images = torch.from_numpy(np.array(model_input[start : start + CHUNK_IMAGES], order="C"))
                rows.append(self._net(images).numpy())
        return pd.DataFrame(np.concatenate(rows), columns=self._class_names)


mlflow.models.set_model(ImageClassifier())
