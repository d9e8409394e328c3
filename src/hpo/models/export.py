"""A trained network as one program: raw images in, class probabilities out, no Python of ours needed to run it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hpo.models.inputs import normalisation, to_input
from hpo.models.saved import PROGRAM, load_trained


class _Whole(nn.Module):
    """uint8 images (n, height, width, channels) -> float32 probabilities (n, classes)."""

    def __init__(
        self, net: nn.Module, *, mean: Sequence[float], std: Sequence[float], image_shape: Sequence[int]
    ) -> None:
        super().__init__()
        self.net = net
        scale, shift = normalisation(mean, std, image_shape)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(to_input(images, self.scale, self.shift).contiguous())
        return logits.softmax(1)


def export_program(folder: Path) -> Path:
    """Write net.pt2 beside the weights in folder: float32, on the CPU, any number of images at a time."""
    net, config = load_trained(folder)
    whole = _Whole(net, mean=config["mean"], std=config["std"], image_shape=config["image_shape"]).eval()
    # A batch of one would be taken for a constant.
    example = torch.zeros((2, *config["image_shape"]), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=1_000_000)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations while it traces
        program = torch.export.export(whole, (example,), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / PROGRAM)
    return folder / PROGRAM
