"""Residual networks: each block adds what it computes to a shortcut of what it was given."""

from __future__ import annotations

from torch import Tensor, nn

from hpo.models.basic import ACTIVATIONS, dense_layers
from hpo.spec.models import ResnetSpec


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
    height, width, channels = image_shape
    layers = _convolution(channels, spec.width, spec.stem_kernel, stride=spec.stem_stride, batch_norm=spec.batch_norm)
    layers.append(ACTIVATIONS[spec.activation]())
    if spec.stem_pool > 1:
        layers.append(nn.MaxPool2d(spec.stem_pool))
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
