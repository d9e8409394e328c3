"""Plain convolutional networks of any depth: blocks of convolutions and pooling, then dense layers."""

from __future__ import annotations

from torch import nn

from hpo.models.basic import ACTIVATIONS, POOLS, dense_layers, feature_count
from hpo.spec.models import ConvnetSpec


def build_convnet(spec: ConvnetSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """For each block: convolutions with batch norm and activation, pooling, dropout; then the head."""
    filters, dropouts = spec.block_filters, spec.block_dropout
    paddings = spec.padding if isinstance(spec.padding, list) else [spec.padding] * len(filters)
    pooled = range(1, len(filters) + 1) if spec.pool_after == "every" else spec.pool_after
    layers: list[nn.Module] = []
    channels = image_shape[2]
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
        layers.append(ACTIVATIONS[spec.activation]())
        channels = width
    if pool in POOLS:
        layers.append(POOLS[pool][0](spec.pool_size))
    return layers
