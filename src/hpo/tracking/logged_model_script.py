"""The code inside every logged model: images in the values of its training data in, class probabilities out.

It needs nothing of the platform. MLflow copies this file next to net.pt2, config.json, safe_loader.py and
interpreter.py, runs it when the model is logged and when it is loaded; so safe_loader.py, which imports torch, is run
only where it is used.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import numpy as np
import pandas as pd


class ImageClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[misc]
    """An exported program with the names of its classes; it runs on the CPU."""

    def load_context(self, context: Any) -> None:
        """Read config.json and net.pt2, a program from (n, height, width, channels) uint8 to (n, classes) float32.

        A program that could do more than compute is refused.
        """
        file = Path(context.artifacts["safe_loader"])
        self._loader = ModuleType("safe_loader")
        self._loader.__file__ = str(file)
        # Not imported: several models may be loaded, each with its own, and no cache of bytes is written beside it.
        exec(compile(file.read_text(encoding="utf-8"), file, "exec"), self._loader.__dict__)  # noqa: S102
        config = self._loader.read_config(Path(context.artifacts["config"]))
        self._class_names = config["class_names"]
        self._several = bool(config.get("several_labels"))
        self._ranges = config.get("ranges") or {}
        self._program = self._loader.Program(Path(context.artifacts["net"]))

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
        found: np.ndarray = self._loader.check_answers(
            self._program.predict(levels),
            images=len(levels),
            classes=len(self._class_names),
            several=self._several,
        )
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
