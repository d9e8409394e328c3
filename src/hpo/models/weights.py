"""Weights that others trained: where the libraries keep them, fetched once, never unpickled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from hpo.data.cache import Progress, fetch
from hpo.errors import DataError

_FRESH = "Or name your own: --set model.weights=FILE; without freeze also fresh ones: --set model.weights=none"


def _silent(text: str, done: int, total: int) -> None:
    """Workers have nobody to tell."""


def torchvision_file(url: str, *, progress: Progress = _silent) -> Path:
    """The file of published torchvision weights in TORCH_HOME, downloaded if it is not there.

    Its name ends with the beginning of its SHA-256, which is verified. Raises DataError.
    """
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    checksum = re.search(r"-([0-9a-f]{8,})\.", name)
    other = f"--set model.weights={path}"
    return fetch(url, path=path, progress=progress, sha256=checksum[1] if checksum else "", other=other, without=_FRESH)


def hub_file(repository: str, filename: str | None) -> Path:
    """The file of published timm weights in HF_HOME, downloaded if it is not there; safetensors where there are any.

    Raises DataError.
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError
    from requests import RequestException, head

    names = (filename,) if filename else ("model.safetensors", "pytorch_model.bin")
    for name in names:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    place = (
        f"Put {names[0]} of {repository} anywhere and name it: --set model.weights=FILE, or fill "
        f"{constants.HF_HUB_CACHE} with: hf download {repository} {names[0]}. {_FRESH}"
    )
    try:
        # The hub's own client tries for half a minute before it says that there is no network.
        head(constants.ENDPOINT, timeout=10)
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except EntryNotFoundError:
                continue
    except (RequestException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{hf_hub_url(repository, names[0])}: the download failed: {reason}.", place) from None
    raise DataError(f"{repository}: the hub has none of {', '.join(names)} there.", place)


def read_weights(file: Path) -> dict[str, Any]:
    """The state dict in a .safetensors or .pth file; nothing in it is executed. Raises DataError."""
    from timm.models import load_state_dict

    if not file.is_file():
        raise DataError(f"model.weights: {file}: no such file.", "Name a .safetensors or .pth file, imagenet or none.")
    try:
        state: dict[str, Any] = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"model.weights: {file}: not a file of plain weights: {reason}.",
            "Give a state dict in a .safetensors file, or one saved by torch.save.",
        ) from None
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
