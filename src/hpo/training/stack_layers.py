"""The layers of several networks as one: weights side by side, multiplied and convolved in one call for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.models.basic import OneLogit
from hpo.training.stack_parts import Block, Segment, activation_name, parts_of


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
        maps = self._activations(maps)
        if self.pool is not None:
            maps = self.pool(maps)
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


class _Dense(torch.autograd.Function):
    """inputs (networks, n, fan in) times weight plus bias; gradients of these two go to where they are kept.

    That saves what autograd would allocate, fill and hand on in every step: a quarter of it for 784-128-10. In bfloat16
    only the products are.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: nn.Parameter, bias: nn.Parameter, half: bool) -> Tensor:
        ctx.half, ctx.grads = half, (weight.grad, bias.grad)
        factor = weight.detach()
        if half:
            inputs, factor = inputs.bfloat16(), factor.bfloat16()
            answers = torch.bmm(inputs, factor).float().add_(bias.detach().unsqueeze(1))
        else:
            answers = torch.baddbmm(bias.detach().unsqueeze(1), inputs, factor)
        ctx.save_for_backward(inputs, factor)
        return answers

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        inputs, factor = ctx.saved_tensors
        of_weight, of_bias = ctx.grads
        torch.sum(gradient, 1, out=of_bias)
        if not ctx.half:
            torch.bmm(inputs.transpose(1, 2), gradient, out=of_weight)
        else:
            gradient = gradient.bfloat16()
            of_weight.copy_(torch.bmm(inputs.transpose(1, 2), gradient))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return torch.bmm(gradient, factor.transpose(1, 2)).float(), None, None, None


class _Layer(nn.Module):
    """One segment of all networks, the narrower ones filled up with neurons that are always 0.

    A padded neuron's activation is multiplied by 0: whatever its activation function makes of 0, it gives nothing to
    the next layer, and gets no gradient back. Its own weights begin at 0 and, without a gradient, stay there under
    every optimizer here: decay and momentum of 0 are 0.
    """

    def __init__(self, parts: Sequence[Segment], fan_in: int) -> None:
        super().__init__()
        first, norm = parts[0].dense.weight, parts[0].norm
        wide = max(part.dense.out_features for part in parts)
        # The other way round than in nn.Linear: so the product needs no transposed copy, and gradients are contiguous.
        self.weight = nn.Parameter(first.new_zeros(len(parts), fan_in, wide))
        self.bias = nn.Parameter(first.new_zeros(len(parts), wide))
        self.norm = Norm(norm, len(parts), fan_in) if norm is not None else None
        self._activations = Activations(parts, dim=0, size=1)
        self.dropouts = [part.dropout for part in parts]
        self.widths = [part.dense.in_features for part in parts]
        self.padded = any(width < fan_in for width in self.widths)
        mask = torch.zeros(len(parts), 1, fan_in)
        for row, width in enumerate(self.widths):
            mask[row, :, :width] = 1.0
        self.mask = mask.to(first.device)

    def forward(self, inputs: Tensor, noises: Sequence[torch.Generator], *, half: bool) -> Tensor:
        """inputs (networks, n, fan in) -> (networks, n, fan out); each network's dropout draws from its own noise."""
        if self.norm is not None:
            count, images, width = inputs.shape
            flat = self.norm(inputs.transpose(0, 1).reshape(images, count * width))
            inputs = flat.reshape(images, count, width).transpose(0, 1)
        inputs = self._activations(inputs)
        if any(self.dropouts):
            inputs = inputs * self._noise(inputs, noises)
        elif self.padded:
            inputs = inputs * self.mask
        answers: Tensor = _Dense.apply(inputs, self.weight, self.bias, half)
        return answers

    def _noise(self, inputs: Tensor, noises: Sequence[torch.Generator]) -> Tensor:
        """The dropout factors of each network, drawn as it would draw them alone; 0 beyond its width."""
        noise = inputs.new_zeros(inputs.shape, dtype=torch.float32)
        for row, (rate, width, generator) in enumerate(zip(self.dropouts, self.widths, noises, strict=True)):
            if rate:
                noise[row, :, :width] = drop(inputs.new_empty(inputs.shape[1], width), rate, generator)
            else:
                noise[row, :, :width] = 1.0
        return noise


class StackedNets(nn.Module):
    """Networks of one shape as one module, in training mode: images of each in, logits of each out.

    While it lives, the weights of `nets` are views of its own: what it learns they know. See sort_key for their order.
    """

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        blocks, rows = zip(*map(parts_of, nets), strict=True)
        self.one_logit = isinstance(nets[0], OneLogit)
        self.maps = Maps(blocks) if blocks[0] else None
        layers, fan_in = [], max(parts[0].dense.in_features for parts in rows)
        for parts in zip(*rows, strict=True):
            layers.append(_Layer(parts, fan_in))
            fan_in = layers[-1].weight.shape[2]
        self.layers = nn.ModuleList(layers)
        adding = (self.maps, *(layer.norm for layer in layers))
        self._adding = [weight for part in adding if part is not None for weight in part.parameters()]
        self._rows = rows
        with torch.no_grad():
            for own, theirs in self._pairs():
                own.copy_(theirs)
                theirs.data = own.detach()
        for weight in self.parameters():
            weight.grad = torch.zeros_like(weight)

    def forward(self, inputs: Tensor, noises: Sequence[torch.Generator], *, half: bool) -> Tensor:
        """Inputs (networks, n, ...) -> logits (networks, n, classes); half: products are of bfloat16 numbers.

        Inputs are features, or images (channels, height, width).
        """
        inputs = self.maps(inputs, noises, half=half) if self.maps is not None else inputs.flatten(2)
        for layer in self.layers:
            inputs = layer(inputs, noises, half=half)
        return functional.pad(inputs, (1, 0)) if self.one_logit else inputs

    def weights_of(self, row: int) -> list[nn.Parameter]:
        """The weights of one network, padded, always in the same order; new leaves on the shared memory.

        Their gradients are there as soon as those of the stack are.
        """
        found = []
        for weight in self.parameters():
            found.append(nn.Parameter(weight.detach()[row]))
            found[-1].grad = None if weight.grad is None else weight.grad[row]
        return found

    def forget(self) -> None:
        """Set to 0 the gradients that a backward pass would add to; those of dense layers are overwritten."""
        for weight in self._adding:
            if weight.grad is not None:
                weight.grad.zero_()

    def release(self) -> None:
        """Give the networks weights of their own again, as they are now."""
        for _, theirs in self._pairs():
            theirs.data = theirs.detach().clone(memory_format=torch.contiguous_format)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of each network's own tensors and their regions of the stack."""
        if self.maps is not None:
            yield from self.maps.pairs()
        for layer, *parts in zip(self.layers, *self._rows, strict=True):
            for row, part in enumerate(parts):
                high, wide = part.dense.weight.shape
                yield layer.weight[row, :wide, :high].T, part.dense.weight
                yield layer.bias[row, :high], part.dense.bias
                if part.norm is not None:
                    yield from layer.norm.pairs(row, part.norm)
