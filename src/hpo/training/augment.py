"""Random changes of whole batches, on the device.

torchvision's v2 functions take one amount for a whole batch; amounts for each image mean a loop over images. These draw
all amounts at once and resample once: 4 (crop) to 100 (colours) times the images/s of that loop, 41 times for several
together (batches of 128 x 28 x 28 x 3, one CPU thread: uv run python benchmarks/augment.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from hpo.errors import TrainingError
from hpo.spec.training import AugmentSpec
from hpo.training.device import put

Amounts = dict[str, Tensor]
Draw = Callable[[AugmentSpec, Tensor, torch.Generator], Amounts]
Augment = Callable[[Tensor, torch.Generator], Tensor]

# Changes by name, each with an amount for every image (n,); an amount of 0 changes nothing.
_MOVES = ("rotate", "shift_x", "shift_y", "shear_x", "shear_y", "zoom")
_COLOURS = ("brightness", "contrast", "saturation", "hue")
# What randaugment draws from, and the amounts at magnitude 1.
_RANDAUGMENT = {
    "rotate": 45.0,
    "shift_x": 0.4,
    "shift_y": 0.4,
    "shear_x": 0.5,
    "shear_y": 0.5,
    "zoom": math.log(1.5),
    "brightness": 0.9,
    "contrast": 0.9,
    "saturation": 0.9,
    "nothing": 0.0,
}
_FILLS = {"reflect": "reflection", "edge": "border", "black": "zeros"}
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: how bright red, green and blue look
_GREY = np.array([_LUMA] * 3)  # (red, green, blue) -> its grey, three times
_YIQ = np.array([_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])  # -> brightness, and the plane of colours
# A quarter turn in the plane of colours. A turn by any angle is grey + cos * (1 - grey) + sin * this.
_QUARTER = np.linalg.inv(_YIQ) @ [[0, 0, 0], [0, 0, -1], [0, 1, 0]] @ _YIQ


def warp(planes: Tensor, amounts: Mapping[str, Tensor], *, fill: str = "reflect") -> Tensor:
    """planes (n, channels, height, width) float, each moved by its amounts (n,), about its middle, in one resampling.

    rotate is in degrees, counterclockwise; shift_x and shift_y are shares of width and height, right and down; shear_x
    and shear_y are slopes; zoom is the logarithm of the factor. fill is reflect, edge or black. Bilinear.
    """
    count, _, height, width = planes.shape
    device = planes.device
    nothing = torch.zeros(count, device=device)
    angle, right, down, shear_x, shear_y, zoom = (amounts.get(name, nothing) for name in _MOVES)
    # Where each pixel of the result comes from: the inverse of the change, in the coordinates of grid_sample, which
    # run from -1 to 1 along both sides; only turns and shears mix them, so only those need the aspect ratio.
    cosine, sine = angle.deg2rad().cos(), angle.deg2rad().sin()
    turn = torch.stack([cosine, -sine, sine, cosine], dim=1).view(-1, 2, 2)
    shear = torch.stack([1 + nothing, shear_x, shear_y, 1 + nothing], dim=1).view(-1, 2, 2)
    linear = (turn @ shear) * _aspect(height, width, device) / zoom.exp().view(-1, 1, 1)
    offset = -2 * linear @ torch.stack([right, down], dim=1).unsqueeze(2)
    # affine_grid does the same for each image by itself, which takes ten times as long as one product for all.
    x = (2 * torch.arange(width, device=device) + 1) / width - 1
    y = (2 * torch.arange(height, device=device) + 1) / height - 1
    places = torch.stack([x.repeat(height), y.repeat_interleave(width), torch.ones(height * width, device=device)])
    grid = (torch.cat([linear, offset], dim=2).view(-1, 3) @ places).view(count, 2, height, width)
    return functional.grid_sample(planes, grid.permute(0, 2, 3, 1), padding_mode=_FILLS[fill], align_corners=False)


# Constants stay on the device: to copy them in every step would make it wait.
@lru_cache(maxsize=16)
def _aspect(height: int, width: int, device: torch.device) -> Tensor:
    return put(torch.tensor([[1.0, height / width], [width / height, 1.0]]), device)


@lru_cache(maxsize=16)
def _colours(channels: int, device: torch.device) -> tuple[Tensor, ...]:
    """The shares of the channels in brightness, and for RGB the matrices of grey, of colour, and of a quarter turn."""
    luma = torch.tensor(_LUMA if channels == 3 else [1 / channels] * channels)
    matrices = torch.tensor(np.array([_GREY, np.eye(3) - _GREY, _QUARTER]), dtype=torch.float32)
    return put(luma, device), *put(matrices, device)


def recolour(planes: Tensor, amounts: Mapping[str, Tensor]) -> Tensor:
    """planes (n, channels, height, width) float, each with its colours changed by its amounts (n,), as one matrix.

    brightness, contrast and saturation are added to a factor of 1 (below 0 counts as 0); hue is a share of the colour
    circle, turned in the plane of YIQ. Saturation and hue leave images alone that are not RGB.
    """
    count, channels, _, _ = planes.shape
    nothing = torch.zeros(count, device=planes.device)
    brightness, contrast, saturation = ((1 + amounts.get(name, nothing)).clamp(min=0) for name in _COLOURS[:3])
    pixels = planes.flatten(2)
    luma, grey, colour, quarter = _colours(channels, planes.device)
    # Neither saturation nor hue changes the grey of a pixel, so contrast can be taken about the mean of the original.
    offset = (brightness * (1 - contrast) * (pixels.mean(2) @ luma)).view(-1, 1, 1)
    factor = (brightness * contrast).view(-1, 1, 1)
    if channels != 3 or ("saturation" not in amounts and "hue" not in amounts):
        return torch.addcmul(offset, pixels, factor).view_as(planes)
    angle = (2 * math.pi * amounts.get("hue", nothing)).view(-1, 1, 1)
    matrix = factor * (grey + saturation.view(-1, 1, 1) * (angle.cos() * colour + angle.sin() * quarter))
    return torch.baddbmm(offset, matrix, pixels).view_as(planes)


def erase(images: Tensor, generator: torch.Generator, *, probability: float, largest: float) -> Tensor:
    """images (n, height, width, channels) uint8: in a share of them, a rectangle gets the mean colour of its image.

    Its area is uniform in [0.02, largest] of the image (or largest, if that is less), its aspect ratio log-uniform in
    [0.3, 3.3], and it lies inside the image: where it is too long for it, it is cut off.
    """
    count, height, width, _ = images.shape
    chosen, size, aspect, top, left = put(torch.rand(5, count, generator=generator), images.device)
    smallest = min(0.02, largest)
    area = (smallest + (largest - smallest) * size) * height * width
    ratio = ((2 * aspect - 1) * math.log(3.3)).exp()
    tall = (area * ratio).sqrt().round().clamp(1, height)
    wide = (area / ratio).sqrt().round().clamp(1, width)
    inside = _between(height, top * (height - tall), tall).unsqueeze(2)
    inside = inside & _between(width, left * (width - wide), wide).unsqueeze(1)
    inside = inside & (chosen < probability).view(-1, 1, 1)
    mean = images.float().mean((1, 2), keepdim=True).round().to(torch.uint8)
    return torch.where(inside.unsqueeze(3), mean, images)


def _between(length: int, start: Tensor, extent: Tensor) -> Tensor:
    """(n, length) bool: which places lie in the extent (n,) places from start (n,), rounded, on."""
    places = torch.arange(length, device=start.device)
    first = start.round().unsqueeze(1)
    return (places >= first) & (places < first + extent.unsqueeze(1))


def _within(*names: str, limit: Callable[[AugmentSpec], float] | None = None) -> Draw:
    """Draw amounts uniformly within +- limit(spec), by default the value of the field of the first name."""

    def draw(spec: AugmentSpec, images: Tensor, generator: torch.Generator) -> Amounts:
        most = limit(spec) if limit else getattr(spec, names[0])
        return {name: most * (2 * torch.rand(len(images), generator=generator) - 1) for name in names}

    return draw


def _crop(spec: AugmentSpec, images: Tensor, generator: torch.Generator) -> Amounts:
    count, height, width, _ = images.shape
    return {
        name: torch.randint(-spec.crop, spec.crop + 1, (count,), generator=generator) / side
        for name, side in (("shift_x", width), ("shift_y", height))
    }


def _randaugment(spec: AugmentSpec, images: Tensor, generator: torch.Generator) -> Amounts:
    # Ranks of random numbers: each image draws different changes, every set of them equally likely.
    ranks = torch.rand(len(images), len(_RANDAUGMENT), generator=generator).argsort(1).argsort(1)
    signs = 1 - 2 * torch.randint(2, ranks.shape, generator=generator)
    drawn = spec.magnitude * signs * (ranks < spec.randaugment)
    return {name: most * amount for (name, most), amount in zip(_RANDAUGMENT.items(), drawn.unbind(1), strict=True)}


def _erase(spec: AugmentSpec, images: Tensor, generator: torch.Generator) -> Tensor:
    return erase(images, generator, probability=spec.erase, largest=spec.erase_area)


@dataclass(frozen=True)
class Augmentation:
    """How a field of AugmentSpec changes a batch; exactly one of amounts and change is given.

    amounts draws one amount for each image (n,) of the changes that warp and recolour know; those of all fields are
    added up and applied at once. change is applied to the images (n, height, width, channels) uint8 afterwards.
    """

    amounts: Draw | None = None
    change: Callable[[AugmentSpec, Tensor, torch.Generator], Tensor] | None = None


# By field of AugmentSpec, in the order of their draws. A field is on where its value is neither 0 nor false.
AUGMENTATIONS: dict[str, Augmentation] = {
    "rotate": Augmentation(_within("rotate")),
    "shift": Augmentation(_within("shift_x", "shift_y", limit=lambda spec: spec.shift)),
    "zoom": Augmentation(_within("zoom", limit=lambda spec: math.log1p(spec.zoom))),
    **{name: Augmentation(_within(name)) for name in _COLOURS},
    "crop": Augmentation(_crop),
    "randaugment": Augmentation(_randaugment),
    "erase": Augmentation(change=_erase),
}
# Fields with an implementation of their own: hpo.training.batches.Flips, and mix_batch.
FLIPS = ("flip_horizontal", "flip_vertical", "rotate90")
MIXES = ("mixup", "cutmix")
OPTIONS = ("fill", "magnitude", "erase_area", "alternate_flips")  # of other fields; they change nothing alone


def build_augment(spec: AugmentSpec) -> Augment | None:
    """The augmentations of spec but flips and mixes as one function of (images, generator); None if none is on.

    Images are uint8 (n, height, width, channels), the generator is the CPU's. Raises TrainingError for a field of the
    spec that is on and has no implementation.
    """
    on = [name for name in type(spec).model_fields if name not in OPTIONS and getattr(spec, name)]
    for name in on:
        if name not in AUGMENTATIONS and name not in FLIPS + MIXES:
            raise TrainingError(f"augment.{name}: is not implemented.", "Add it to hpo.training.augment.AUGMENTATIONS.")
    entries = [entry for name, entry in AUGMENTATIONS.items() if name in on]
    draws = [entry.amounts for entry in entries if entry.amounts is not None]
    changes = [entry.change for entry in entries if entry.change is not None]
    if not entries:
        return None

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        images = _resample(spec, images, _add_up(draws, spec, images, generator))
        for change in changes:
            images = change(spec, images, generator)
        return images

    return augment


def _add_up(draws: Sequence[Draw], spec: AugmentSpec, images: Tensor, generator: torch.Generator) -> Amounts:
    """The sums of all drawn amounts by name, on the images' device."""
    amounts: Amounts = {}
    for draw in draws:
        for name, amount in draw(spec, images, generator).items():
            amounts[name] = amounts[name] + amount if name in amounts else amount
    if not amounts:
        return {}
    moved = put(torch.stack(list(amounts.values())), images.device)  # one transfer for all
    return dict(zip(amounts, moved, strict=True))


