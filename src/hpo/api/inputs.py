"""Images that are objects in memory, written to a file once, so that workers, later runs and `hpo rerun` find them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.errors import DataError

_PARTS = {"train": "train", "valid": "val", "val": "val", "test": "test"}
_EXAMPLE = "Give data=(images, labels), data=dataset, or data={'train': ..., 'valid': ..., 'test': ...}."


def data_place(data: Any, *, folder: Path, name: str) -> tuple[dict[str, Any], bool]:
    """The `data` of a study file for images in memory, and whether they have a validation part. Raises DataError.

    data is (images, labels), a dataset, or a mapping of train, valid and test to either, with class_names if wanted.
    images are arrays (n, height, width) or (n, height, width, channels), or tensors (n, channels, height, width). A
    dataset has a length and gives (image, label), as those of torch and torchvision do; its `classes` are the names.
    They are written to a file in folder, which is named by the study and their content.
    """
    given = data if isinstance(data, Mapping) else {"train": data}
    unknown = [key for key in given if key not in (*_PARTS, "class_names")]
    if unknown or "train" not in given:
        wrong = f"{', '.join(map(repr, unknown))} is unknown" if unknown else "'train' is missing"
        raise DataError(f"data: {wrong}.", _EXAMPLE)
    arrays: dict[str, NDArray[Any]] = {}
    names = given.get("class_names", getattr(given["train"], "classes", None))
    if names is not None:
        arrays["class_names"] = np.array(list(map(str, names)))
    for part, prefix in _PARTS.items():
        if part in given:
            images, labels = _pair(given[part], part)
            arrays[f"{prefix}_images"], arrays[f"{prefix}_labels"] = images, labels
    return {"name": "npz", "path": str(_written(arrays, folder, name))}, "val_images" in arrays


def _pair(given: Any, part: str) -> tuple[NDArray[Any], NDArray[Any]]:
    if isinstance(given, tuple | list) and len(given) == 2:
        images, labels = given
        images = _array(images)
        if _is_tensor(given[0]) and images.ndim == 4:
            images = images.transpose(0, 2, 3, 1)
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        pairs = [given[place] for place in range(len(given))]
        if not pairs or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            raise DataError(f"data: an item of the {part} dataset is not (image, label).", _EXAMPLE)
        pictures = [_picture(image) for image, _ in pairs]
        if len(shapes := sorted({picture.shape for picture in pictures})) > 1:
            raise DataError(
                f"data: the {part} dataset has images of several shapes: {shapes[0]}, {shapes[1]}.",
                "Give it a transform that resizes them, such as torchvision.transforms.Resize((64, 64)).",
            )
        images, labels = np.stack(pictures), [_array(label) for _, label in pairs]
    else:
        raise DataError(f"data: {part} is a {type(given).__name__}.", _EXAMPLE)
    return images, np.asarray(_array(labels) if _is_tensor(labels) else labels)


def _picture(image: Any) -> NDArray[Any]:
    """One image as (height, width) or (height, width, channels): tensors have their channels first."""
    array = _array(image)
    return array.transpose(1, 2, 0) if _is_tensor(image) and array.ndim == 3 else array


def _is_tensor(value: Any) -> bool:
    """True for tensors of torch, which is not imported to find out."""
    return type(value).__module__.startswith(("torch", "torchvision"))


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy() if _is_tensor(value) else value)


def _written(arrays: Mapping[str, NDArray[Any]], folder: Path, name: str) -> Path:
    digest = hashlib.sha256()
    for key, array in arrays.items():
        digest.update(f"{key} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).data)
    path = folder / f"{name}-{digest.hexdigest()[:16]}.npz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        part.replace(path)
    return path
