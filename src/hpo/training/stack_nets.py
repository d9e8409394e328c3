"""Several networks as one: their weights side by side, multiplied batch by batch in one call for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.models.basic import OneLogit
from hpo.training.stack_layers import Activations, Maps, Norm, Segment, drop, parts_of


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


def cross_entropies(logits: Tensor, labels: Tensor, smoothing: Tensor | None, weights: Tensor | None) -> Tensor:
    """functional.cross_entropy of each network: logits (networks, n, classes), labels (networks, n) -> (networks,).

    smoothing is (networks,), None where there is none; weights are those of the classes.
    """
    whole = labels.shape[1] if weights is None else weights[labels].sum(1)
    hard = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight=weights, reduction="none")
    losses = hard.view(labels.shape).sum(1) / whole
    if smoothing is None:
        return losses
    logs = functional.log_softmax(logits, dim=2)
    soft = -(logs if weights is None else logs * weights).sum((1, 2)) / (logits.shape[2] * whole)
    return (1 - smoothing) * losses + smoothing * soft