def _resample(spec: AugmentSpec, images: Tensor, amounts: Amounts) -> Tensor:
    """Apply moves and colours to images (n, height, width, channels) uint8."""
    if not amounts:
        return images
    planes = images.permute(0, 3, 1, 2).contiguous().float()
    if not amounts.keys().isdisjoint(_MOVES):
        planes = warp(planes, amounts, fill=spec.fill)
    if not amounts.keys().isdisjoint(_COLOURS):
        planes = recolour(planes, amounts)
    return planes.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def mix_batch(
    images: Tensor, labels: Tensor, spec: AugmentSpec, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    """mixup or cutmix of a batch, for a loss between labels_a and labels_b: (images, labels_a, labels_b, share).

    images are (n, channels, height, width) float, labels (n,). The loss is share * loss(labels_a) + (1 - share) *
    loss(labels_b), share in [0, 1]; labels_a are the labels given. Where the spec asks for neither, images and labels
    come back as they are, with share 1, and nothing is drawn.
    """
    if not spec.mixup and not spec.cutmix:
        return images, labels, labels, 1.0
    # torch's Beta takes no generator.
    random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    other = put(torch.randperm(len(images), generator=generator), images.device)
    if not spec.cutmix or (spec.mixup and random.random() < 0.5):
        share = float(random.beta(spec.mixup, spec.mixup))
        return torch.lerp(images[other], images, share), labels, labels[other], share
    height, width = images.shape[2:]
    side = math.sqrt(1 - random.beta(spec.cutmix, spec.cutmix))
    y, x = random.random() * height, random.random() * width
    # Cut off at the edges, as in the paper: the share is of what was really pasted.
    top, bottom = max(0, round(y - side * height / 2)), min(height, round(y + side * height / 2))
    left, right = max(0, round(x - side * width / 2)), min(width, round(x + side * width / 2))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, labels, labels[other], share
