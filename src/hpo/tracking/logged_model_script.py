"""The code inside every logged model: images in the values of its training data in, class probabilities out.

It needs nothing of the platform. MLflow copies this file next to net.pt2 and config.json, runs it when the model is
logged and when it is loaded; so torch is imported only where it is used.
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
        self._ranges = config.get("ranges") or {}
        self._net = torch.export.load(context.artifacts["net"]).module()

    def predict(self, context: Any, model_input: np.ndarray, params: Any = None) -> pd.DataFrame:  # noqa: ARG002
        """Images (n, height, width, channels), of the dtype that the signature names or uint8 -> probabilities.

        One row of float32 per image, a column a class.
        """
        images = np.asarray(model_input)
        limits = self._ranges.get(images.dtype.name, [0, 255] if images.dtype == np.uint8 else None)
        if limits is None:
            raise ValueError(f"images are {images.dtype}; the model takes {', '.join(self._ranges) or 'uint8'}")
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            raise ValueError("images hold NaN or infinite values")
        return pd.DataFrame(self.predict_levels(to_levels(images, *limits)), columns=self._class_names)

    def predict_levels(self, levels: np.ndarray) -> np.ndarray:
        """Images that are scaled to 0 to 255 already, uint8 -> (n, classes) float32."""
        import torch

        rows = [np.empty((0, len(self._class_names)), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(levels), CHUNK_IMAGES):
                # A copy, because torch wants memory that may be written.
                images = torch.from_numpy(np.array(levels[start : start + CHUNK_IMAGES], order="C"))
                rows.append(self._net(images).numpy())
        found: np.ndarray = np.concatenate(rows)
        return found


def to_levels(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values -> uint8: low is 0, high is 255. The formula of hpo.data.pixels.to_levels, as the images were prepared."""
    if values.dtype == np.uint8 and (low, high) == (0, 255):
        return values
    if values.dtype.kind in "iu" and (low, high) == (0, 65535):
        values = values.astype(np.int64).clip(0, 65535) // 257
    else:
        values = np.rint(((values.astype(np.float64) - low) * (255.0 / (high - low))).clip(0.0, 255.0))
    levels: np.ndarray = values.astype(np.uint8)
    return levels


mlflow.models.set_model(ImageClassifier())
