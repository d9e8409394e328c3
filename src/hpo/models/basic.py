"""The networks of this package: perceptrons, convolutional and residual networks, and layers that they share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.spec.models import CnnSpec, ConvnetSpec, MlpSpec, ResnetSpec

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}

POOLS: dict[str, tuple[Callable[[int], nn.Module], Callable[[int], nn.Module]]] = {
    # type -> (windowed, global)
    "max": (nn.MaxPool2d, nn.AdaptiveMaxPool2d),
    "average": (nn.AvgPool2d, nn.AdaptiveAvgPool2d),
}


class Whitening(nn.Module):
    """A convolution without padding whose maps of the training images are uncorrelated and of one variance.

    After K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024), arXiv:2404.00498: its weights are the
    eigenvectors of the covariance of image patches, each divided by the root of its eigenvalue, and their negatives.
    Only the bias is trained. Until fit is called the weights are 0.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        count = channels * side**2
        self.weight: Tensor
        self.register_buffer("weight", torch.zeros(2 * count, channels, side, side))
        self.bias = nn.Parameter(torch.zeros(2 * count))

    def forward(self, images: Tensor) -> Tensor:
        """images (n, channels, height, width) -> (n, 2 * channels * side^2, height - side + 1, width - side + 1)."""
        return functional.conv2d(images, self.weight, self.bias)

    def fit(self, images: Tensor, *, floor: float = 5e-4) -> None:
        """Compute the weights from normalised training images (n, channels, height, width).

        floor is added to the variances: directions in which patches do not vary must not become noise.
        """
        channels, side = self.weight.shape[1:3]
        patches = images.unfold(2, side, 1).unfold(3, side, 1).permute(0, 2, 3, 1, 4, 5)
        flat = patches.reshape(-1, channels * side**2)
        # Some devices have no double precision, and small matrices are quick anywhere.
        variances, directions = torch.linalg.eigh((flat.T @ flat / len(flat)).cpu().double())
        scaled = (directions / (variances + floor).sqrt()).T.flip(0)
        # eigh may answer a vector or its negative: here its largest component is positive.
        scaled = scaled * scaled.gather(1, scaled.abs().argmax(1, keepdim=True)).sign()
        weight = scaled.view(-1, channels, side, side)
        self.weight.copy_(torch.cat([weight, -weight]))


def whitening_of(net: nn.Module) -> Whitening | None:
    """The whitening layer of a network, if it has one."""
    return next((part for part in net.modules() if isinstance(part, Whitening)), None)


def _first_layers(whiten: int, channels: int, activation: str) -> tuple[list[nn.Module], int]:
    """A whitening layer with its activation, if whiten > 0, and the number of maps after it."""
    if not whiten:
        return [], channels
    return [Whitening(channels, whiten), ACTIVATIONS[activation]()], 2 * channels * whiten**2


_GROWING = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Tanh, nn.Sigmoid)


def pools_first(activation: nn.Module | None, pool: nn.Module | None) -> bool:
    """True where pooling before the activation gives the same maps, and computes the activation of fewer values.

    The largest value of a growing function is that of the largest argument. With ReLU gradients are the same, too, bit
    for bit; with others they may reach another one of several arguments whose values are rounded to the same.
    """
    return isinstance(pool, nn.MaxPool2d | nn.AdaptiveMaxPool2d) and isinstance(activation, (*_GROWING, type(None)))


def _activated(activation: str, pool: nn.Module | None) -> list[nn.Module]:
    """An activation, and pooling where there is one, in the order that is cheaper."""
    active = ACTIVATIONS[activation]()
    if pool is None:
        return [active]
    return [pool, active] if pools_first(active, pool) else [active, pool]


