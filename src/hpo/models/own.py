"""A network of the user's own, named by a dotted path, package.module:function."""

from __future__ import annotations

import torch
from torch import nn

from hpo.data.dotted_path import load_function
from hpo.errors import HpoError, TrainingError
from hpo.spec.models import OwnModelSpec


def build_own(spec: OwnModelSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network that the named function returns for these images, classes and options, tried on two black images.

    Raises SpecError where there is no such function, TrainingError where it fails or returns something else than a
    network from float images (n, channels, height, width) to logits (n, classes).
    """
    function = load_function(spec.kind, what="model")
    height, width, channels = image_shape
    try:
        net = function(image_shape=image_shape, classes=classes, **spec.options)
        if not isinstance(net, nn.Module):
            raise TrainingError(
                f"model {spec.kind} returned {type(net).__name__}, not a network.", "Return a torch.nn.Module."
            )
        was_training = net.training
        with torch.inference_mode():
            logits = net.eval()(torch.zeros(2, channels, height, width))
        net.train(was_training)
    except HpoError:
        raise
    except Exception as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in spec.options.items())
        raise TrainingError(
            f"model {spec.kind} fails for images of {image_shape}, {classes} classes and options {{{shown}}}: "
            f"{type(error).__name__}: {error}.",
            "Call the function yourself with these, then mend it or model.options.",
        ) from error
    found = tuple(getattr(logits, "shape", ()))
    if found != (2, classes):
        raise TrainingError(
            f"model {spec.kind} gives {found or type(logits).__name__} for 2 images and {classes} classes.",
            f"Return logits of shape (n, classes), here (2, {classes}).",
        )
    return net
