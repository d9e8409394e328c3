"""An ensemble as one network: the mean of its members' probabilities, saved and exported as any other network is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 1e-30  # probability, far above the smallest number of float32


class Ensemble(nn.Module):
    """Images (n, channels, height, width) in [0, 1] -> the logits (n, classes) of the members' mean probabilities.

    Each member normalises the images by its own mean and deviation of each channel. weights are the shares of the
    members and sum to 1. With several labels an image, logits are those of each label.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        weights: Sequence[float],
        normalisations: Sequence[tuple[Sequence[float], Sequence[float]]],
        several: bool,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self._weights, self._several = list(weights), several
        self._normalisations = [(tuple(mean), tuple(std)) for mean, std in normalisations]

    def forward(self, images: Tensor) -> Tensor:
        """The logits; their softmax, or their sigmoid with several labels, is the mean of the probabilities."""
        inputs: dict[Any, Tensor] = {}  # of members that normalise alike: once
        shares: list[Tensor] = []
        for net, weight, key in zip(self.members, self._weights, self._normalisations, strict=True):
            if key not in inputs:
                mean, std = (torch.tensor(values).view(-1, 1, 1) for values in key)
                inputs[key] = (images - mean.to(images.device)) / std.to(images.device)
            logits = net(inputs[key])
            shares.append((logits.sigmoid() if self._several else logits.softmax(1)) * weight)
        total = torch.stack(shares).sum(0)
        if self._several:
            return torch.log(total.clamp_min(_SMALLEST)) - torch.log((1 - total).clamp_min(_SMALLEST))
        return torch.log(total.clamp_min(_SMALLEST))


def build_ensemble(members: Sequence[Mapping[str, Any]], nets: Sequence[nn.Module], *, several: bool) -> Ensemble:
    """The ensemble of these networks, in evaluation mode; members are their entries of its config.json."""
    counts = [int(member["count"]) for member in members]
    return Ensemble(
        nets,
        weights=[count / sum(counts) for count in counts],
        normalisations=[(member["mean"], member["std"]) for member in members],
        several=several,
    ).eval()
