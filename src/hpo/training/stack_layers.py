"""The layers that networks must have in common to share a computation, and the convolutions of several as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.data.prepare import TrialData
from hpo.models.basic import ACTIVATIONS, POOLS, OneLogit, pools_first
from hpo.spec.training import TrainingSpec


class UnstackableError(Exception):
    """A network cannot share its computation with others; the message is the reason."""


class BrokenStackError(Exception):
    """A shared computation failed; which of its trainings caused it is unknown."""


@dataclass(frozen=True)
class Block:
    """A convolution and the layers after it, in this order: norm, activation, pooling, dropout.

    A block without a convolution has further layers after those of the block before.
    """

    conv: nn.Conv2d | None = None
    norm: nn.BatchNorm2d | None = None
    activation: nn.Module | None = None
    pool: nn.Module | None = None
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[object, ...]:
        """The properties that stacked blocks share; numbers of filters may differ by less than a factor of 2."""
        filters = self.conv.out_channels.bit_length() if self.conv else 0
        steps = (self.conv.kernel_size, self.conv.stride, self.conv.padding) if self.conv else ()
        return filters, steps, self.norm is not None, str(self.pool)

    def then(self, layer: nn.Module) -> Block | None:
        """The block with this layer added at its end; None if the order forbids it."""
        done = (self.norm, self.activation, self.pool, self.dropout or None)
        for place, (name, kinds) in enumerate(_ORDER.items()):
            if isinstance(layer, kinds) and all(part is None for part in done[place:]):
                changes: dict[str, Any] = {name: layer.p if isinstance(layer, nn.Dropout) else layer}
                return replace(self, **changes)
        return None


_ORDER: dict[str, tuple[Any, ...]] = {
    "norm": (nn.BatchNorm2d,),
    "activation": tuple(ACTIVATIONS.values()),
    "pool": tuple(pool for pools in POOLS.values() for pool in pools),
    "dropout": (nn.Dropout,),
}


@dataclass(frozen=True)
class Segment:
    """A dense layer and the layers before it, in this order: norm, activation, dropout."""

    norm: nn.BatchNorm1d | None
    activation: nn.Module | None
    dropout: float
    dense: nn.Linear


def parts_of(net: nn.Module) -> tuple[list[Block], list[Segment]]:
    """The convolutions and the dense layers of a plain network, or of the head of a frozen backbone.

    Raises UnstackableError for other networks.
    """
    inner = net.net if isinstance(net, OneLogit) else net
    if not isinstance(inner, nn.Sequential):
        raise UnstackableError(f"{type(inner).__name__} is not a plain row of layers")
    layers = list(inner)
    flat = next((place for place, layer in enumerate(layers) if isinstance(layer, nn.Flatten)), -1)
    return _blocks(layers[: max(0, flat)]), _segments(layers[flat + 1 :])


def _blocks(layers: list[nn.Module]) -> list[Block]:
    found: list[Block] = []
    layers = list(layers)
    for place, (pool, activation) in enumerate(list(pairwise(layers))):
        if type(activation) in ACTIVATIONS.values() and pools_first(activation, pool):
            layers[place : place + 2] = activation, pool  # a stack decides for all of its networks
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            found.append(Block(layer))
        elif found and (longer := found[-1].then(layer)) is not None:
            found[-1] = longer
        elif found and (further := Block().then(layer)) is not None:
            found.append(further)
        else:
            raise UnstackableError(f"it has a layer {type(layer).__name__}")
    return found


def _segments(layers: list[nn.Module]) -> list[Segment]:
    found: list[Segment] = []
    norm: nn.BatchNorm1d | None = None
    activation: nn.Module | None = None
    dropout = 0.0
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d) and activation is None and not dropout:
            norm = layer
        elif type(layer) in ACTIVATIONS.values() and activation is None and not dropout:
            activation = layer
        elif isinstance(layer, nn.Dropout) and not dropout:
            dropout = layer.p
        elif isinstance(layer, nn.Linear):
            found.append(Segment(norm, activation, dropout, layer))
            norm, activation, dropout = None, None, 0.0
        else:
            raise UnstackableError(f"it has a layer {type(layer).__name__}")
    if not found or norm is not None or activation is not None or dropout:
        raise UnstackableError("it does not end in a dense layer")
    return found


def shape_of(net: nn.Module) -> tuple[object, ...]:
    """The properties that stacked networks share: depth, kernels, norms, classes, and about their widths."""
    blocks, parts = parts_of(net)
    return (
        type(net) is OneLogit,
        *(block.shape for block in blocks),
        *(part.norm is not None for part in parts),
        # After convolutions that is their filters, of which there may be fewer, times the pixels of their last maps.
        None if blocks else parts[0].dense.in_features,
        *(part.dense.out_features.bit_length() for part in parts[:-1]),
        parts[-1].dense.out_features,
    )


def convolves(net: nn.Module) -> bool:
    """True if a plain network begins with convolutions. Raises UnstackableError for other networks."""
    return bool(parts_of(net)[0])


def sort_key(net: nn.Module) -> tuple[str, ...]:
    """A key that sorts networks with the same activations next to each other, so that they share calls."""
    return tuple(activation_name(part) for parts in parts_of(net) for part in parts)


def activation_name(part: Block | Segment) -> str:
    """The class name of the activation."""
    return type(part.activation).__name__


def key_of(net: nn.Module, data: TrialData, spec: TrainingSpec, precision: str) -> tuple[Any, ...]:
    """Trainings with the same key can share a stack. Raises UnstackableError, with the reason.

    Networks of less than half the width of the widest would mostly compute padding, and are put into another stack.
    """
    for reason, applies in (
        ("its batches are computed in pieces", spec.micro_batch is not None),
        ("its layers learn at rates of their own", spec.optimizer.layer_decay != 1),
        ("it saves checkpoints", spec.checkpoint is not None),
        # Not all change each weight by itself, and padding must stay 0.
        ("its optimizer is of timm", spec.optimizer.of_timm),
        ("its images grow", spec.first_size < 1),
        ("its epochs grow", spec.data_growth < 1),
        ("it learns from a teacher", spec.teacher is not None),
        ("its loss is not cross-entropy", spec.loss != "cross_entropy"),
        ("its images are drawn by class", spec.sampling != "shuffled"),
        ("its images have several labels", data.labels.ndim == 2),
    ):
        if applies:
            raise UnstackableError(reason)
    place = (id(data.images), id(data.train), id(data.valid), data.mean, data.std)
    return (*shape_of(net), place, str(data.images.device), spec.batch_size, spec.class_weights, precision)


def unstackable_reason(net: nn.Module, data: TrialData, spec: TrainingSpec) -> str:
    """The reason why a training can share its computation with no other; "" if it can."""
    try:
        key_of(net, data, spec, "")
    except UnstackableError as reason:
        return str(reason)
    return ""


class Norm(nn.Module):
    """Batch norm of all networks at once, as channels; each gets the result of its own layer."""

    def __init__(self, like: nn.BatchNorm1d | nn.BatchNorm2d, count: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(like.weight.new_zeros(count, width))
        self.shift = nn.Parameter(like.weight.new_zeros(count, width))
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", like.weight.new_zeros(count, width).detach())
        self.register_buffer("variance", like.weight.new_ones(count, width).detach())
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


class _Stage(nn.Module):
    """One block of all networks, the narrower ones filled up with filters that are always 0.

    A padded filter's map is multiplied by 0 before the next convolution, or by the dense layer: whatever activation
    and pooling make of 0, it gives nothing to what follows, and gets no gradient back. So its weights, and its scale
    and shift in a batch norm, stay at the 0 where they begin.
    """

    def __init__(self, parts: Sequence[Block], wide_in: int, widths_in: Sequence[int]) -> None:
        super().__init__()
        first, count = parts[0], len(parts)
        self.widths = [
            part.conv.out_channels if part.conv else width for part, width in zip(parts, widths_in, strict=True)
        ]
        self.wide = max(self.widths)
        self.weight: nn.Parameter | None = None
        self._mask: Tensor | None = None
        if first.conv is not None:
            like, (high, wide) = first.conv.weight, first.conv.weight.shape[2:]
            # Channels-last in memory, like the maps, so that no call converts it.
            weight = like.new_zeros(count, self.wide, high, wide, wide_in).permute(0, 1, 4, 2, 3)
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(like.new_zeros(count, self.wide))
            self._stride, self._padding = first.conv.stride, first.conv.padding
            if min(widths_in) < wide_in:
                real = torch.arange(wide_in) < torch.tensor(widths_in).unsqueeze(1)
                self._mask = real.view(1, -1, 1, 1).to(like)
        self.norm = Norm(first.norm, count, self.wide) if first.norm is not None else None
        self._activations = Activations(parts, dim=1, size=self.wide)
        self.pool = first.pool
        self._pools_first = all(pools_first(part.activation, part.pool) for part in parts)
        self.dropouts = [part.dropout for part in parts]

    def forward(self, maps: Tensor, noises: Sequence[torch.Generator], *, half: bool) -> Tensor:
        """maps (n, networks * channels, height, width) -> those after the block; channels-last in memory."""
        if self.weight is not None:
            maps = maps if self._mask is None else maps * self._mask
            weight, bias = self.weight.flatten(0, 1), self.bias.flatten()
            if half:
                maps, weight, bias = maps.bfloat16(), weight.bfloat16(), bias.bfloat16()
            maps = functional.conv2d(maps, weight, bias, self._stride, self._padding, groups=len(self.widths))
        if self.norm is not None:
            maps = self.norm(maps)
        if self.pool is None:
            maps = self._activations(maps)
        else:
            maps = self._activations(self.pool(maps)) if self._pools_first else self.pool(self._activations(maps))
        return maps * self._noise(maps, noises) if any(self.dropouts) else maps

    def _noise(self, maps: Tensor, noises: Sequence[torch.Generator]) -> Tensor:
        noise = torch.ones_like(maps)
        for rate, width, part, generator in zip(
            self.dropouts, self.widths, torch.split(noise, self.wide, dim=1), noises, strict=True
        ):
            if rate:
                whole = maps.new_empty(len(maps), width, *maps.shape[2:]).contiguous(memory_format=torch.channels_last)
                part[:, :width] = drop(whole, rate, generator)
        return noise


class Maps(nn.Module):
    """The blocks of all networks, from images of each to the flat maps of each."""

    def __init__(self, rows: Sequence[Sequence[Block]]) -> None:
        """rows has the blocks of each network."""
        super().__init__()
        stages: list[_Stage] = []
        columns = list(zip(*rows, strict=True))
        first = columns[0][0].conv
        wide = first.in_channels if first is not None else 0
        widths = [wide] * len(rows)
        for parts in columns:
            stages.append(_Stage(parts, wide, widths))
            wide, widths = stages[-1].wide, stages[-1].widths
        self.stages, self._stages = nn.ModuleList(stages), stages
        self._columns, self._count = columns, len(rows)

    def forward(self, inputs: Tensor, noises: Sequence[torch.Generator], *, half: bool) -> Tensor:
        """inputs (networks, n, channels, height, width) -> (networks, n, channels * height * width)."""
        count, images, channels, height, width = inputs.shape
        # One copy, to where all networks' values of a pixel lie side by side.
        maps = inputs.permute(1, 3, 4, 0, 2).reshape(images, height, width, count * channels).permute(0, 3, 1, 2)
        for stage in self.stages:
            maps = stage(maps, noises, half=half)
        return maps.view(images, count, -1, *maps.shape[2:]).transpose(0, 1).flatten(2)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each network's own tensors behind their places here."""
        for stage, parts in zip(self._stages, self._columns, strict=True):
            for row, part in enumerate(parts):
                if part.conv is not None and part.conv.bias is not None and stage.weight is not None:
                    filters, channels = part.conv.weight.shape[:2]
                    yield stage.weight[row, :filters, :channels], part.conv.weight
                    yield stage.bias[row, :filters], part.conv.bias
                if part.norm is not None and stage.norm is not None:
                    yield from stage.norm.pairs(row, part.norm)
