"""Random changes of whole batches, on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpo.errors import TrainingError
from hpo.spec.study import AugmentSpec

Augment = Callable[[Tensor, torch.Generator], Tensor]


def _some(images: Tensor, changed: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images as they are, the other half from `changed`, drawn anew for each image."""
    chosen = torch.rand(len(images), generator=generator, device=generator.device).to(images.device) < 0.5
    return torch.where(chosen.view(-1, 1, 1, 1), changed, images)


def flip_horizontal(images: Tensor, generator: torch.Generator) -> Tensor:
    """images (n, height, width, channels): half of them left to right."""
    return _some(images, images.flip(2), generator)


def flip_vertical(images: Tensor, generator: torch.Generator) -> Tensor:
    """images (n, height, width, channels): half of them upside down."""
    return _some(images, images.flip(1), generator)


def rotate90(images: Tensor, generator: torch.Generator) -> Tensor:
    """images (n, side, side, channels): each by 0, 90, 180 or 270 degrees. Raises TrainingError where not square."""
    if images.shape[1] != images.shape[2]:
        raise TrainingError(f"rotate90 needs square images, got {images.shape[1]}x{images.shape[2]}.", "Turn it off.")
    # Half a turn for half of the images, then a quarter turn for half of them: all four are equally likely.
    images = _some(images, images.rot90(2, (1, 2)), generator)
    return _some(images, images.rot90(1, (1, 2)), generator)


_STEPS: dict[str, Augment] = {
    "flip_horizontal": flip_horizontal,
    "flip_vertical": flip_vertical,
    "rotate90": rotate90,
}


def build_augment(spec: AugmentSpec) -> Augment | None:
    """All that the spec asks for as one function of (uint8 images (n, height, width, channels), generator); or None."""
    steps = [step for name, step in _STEPS.items() if getattr(spec, name)]
    if not steps:
        return None

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        for step in steps:
            images = step(images, generator)
        return images

    return augment
