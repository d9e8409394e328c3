"""The pixels that support a class: plain gradients, integrated gradients and Grad-CAM, computed by captum.

What is explained is the log-odds of the class, log p / (1 - p): its logit against all others together. Unlike the logit
alone, it says what tells the class from its rivals, and it serves both classes of a network of one output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpo.errors import HpoError, ModelError
from hpo.models import SETUP, load_trained, normalisation, to_input, whole_program

_STEPS = 64  # of the path that gradients are integrated over; Sundararajan et al. take 20 to 300


def log_odds(net: nn.Module, inputs: Tensor, *, target: int) -> Tensor:
    """inputs (n, channels, height, width) -> log p / (1 - p) of class target, (n,), without rounding p to 0 or 1."""
    logits = net(inputs)
    rivals = torch.cat([logits[:, :target], logits[:, target + 1 :]], dim=1)
    odds: Tensor = logits[:, target] - rivals.logsumexp(1)
    return odds


def integrated_gradients(net: nn.Module, inputs: Tensor, target: int) -> Tensor:
    """Signed attributions, shaped as inputs (n, channels, height, width); Sundararajan et al. 2017, arXiv:1703.01365.

    The path begins at the zero input: the mean colour of the training images. The attributions of an image add up to
    its log-odds minus those of the zero input (completeness), as closely as 64 steps integrate.
    """
    from captum.attr import IntegratedGradients

    method = IntegratedGradients(partial(log_odds, net, target=target))
    values: Tensor = method.attribute(inputs, n_steps=_STEPS, internal_batch_size=max(_STEPS, len(inputs)))
    return values.detach().float()


def _integrated(net: nn.Module, inputs: Tensor, target: int) -> Tensor:
    return integrated_gradients(net, inputs, target).sum(1).abs()


def _gradient(net: nn.Module, inputs: Tensor, target: int) -> Tensor:
    """The largest absolute derivative over the channels of each pixel (Simonyan et al. 2013, arXiv:1312.6034)."""
    from captum.attr import Saliency

    values: Tensor = Saliency(partial(log_odds, net, target=target)).attribute(inputs, abs=True)
    return values.amax(1)


def _grad_cam(net: nn.Module, inputs: Tensor, target: int) -> Tensor:
    """The last maps, weighted by their mean gradients; Selvaraju et al. 2017, arXiv:1610.02391."""
    from captum.attr import LayerAttribution, LayerGradCam

    layer = last_maps(net, inputs)
    if layer is None:
        raise ModelError(
            "Grad-CAM needs the maps of a convolution, and this network has none.",
            "Choose --method gradient or --method integrated.",
        )
    method = LayerGradCam(partial(log_odds, net, target=target), layer)
    values: Tensor = method.attribute(inputs, relu_attributions=True)
    enlarged: Tensor = LayerAttribution.interpolate(values, inputs.shape[2:], interpolate_mode="bilinear")
    return enlarged.sum(1)


METHODS: dict[str, Callable[[nn.Module, Tensor, int], Tensor]] = {
    "gradient": _gradient,
    "integrated": _integrated,
    "gradcam": _grad_cam,
}


def last_maps(net: nn.Module, inputs: Tensor) -> nn.Module | None:
    """The last layer to end that is, or holds, a convolution and gives maps of more than one pixel; None without one.

    In a plain network that is its last convolution; in a residual one the last block, whose shortcut would be half of
    the story.
    """
    found: list[nn.Module] = []

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() > 1:
            found.append(module)

    holders = [layer for layer in net.modules() if any(isinstance(part, nn.Conv2d) for part in layer.modules())]
    hooks = [layer.register_forward_hook(note) for layer in holders]
    try:
        with torch.no_grad():
            net(inputs[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return found[-1] if found else None


def saliency(net: nn.Module, image_input: Tensor, target: int, method: str) -> NDArray[np.float32]:
    """The importance of each pixel for class target: (height, width) in [0, 1], the largest 1; all 0 if none matters.

    net is in evaluation mode; image_input is what it takes, normalised, (channels, height, width) or with a leading 1,
    on its device. method is one of METHODS. Neither net nor image_input is changed. Raises ModelError where Grad-CAM
    finds no convolution.
    """
    inputs = image_input.detach().reshape(1, *image_input.shape[-3:]).contiguous().clone().requires_grad_()
    values = METHODS[method](net, inputs, target)[0].detach().float().cpu()
    largest = float(values.max())
    scaled = values / largest if largest > 0 else torch.zeros_like(values)
    return scaled.numpy()


@dataclass(frozen=True)
class Explanation:
    """One image and what a network sees in it.

    image is (height, width, channels) uint8, probabilities one for each class in [0, 1], those of the exported program,
    target the class that the maps explain; maps are (height, width) in [0, 1] by method. views counts
    the views of the image that the program averages; the maps explain its network on the image as it is.
    """

    image: NDArray[np.uint8]
    probabilities: tuple[float, ...]
    target: int
    maps: dict[str, NDArray[np.float32]]
    views: int = 1


def explain_images(
    folder: Path, images: NDArray[np.uint8], *, methods: Sequence[str] = (), target: int | None = None
) -> list[Explanation]:
    """Explain the network in folder (see models.load_trained) on images (n, height, width, channels) uint8.

    methods are of METHODS; none given means all that suit the network. target None explains each image's most probable
    class. Raises ModelError where the network cannot be built again, or a method does not suit it.
    """
    if not (folder / SETUP).is_file():
        raise ModelError(
            f"{folder}: there is no {SETUP}, which says how the network is built.",
            "The model was logged by an earlier version. Run its study again: --fresh",
        )
    try:
        net, config = load_trained(folder)
    except HpoError:
        raise
    except Exception as error:
        raise ModelError(
            f"{folder}: the network cannot be built again: {error}.",
            "A network of your own must be importable as it was in training.",
        ) from error
    scale, shift = normalisation(config["mean"], config["std"], config["image_shape"])
    inputs = to_input(torch.from_numpy(images), scale, shift).contiguous()
    if not methods:
        methods = [method for method in METHODS if method != "gradcam" or last_maps(net, inputs) is not None]
    with torch.no_grad():
        program = whole_program(net, config)
        probabilities = torch.cat([program(part) for part in torch.split(torch.from_numpy(images), 256)])
    return [
        Explanation(
            image=image,
            probabilities=tuple(row.tolist()),
            target=(chosen := int(row.argmax()) if target is None else target),
            maps={method: saliency(net, one, chosen, method) for method in methods},
            views=len(config.get("views") or (None,)),
        )
        for image, one, row in zip(images, inputs, probabilities, strict=True)
    ]
