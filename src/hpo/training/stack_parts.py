"""The layers that networks must have in common to share a computation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from hpo.models.basic import ACTIVATIONS, POOLS, OneLogit


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
