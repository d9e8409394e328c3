"""Several perceptrons as one: their weights side by side, multiplied batch by batch in one call for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.learn.models.basic import ACTIVATIONS
from hpo.learn.models.binary import OneLogit


class UnstackableError(Exception):
    """Why a network cannot share its computation with others."""


@dataclass(frozen=True)
class Segment:
    """A dense layer of one network and what comes before it, in this order: norm, activation, dropout."""

    norm: nn.BatchNorm1d | None
    activation: nn.Module | None
    dropout: float
    dense: nn.Linear


def segments(net: nn.Module) -> list[Segment]:
    """The dense layers of a perceptron, or of the head of a frozen backbone. Raises UnstackableError for others."""
    inner = net.net if isinstance(net, OneLogit) else net
    if not isinstance(inner, nn.Sequential):
        raise UnstackableError(f"{type(inner).__name__} is not a plain row of layers")
    found: list[Segment] = []
    norm: nn.BatchNorm1d | None = None
    activation: nn.Module | None = None
    dropout = 0.0
    for layer in inner:
        if isinstance(layer, nn.BatchNorm1d) and activation is None and not dropout:
            norm = layer
        elif type(layer) in ACTIVATIONS.values() and activation is None and not dropout:
            activation = layer
        elif isinstance(layer, nn.Dropout) and not dropout:
            dropout = layer.p
        elif isinstance(layer, nn.Linear):
            found.append(Segment(norm, activation, dropout, layer))
            norm, activation, dropout = None, None, 0.0
        elif not (isinstance(layer, nn.Flatten) and not found):
            raise UnstackableError(f"it has a layer {type(layer).__name__}")
    if not found or norm is not None or activation is not None or dropout:
        raise UnstackableError("it does not end in a dense layer")
    return found


def shape_of(net: nn.Module) -> tuple[object, ...]:
    """What networks must have in common to be stacked: depth, batch norms, about their widths, and their classes."""
    parts = segments(net)
    return (
        type(net) is OneLogit,
        *(part.norm is not None for part in parts),
        parts[0].dense.in_features,
        *(part.dense.out_features.bit_length() for part in parts[:-1]),
        parts[-1].dense.out_features,
    )


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


class _Norm(nn.Module):
    """Batch norm of all networks side by side, as channels: exactly what each computes alone."""

    def __init__(self, like: nn.BatchNorm1d, count: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(like.weight.new_zeros(count, width))
        self.shift = nn.Parameter(like.weight.new_zeros(count, width))
        self.mean = like.weight.new_zeros(count, width).detach()
        self.variance = like.weight.new_ones(count, width).detach()
        self.momentum, self.eps = like.momentum or 0.0, like.eps

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (networks, n, width), normalised over the n images of each."""
        count, images, width = inputs.shape
        flat = functional.batch_norm(
            inputs.transpose(0, 1).reshape(images, count * width),
            self.mean.view(-1),
            self.variance.view(-1),
            self.scale.view(-1),
            self.shift.view(-1),
            training=True,
            momentum=self.momentum,
            eps=self.eps,
        )
        return flat.reshape(images, count, width).transpose(0, 1)


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
        self.norm = _Norm(norm, len(parts), fan_in) if norm is not None else None
        # Networks are sorted by activation, so that each is one call on a slice.
        self.activations = [(next(group), len(list(group)) + 1) for _, group in groupby(parts, _activation)]
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
            inputs = self.norm(inputs)
        if any(part.activation is not None for part, _ in self.activations):
            pieces = torch.split(inputs, [count for _, count in self.activations])
            done = [_activate(part, piece) for (part, _), piece in zip(self.activations, pieces, strict=True)]
            inputs = torch.cat(done) if len(done) > 1 else done[0]
        if any(self.dropouts):
            inputs = inputs * self._noise(inputs, noises)
        elif self.padded:
            inputs = inputs * self.mask
        answers: Tensor = _Dense.apply(inputs, self.weight, self.bias, half)
        return answers

    def _noise(self, inputs: Tensor, noises: Sequence[torch.Generator]) -> Tensor:
        """What dropout multiplies by: drawn for each network as it would draw alone, 0 beyond its width."""
        noise = inputs.new_zeros(inputs.shape, dtype=torch.float32)
        for row, (rate, width, generator) in enumerate(zip(self.dropouts, self.widths, noises, strict=True)):
            if rate:
                drawn = torch.empty(inputs.shape[1], width, device=inputs.device)
                noise[row, :, :width] = drawn.bernoulli_(1 - rate, generator=generator).div_(1 - rate)
            else:
                noise[row, :, :width] = 1.0
        return noise


