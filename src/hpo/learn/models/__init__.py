"""Networks: normalised images (n, channels, height, width) float in, logits (n, classes) out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hpo.errors import TrainingError
from hpo.learn.models.basic import build_cnn, build_mlp
from hpo.spec.models import ModelSpec

# kind in the study file -> builder(spec, image shape (height, width, channels), number of classes).
MODELS: dict[str, Callable[[Any, tuple[int, int, int], int], nn.Module]] = {
    "mlp": build_mlp,
    "cnn": build_cnn,
}


def build_model(spec: ModelSpec, *, image_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """A freshly initialised network on the CPU; the same seed gives the same weights.

    image_shape is (height, width, channels). Raises TrainingError where the images are too small for the network.
    """
    with torch.random.fork_rng(devices=[]):
        # torch's initialisers take no generator: the global one is set for the length of the block.
        torch.manual_seed(seed)
        try:
            return MODELS[spec.kind](spec, image_shape, classes)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"model {spec.kind} does not fit images of {image_shape}: {error}.",
                "Choose smaller kernels or pooling, or larger images.",
            ) from error


def parameter_count(net: nn.Module, *, trainable: bool = True) -> int:
    """Number of weights and biases; with trainable=True only those that training changes."""
    return sum(weight.numel() for weight in net.parameters() if weight.requires_grad or not trainable)
