"""Raw images to what a network takes: one formula for training, export and saliency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hpo.data.prepare import TrialData


def to_input(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """images (n, height, width, channels) uint8 -> (n, channels, height, width) float32 as images * scale + shift.

    scale and shift are (height, width, channels). The result has channels-last strides, which convolutions prefer,
    without a copy.
    """
    values = images.float()
    return torch.addcmul(shift, values, scale, out=values).permute(0, 3, 1, 2)


def normalisation(mean: Sequence[float], std: Sequence[float], image_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, in [0, 1] units, -> (scale, shift) of to_input, on the CPU.

    One value for each pixel: spread over the image on every batch, one for each channel takes five times as long.
    """
    deviation = torch.tensor(std)
    scale, shift = 1 / (255 * deviation), -torch.tensor(mean) / deviation
    return scale.expand(*image_shape).contiguous(), shift.expand(*image_shape).contiguous()


def input_of(data: TrialData) -> Callable[[Tensor], Tensor]:
    """A function from images of this data, (n, height, width, channels) uint8 on its device, to a network's input.

    Of features it takes those of the unchanged images.
    """
    if data.images.dtype != torch.uint8:
        return _plain_view
    device = data.images.device
    scale, shift = (part.to(device) for part in normalisation(data.mean, data.std, data.images.shape[1:]))
    return partial(to_input, scale=scale, shift=shift)


def _plain_view(features: Tensor) -> Tensor:
    return features if features.ndim == 2 else features[:, 0]
