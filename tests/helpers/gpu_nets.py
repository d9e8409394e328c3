"""A network of the user's own that takes as much of a GPU's memory as it is told."""

from __future__ import annotations

import torch
from torch import nn


class Glutton(nn.Module):
    """Needs memory for each image that goes through it at once while it learns: share of all that the GPU has."""

    def __init__(self, net: nn.Module, share: float) -> None:
        super().__init__()
        self.net, self.share = net, share

    def forward(self, images):
        if self.training:
            whole = torch.cuda.get_device_properties(images.device).total_memory if images.is_cuda else 2**50
            torch.empty(int(self.share * whole * len(images)), dtype=torch.uint8, device=images.device)
        return self.net(images)


def glutton(*, image_shape, classes, share):
    height, width, channels = image_shape
    return Glutton(nn.Sequential(nn.Flatten(), nn.Linear(height * width * channels, classes)), share)
