"""A network that the study names by a dotted path, package.module:function, and this code does not know."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpo.errors import HpoError, SpecError, TrainingError
from hpo.spec.models import OwnModelSpec


def build_own(spec: OwnModelSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """What the named function returns for these images, classes and options, tried on two black images.

    Raises SpecError where there is no such function, TrainingError where it fails or returns something else than a
    network from float images (n, channels, height, width) to logits (n, classes).
    """
    function = _function(spec.kind)
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


def _function(dotted: str) -> Any:
    module_name, _, name = dotted.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        # The hpo command, unlike python -m, does not look for modules in the working directory.
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SpecError(
            f"model {dotted}: there is no module {error.name!r}.",
            f"Put it in the working directory ({Path.cwd()}) or install it, and check its name.",
        ) from error
    except Exception as error:
        raise SpecError(
            f"model {dotted}: importing {module_name} fails: {type(error).__name__}: {error}.",
            f"Mend it until this works: python -c 'import {module_name}'",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise SpecError(
            f"model {dotted}: {module_name} has no function {name!r}.", f"It has: {known or 'none'}. Correct the name."
        )
    return function
