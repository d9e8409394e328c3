"""An exported program as an ONNX file, for other languages and runtimes; an optional extra of the package."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.errors import HpoError
from hpo.models.safe_loader import pieces

MODEL = "model.onnx"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def check_installed() -> None:
    """Raise HpoError where the packages of the extra `onnx` are missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise HpoError(
            f"--format onnx: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed.",
            "Install the extra: uv sync --inexact --extra onnx, or pip install onnx onnxruntime onnxscript",
        )


def export_onnx(folder: Path, target: Path) -> Path:
    """Write the network of a logged model's folder as target/model.onnx: the same images in, the same answers out.

    Its input `images` is uint8 (n, height, width, channels), its output `probabilities` float32 (n, classes), n >= 1.
    Class names, image shape and pixel ranges are metadata of the file. Raises HpoError where a layer cannot be written.
    """
    check_installed()
    import onnx
    import torch

    from hpo.models import load_trained, traced

    net, config = load_trained(folder)
    program = traced(net, config)
    images = torch.zeros((2, *config["image_shape"]), dtype=torch.uint8)
    file = target / MODEL
    try:
        # It tells of each of its steps, and warns of its own deprecations.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), _silent("torch.onnx", "onnxscript"):
            warnings.simplefilter("ignore")
            made: Any = torch.onnx.export(
                program,
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=["probabilities"],
                verbose=False,
            )
            made.save(str(file), external_data=False)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise HpoError(f"{folder}: cannot be written as ONNX: {reason}.", "Export it as pt2 or safetensors.") from error
    graph = onnx.load(str(file))
    onnx.helper.set_model_props(graph, {key: _text(value) for key, value in config.items()})
    onnx.save(graph, str(file))
    return file


@contextlib.contextmanager
def _silent(*names: str) -> Any:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class OnnxProgram:
    """An ONNX file in ONNX Runtime on the CPU; it predicts as hpo.models.safe_loader.Program does."""

    def __init__(self, file: Path, *, threads: int = 0) -> None:
        """Load it; threads 0 leaves their number to ONNX Runtime. Raises HpoError where the extra is missing."""
        check_installed()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the file says of itself."""
        found: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        return found

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images (n, height, width, channels) uint8 -> probabilities (n, classes) float32; n >= 0."""
        found = [self._session.run(["probabilities"], {"images": piece})[0] for piece in pieces(images)]
        answers: NDArray[np.float32] = np.concatenate(found).astype(np.float32, copy=False)
        return answers
