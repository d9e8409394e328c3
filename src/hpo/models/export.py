"""A trained network on disk: as weights with their setup, and as one program that needs no code of this package."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hpo.data.prepare import TrialData
from hpo.errors import ModelError
from hpo.models import build_model
from hpo.models.inputs import normalisation, to_input
from hpo.models.safe_loader import load_program, read_config
from hpo.spec.study import Setup

WEIGHTS, CONFIG, SETUP, PROGRAM = "weights.safetensors", "config.json", "setup.json", "net.pt2"


def save_trained(net: nn.Module, setup: Setup, data: TrialData, folder: Path) -> None:
    """Write to folder what export_program needs: weights, setup, and the normalisation of images."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    config = {
        "class_names": list(data.class_names),
        "image_shape": list(data.images.shape[1:]),
        "mean": list(data.mean),
        "std": list(data.std),
        "ranges": {kind: list(limits) for kind, limits in data.ranges.items()},
        **({"several_labels": True} if data.labels.ndim == 2 else {}),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / SETUP).write_text(setup.model_dump_json(indent=1), encoding="utf-8")


def load_trained(folder: Path, *, weights: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """The network that save_trained left, on the CPU in evaluation mode, and its config.

    A folder that holds the exported program in place of the weights, as a logged model's does, gives the same. With
    weights=False the network is fresh.
    """
    config, setup = read_config(folder / CONFIG), _setup(folder / SETUP)
    if not {"mean", "std"} <= config.keys():
        raise ModelError(f"{folder / CONFIG}: mean or std is missing.", "Restore it from a copy.")
    shape = tuple(config["image_shape"])
    classes, binary = len(config["class_names"]), setup.task == "binary"
    net = build_model(setup.model, image_shape=shape, classes=classes, seed=0, binary=binary, loaded=False)
    if weights:
        net.load_state_dict(_weights(folder))
    return net.eval(), config


def _setup(file: Path) -> Setup:
    try:
        return Setup.model_validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{file}: damaged or missing: {reason}.", "Restore it from a copy.") from None


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
        return weights
    state = load_program(folder / PROGRAM).state_dict
    return {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}


class _Whole(nn.Module):
    """uint8 images (n, height, width, channels) -> float32 probabilities (n, classes); of each label with several."""

    def __init__(
        self, net: nn.Module, *, mean: Sequence[float], std: Sequence[float], image_shape: Sequence[int], several: bool
    ) -> None:
        super().__init__()
        self.net = net
        self._several = several
        scale, shift = normalisation(mean, std, image_shape)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(to_input(images, self.scale, self.shift).contiguous())
        return logits.sigmoid() if self._several else logits.softmax(1)


def export_program(folder: Path) -> Path:
    """Write net.pt2 next to the weights in folder: float32, on the CPU, for any number of images."""
    net, config = load_trained(folder)
    shape, several = config["image_shape"], bool(config.get("several_labels"))
    whole = _Whole(net, mean=config["mean"], std=config["std"], image_shape=shape, several=several).eval()
    # A batch of one would be taken for a constant.
    example = torch.zeros((2, *config["image_shape"]), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=1_000_000)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations while it traces
        program = torch.export.export(whole, (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / PROGRAM)
    return folder / PROGRAM
