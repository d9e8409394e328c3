"""An ensemble as one network: the mean of its members' probabilities, saved and exported as any other network is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_SMALLEST = 1e-30  # probability, far above the smallest number of float32


class Ensemble(nn.Module):
    """Images (n, channels, height, width) -> the logits (n, classes) of the mean probabilities of networks.

    shares are those of the members and sum to 1. normalisations are (mean, deviation) of each channel, by which each
    member normalises images in [0, 1]; none where images come normalised. With several labels an image, logits and
    probabilities are those of each label.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        *,
        shares: Sequence[float],
        normalisations: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
        several: bool = False,
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self._several = several
        self.shares: Tensor
        self.register_buffer("shares", torch.tensor(shares).view(-1, 1, 1))
        different = list(dict.fromkeys((tuple(mean), tuple(std)) for mean, std in normalisations))
        self._inputs = [different.index((tuple(mean), tuple(std))) for mean, std in normalisations]
        for index, (mean, std) in enumerate(different):
            self.register_buffer(f"mean{index}", torch.tensor(mean).view(-1, 1, 1))
            self.register_buffer(f"deviation{index}", torch.tensor(std).view(-1, 1, 1))

    def probabilities(self, images: Tensor) -> Tensor:
        """The mean probabilities, (n, classes)."""
        inputs = [images]
        if self._inputs:  # those that normalise alike share it
            each = range(max(self._inputs) + 1)
            inputs = [(images - getattr(self, f"mean{one}")) / getattr(self, f"deviation{one}") for one in each]
        places = self._inputs or [0] * len(self.members)
        logits = torch.stack([net(inputs[place]) for net, place in zip(self.members, places, strict=True)])
        found: Tensor = ((logits.sigmoid() if self._several else logits.softmax(2)) * self.shares).sum(0)
        return found

    def forward(self, images: Tensor) -> Tensor:
        """The logits, whose softmax, or sigmoid with several labels, are the probabilities."""
        found = self.probabilities(images)
        logits = found.clamp_min(_SMALLEST).log()
        return logits - (1 - found).clamp_min(_SMALLEST).log() if self._several else logits


def build_ensemble(config: Mapping[str, Any], nets: Sequence[nn.Module]) -> Ensemble:
    """The ensemble of these networks that a config.json describes, in evaluation mode."""
    members = config["members"]
    counts = [int(member["count"]) for member in members]
    normalisations = [(member["mean"], member["std"]) for member in members]
    common = all(each == (config["mean"], config["std"]) for each in normalisations)
    return Ensemble(
        nets,
        shares=[count / sum(counts) for count in counts],
        normalisations=() if common else normalisations,
        several=bool(config.get("several_labels")),
    ).eval()
