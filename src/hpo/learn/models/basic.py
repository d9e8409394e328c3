"""The two smallest families: a multilayer perceptron and a network of one convolution."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hpo.spec.models import CnnSpec, MlpSpec

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


def build_mlp(spec: MlpSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Flatten, then for each hidden width: dense, batch norm, activation, dropout; then dense to the classes."""
    height, width, channels = image_shape
    features = height * width * channels
    layers: list[nn.Module] = [nn.Flatten()]
    for hidden in [spec.hidden] if isinstance(spec.hidden, int) else spec.hidden:
        layers.append(nn.Linear(features, hidden))
        if spec.batch_norm:
            layers.append(nn.BatchNorm1d(hidden))
        layers.append(ACTIVATIONS[spec.activation]())
        if spec.dropout:
            layers.append(nn.Dropout(spec.dropout))
        features = hidden
    return nn.Sequential(*layers, nn.Linear(features, classes))


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
    layers.append(ACTIVATIONS[spec.activation]())
    windowed, whole = POOLS[spec.pool_type]
    if spec.pool == "global":
        layers.append(whole(1))
        height = width = 1
    elif spec.pool > 1:
        layers.append(windowed(spec.pool))
        height, width = height // spec.pool, width // spec.pool
        if min(height, width) < 1:
            raise ValueError(f"pooling windows of {spec.pool} pixels exceed the maps")
    layers.append(nn.Flatten())
    if spec.dropout:
        layers.append(nn.Dropout(spec.dropout))
    return nn.Sequential(*layers, nn.Linear(spec.filters * height * width, classes))