def build_mlp(spec: MlpSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Flatten, then for each hidden width: dense, batch norm, activation, dropout; then dense to the classes."""
    height, width, channels = image_shape
    features = height * width * channels
    hidden = [spec.hidden] if isinstance(spec.hidden, int) else spec.hidden
    layers = dense_layers(
        features, hidden, activation=spec.activation, dropout=spec.dropout, batch_norm=spec.batch_norm
    )
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden[-1] if hidden else features, classes))


def build_cnn(spec: CnnSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Convolution, batch norm, activation, pooling, flatten, dropout, dense to the classes."""
    height, width, channels = image_shape
    if spec.padding == "valid":
        height, width = height - spec.kernel + 1, width - spec.kernel + 1
        if min(height, width) < 1:
            raise ValueError(f"kernels of {spec.kernel} pixels exceed the image")
    layers: list[nn.Module] = [nn.Conv2d(channels, spec.filters, spec.kernel, padding=spec.padding)]
    if spec.batch_norm:
        layers.append(nn.BatchNorm2d(spec.filters))
    windowed, whole = POOLS[spec.pool_type]
    pool: nn.Module | None = None
    if spec.pool == "global":
        pool = whole(1)
        height = width = 1
    elif spec.pool > 1:
        pool = windowed(spec.pool)
        height, width = height // spec.pool, width // spec.pool
        if min(height, width) < 1:
            raise ValueError(f"pooling windows of {spec.pool} pixels exceed the maps")
    layers += [*_activated(spec.activation, pool), nn.Flatten()]
    if spec.dropout:
        layers.append(nn.Dropout(spec.dropout))
    return nn.Sequential(*layers, nn.Linear(spec.filters * height * width, classes))


def dense_layers(
    features: int, widths: list[int], *, activation: str, dropout: float | list[float], batch_norm: bool = False
) -> list[nn.Module]:
    """For each width: dense, batch norm, activation, dropout (one rate for all, or one for each)."""
    rates = dropout if isinstance(dropout, list) else [dropout] * len(widths)
    layers: list[nn.Module] = []
    for width, rate in zip(widths, rates, strict=True):
        layers += [nn.Linear(features, width), *([nn.BatchNorm1d(width)] if batch_norm else [])]
        layers.append(ACTIVATIONS[activation]())
        if rate:
            layers.append(nn.Dropout(rate))
        features = width
    return layers


def feature_count(net: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Features (n, features) that net makes of images (height, width, channels); RuntimeError where they are too small.

    net is tried on a black image rather than computed with: torch knows its own rules of padding and rounding best.
    """
    height, width, channels = image_shape
    with torch.inference_mode():
        features = net.eval()(torch.zeros(1, channels, height, width))
    net.train()
    return int(features.shape[1])


class OneLogit(nn.Module):
    """A network of one output z (n, 1) as one of two logits [0, z] (n, 2).

    softmax([0, z])[1] = sigmoid(z), so cross-entropy on these logits is binary cross-entropy on z.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) -> logits (n, 2); z > 0 means the second class."""
        return functional.pad(self.net(images), (1, 0))


def build_convnet(spec: ConvnetSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """For each block: convolutions with batch norm and activation, pooling, dropout; then the head."""
    filters, dropouts = spec.block_filters, spec.block_dropout
    paddings = spec.padding if isinstance(spec.padding, list) else [spec.padding] * len(filters)
    pooled = range(1, len(filters) + 1) if spec.pool_after == "every" else spec.pool_after
    layers, channels = _first_layers(spec.whiten, image_shape[2], spec.activation)
    for number, (width, padding, dropout) in enumerate(zip(filters, paddings, dropouts, strict=True), start=1):
        pool = spec.pool if number in pooled else "none"
        layers += _block(spec, channels, width, padding, pool)
        if dropout:
            layers.append(nn.Dropout(dropout))
        channels = width
    if spec.head == "global":
        layers.append(nn.AdaptiveAvgPool2d(1))
    layers.append(nn.Flatten())
    features = feature_count(nn.Sequential(*layers), image_shape)
    layers += dense_layers(features, spec.dense, activation=spec.activation, dropout=spec.dense_dropout)
    if not spec.dense and isinstance(spec.dense_dropout, float) and spec.dense_dropout:
        layers.append(nn.Dropout(spec.dense_dropout))
    return nn.Sequential(*layers, nn.Linear(spec.dense[-1] if spec.dense else features, classes))


def _block(spec: ConvnetSpec, channels: int, width: int, padding: str, pool: str) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for number in range(1, spec.convs_per_block + 1):
        strided = pool == "stride" and number == spec.convs_per_block
        if strided:
            # torch has no "same" for strides: this gives size / stride, rounded up where the kernel is odd.
            margin = (spec.kernel - 1) // 2 if padding == "same" else 0
            layers.append(nn.Conv2d(channels, width, spec.kernel, stride=spec.pool_size, padding=margin))
        else:
            layers.append(nn.Conv2d(channels, width, spec.kernel, padding=padding))
        if spec.batch_norm:
            layers.append(nn.BatchNorm2d(width))
        last = number == spec.convs_per_block and pool in POOLS
        layers += _activated(spec.activation, POOLS[pool][0](spec.pool_size) if last else None)
        channels = width
    return layers


class ResidualBlock(nn.Module):
    """maps (n, channels, height, width) -> (n, filters, height / stride, width / stride), sizes rounded up."""

    def __init__(self, spec: ResnetSpec, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number in range(spec.convs_per_block):
            if number:
                layers.append(ACTIVATIONS[spec.activation]())
            layers += _convolution(
                channels if number == 0 else filters,
                filters,
                spec.kernel,
                stride=stride if number == 0 else 1,
                batch_norm=spec.batch_norm,
            )
        if spec.zero_init and isinstance(layers[-1], nn.BatchNorm2d):
            nn.init.zeros_(layers[-1].weight)
        self.path = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != filters:
            projection = _convolution(channels, filters, 1, stride=stride, batch_norm=spec.shortcut_batch_norm)
            self.shortcut = nn.Sequential(*projection)
        self.activation = ACTIVATIONS[spec.activation]()

    def forward(self, maps: Tensor) -> Tensor:
        """Activation of path + shortcut."""
        output: Tensor = self.activation(self.path(maps) + self.shortcut(maps))
        return output


def build_resnet(spec: ResnetSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Stem, residual stages, global average pooling, dense layers, dense to the classes."""
    layers, channels = _first_layers(spec.whiten, image_shape[2], spec.activation)
    height, width = (side - max(0, spec.whiten - 1) for side in image_shape[:2])
    layers += _convolution(channels, spec.width, spec.stem_kernel, stride=spec.stem_stride, batch_norm=spec.batch_norm)
    layers += _activated(spec.activation, nn.MaxPool2d(spec.stem_pool) if spec.stem_pool > 1 else None)
    shrunk = spec.stem_stride * spec.stem_pool * 2 ** (spec.blocks - 1)
    if min(height, width) <= shrunk:
        raise ValueError(f"block {spec.blocks} has only single pixels left to halve")
    filters = spec.width
    for stage in range(1, spec.blocks + 1):
        before, filters = filters, max(1, round(spec.width * spec.growth**stage))
        layers.append(ResidualBlock(spec, before, filters, stride=2))
        layers += [ResidualBlock(spec, filters, filters, stride=1) for _ in range(spec.repeats - 1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    if spec.dropout:
        layers.append(nn.Dropout(spec.dropout))
    dense = [spec.dense] if isinstance(spec.dense, int) else spec.dense
    layers += dense_layers(filters, dense, activation=spec.activation, dropout=spec.dropout)
    return nn.Sequential(*layers, nn.Linear(dense[-1] if dense else filters, classes))


def _convolution(channels: int, filters: int, kernel: int, *, stride: int, batch_norm: bool) -> list[nn.Module]:
    # Odd kernels with this margin keep the size, or divide it by the stride and round up, as the shortcuts do.
    layers: list[nn.Module] = [nn.Conv2d(channels, filters, kernel, stride=stride, padding=kernel // 2)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(filters))
    return layers
