"""A trained network on disk: as weights with their setup, and as one program that needs no code of this package."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hpo.data.prepare import TrialData
from hpo.models import CONFIG, PROGRAM, SETUP, WEIGHTS, load_trained
from hpo.models.inputs import normalisation, to_input
from hpo.models.safe_loader import check_program
from hpo.spec.study import Setup


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


def traced(net: nn.Module, config: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The program of a network in evaluation mode and of what its config says, for any number of uint8 images."""
    shape, several = config["image_shape"], bool(config.get("several_labels"))
    whole = _Whole(net, mean=config["mean"], std=config["std"], image_shape=shape, several=several).eval()
    # A batch of one would be taken for a constant.
    example = torch.zeros((2, *shape), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=1_000_000)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations while it traces
        return torch.export.export(whole, (example,), dynamic_shapes=({0: batch},))


def export_program(folder: Path) -> Path:
    """Write net.pt2 next to the weights in folder: float32, on the CPU, for any number of images.

    Raises ModelError where the network does what no program may that load_program loads.
    """
    program = traced(*load_trained(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, folder / PROGRAM)
    check_program(folder / PROGRAM)
    return folder / PROGRAM
