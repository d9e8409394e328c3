"""Networks: normalised images (n, channels, height, width) float in, logits (n, classes) out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hpo.data.prepare import models_folder
from hpo.errors import TrainingError
from hpo.models.basic import OneLogit, build_cnn, build_mlp
from hpo.models.convnet import build_convnet
from hpo.models.own import build_own
from hpo.models.resnet import build_resnet
from hpo.models.transfer import build_transfer
from hpo.spec.models import ModelSpec
from hpo.spec.pretrained import Tuned

# kind in the study file -> builder(spec, image shape (height, width, channels), number of outputs); a dotted kind is a
# network of the user's own. Builders of pretrained networks also take loaded and models, see build_transfer.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": build_mlp,
    "cnn": build_cnn,
    "convnet": build_convnet,
    "resnet": build_resnet,
    "torchvision": build_transfer,
    "timm": build_transfer,
    "fusion": build_transfer,
    "transfer": build_transfer,
}


def build_model(
    spec: ModelSpec,
    *,
    image_shape: tuple[int, int, int],
    classes: int,
    seed: int,
    binary: bool = False,
    loaded: bool = True,
) -> nn.Module:
    """A freshly initialised network on the CPU; the same seed gives the same weights.

    image_shape is (height, width, channels). With binary=True, for 2 classes only, the network has one output and is
    wrapped in OneLogit. With loaded=False pretrained weights are not loaded, as the caller loads all weights.
    Raises TrainingError if the images are too small for the network, SpecError if a network of the user's own or of a
    library cannot be found, DataError if its weights cannot.
    """
    if binary and classes != 2:
        raise TrainingError(
            f"a network with one output separates 2 classes, not {classes}.", "Group the classes into two."
        )
    with torch.random.fork_rng(devices=[]):
        # torch's initialisers take no generator: the global one is set for the length of the block.
        torch.manual_seed(seed)
        try:
            weights: dict[str, Any] = {"loaded": loaded, "models": models_folder()} if isinstance(spec, Tuned) else {}
            net = MODELS.get(spec.kind, build_own)(spec, image_shape, 1 if binary else classes, **weights)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"model {spec.kind} does not fit images of {image_shape}: {error}.",
                "Choose smaller kernels, fewer or smaller poolings, or larger images.",
            ) from error
    return OneLogit(net) if binary else net


def parameter_count(net: nn.Module, *, trainable: bool = True) -> int:
    """Number of weights and biases; with trainable=True only those that training changes."""
    return sum(weight.numel() for weight in net.parameters() if weight.requires_grad or not trainable)
