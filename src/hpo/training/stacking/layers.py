"""Norms, activations and dropout of stacks, for convolutions and dense layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.training.stacking.compatibility import Block, Segment, activation_name


class Norm(nn.Module):
    """Batch norm of all networks at once, as channels; each gets the result of its own layer."""

    def __init__(self, like: nn.BatchNorm1d | nn.BatchNorm2d, count: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(like.weight.new_zeros(count, width))
        self.shift = nn.Parameter(like.weight.new_zeros(count, width))
        self.mean = like.weight.new_zeros(count, width).detach()
        self.variance = like.weight.new_ones(count, width).detach()
        self.momentum, self.eps = like.momentum or 0.0, like.eps

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (n, networks * width) or (n, networks * width, height, width), normalised over all but channels."""
        return functional.batch_norm(
            inputs,
            self.mean.view(-1),
            self.variance.view(-1),
            self.scale.view(-1),
            self.shift.view(-1),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )

    def pairs(self, row: int, part: nn.BatchNorm1d | nn.BatchNorm2d) -> Iterator[tuple[Tensor, Tensor]]:
        """The tensors of one network's norm, behind their places here."""
        for own, theirs in (
            (self.scale, part.weight),
            (self.shift, part.bias),
            (self.mean, part.running_mean),
            (self.variance, part.running_var),
        ):
            if theirs is not None:
                yield own[row, : len(theirs)], theirs


class Activations:
    """The activation functions of all networks, which are sorted by them, so that each is one call on a slice."""

    def __init__(self, parts: Sequence[Block | Segment], *, dim: int, size: int) -> None:
        """Each network takes `size` places of dimension dim."""
        groups = [list(group) for _, group in groupby(parts, activation_name)]
        self._functions = [group[0].activation or nn.Identity() for group in groups]
        self._sizes, self._dim = [size * len(group) for group in groups], dim
        self._none = all(group[0].activation is None for group in groups)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Apply each network's own activation to its part of the inputs."""
        if self._none:
            return inputs
        pieces = torch.split(inputs, self._sizes, self._dim)
        done = [function(piece) for function, piece in zip(self._functions, pieces, strict=True)]
        return torch.cat(done, self._dim) if len(done) > 1 else done[0]


def drop(like: Tensor, rate: float, noise: torch.Generator) -> Tensor:
    """The dropout factors of one network in this shape, drawn as it would draw them alone."""
    return torch.empty_like(like, dtype=torch.float32).bernoulli_(1 - rate, generator=noise).div_(1 - rate)