def _activation(part: Segment) -> str:
    return type(part.activation).__name__


def _activate(part: Segment, inputs: Tensor) -> Tensor:
    activated: Tensor = part.activation(inputs) if part.activation is not None else inputs
    return activated


class StackedNets(nn.Module):
    """Perceptrons of one depth as one module, in training mode: images of each in, logits of each out.

    While it lives, the weights of `nets` are views of its own: what it learns they know. See sort_key for their order.
    """

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        rows = [segments(net) for net in nets]
        self.one_logit = isinstance(nets[0], OneLogit)
        layers, fan_in = [], rows[0][0].dense.in_features
        for parts in zip(*rows, strict=True):
            layers.append(_Layer(parts, fan_in))
            fan_in = layers[-1].weight.shape[2]
        self.layers = nn.ModuleList(layers)
        self._norms = [layer.norm for layer in layers if layer.norm is not None]
        self._rows = rows
        with torch.no_grad():
            for own, theirs in self._pairs():
                own.copy_(theirs)
                theirs.data = own.detach()
        for weight in self.parameters():
            weight.grad = torch.zeros_like(weight)

    def forward(self, inputs: Tensor, noises: Sequence[torch.Generator], *, half: bool) -> Tensor:
        """inputs (networks, n, features) -> logits (networks, n, classes); half: products are of bfloat16 numbers."""
        for layer in self.layers:
            inputs = layer(inputs, noises, half=half)
        return functional.pad(inputs, (1, 0)) if self.one_logit else inputs

    def weights_of(self, row: int) -> list[nn.Parameter]:
        """The weights of one network, padded, in the order of its own parameters; new leaves on the shared memory.

        Their gradients are there as soon as those of the stack are.
        """
        found = []
        for weight in self.parameters():
            found.append(nn.Parameter(weight.detach()[row]))
            found[-1].grad = None if weight.grad is None else weight.grad[row]
        return found

    def forget(self) -> None:
        """Set to 0 the gradients that a backward pass would add to; those of dense layers it writes anew."""
        for norm in self._norms:
            norm.zero_grad(set_to_none=False)

    def release(self) -> None:
        """Give the networks weights of their own again, as they are now."""
        for _, theirs in self._pairs():
            theirs.data = theirs.detach().clone(memory_format=torch.contiguous_format)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each network's own tensors beside their places in the stack."""
        for layer, *parts in zip(self.layers, *self._rows, strict=True):
            for row, part in enumerate(parts):
                high, wide = part.dense.weight.shape
                yield layer.weight[row, :wide, :high].T, part.dense.weight
                yield layer.bias[row, :high], part.dense.bias
                if part.norm is not None:
                    for own, theirs in (
                        (layer.norm.scale, part.norm.weight),
                        (layer.norm.shift, part.norm.bias),
                        (layer.norm.mean, part.norm.running_mean),
                        (layer.norm.variance, part.norm.running_var),
                    ):
                        yield own[row, :wide], theirs


def sort_key(net: nn.Module) -> tuple[str, ...]:
    """Networks that follow each other in this order share calls of their activations."""
    return tuple(_activation(part) for part in segments(net))
