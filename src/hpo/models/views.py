"""Several views of an image at prediction, whose probabilities are averaged: flips, right-angle turns, shifts, crops.

Only changes that the training's augmentation makes too are offered, and validation images decide whether any is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.models.calibration import FEWEST, Difference, at_temperature, cross_entropies, fit_temperature, halves
from hpo.spec.training import AugmentSpec


@dataclass(frozen=True)
class View:
    """A change of whole images, in this order: the part that is seen, a shift, a mirror image, turns by 90 degrees.

    crop is (top, left, height, width) in pixels, which is enlarged to the whole image; None is all of it. right and
    down are pixels; fill says what comes in from beyond the edges, as in AugmentSpec. turns are counterclockwise.
    """

    mirror: bool = False
    turns: int = 0
    right: int = 0
    down: int = 0
    crop: tuple[int, int, int, int] | None = None
    fill: str = "reflect"

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, height, width, channels) uint8 -> changed ones; oblong ones stay as they are under odd turns."""
        if self.crop is not None:
            images = _enlarged(images, self.crop)
        if self.right or self.down:
            images = _shifted(images, self.right, self.down, self.fill)
        if self.mirror:
            images = images.flip(2)
        # torch.rot90 of channels-last images, from operators that every exported program may have.
        if self.turns % 4 in (1, 3):
            images = images.transpose(1, 2)
        down, across = self.turns % 4 in (1, 2), self.turns % 4 in (2, 3)
        return images.flip([axis for axis, turned in ((1, down), (2, across)) if turned]) if down or across else images

    def __str__(self) -> str:
        parts = [
            "mirrored" * self.mirror,
            f"turned by {90 * (self.turns % 4)}°" * bool(self.turns % 4),
            f"shifted by {self.right:+d}, {self.down:+d} px" * bool(self.right or self.down),
            f"crop of {self.crop[2]}x{self.crop[3]} px at {self.crop[0]}, {self.crop[1]}" if self.crop else "",
        ]
        return ", ".join(filter(None, parts)) or "as it is"

    @classmethod
    def read(cls, plain: Mapping[str, Any]) -> View:
        """The view of a record, as `asdict` writes it."""
        crop = plain.get("crop")
        return cls(**{**plain, "crop": tuple(crop) if crop else None})


PLAIN = View()


def _enlarged(images: Tensor, crop: tuple[int, int, int, int]) -> Tensor:
    top, left, height, width = crop
    planes = images[:, top : top + height, left : left + width].permute(0, 3, 1, 2).float()
    whole = functional.interpolate(planes, images.shape[1:3], mode="bilinear", align_corners=False)
    return whole.round().to(torch.uint8).permute(0, 2, 3, 1)


def _shifted(images: Tensor, right: int, down: int, fill: str) -> Tensor:
    if fill == "black":
        # What is padded at one side is cut off at the other.
        return functional.pad(images, (0, 0, right, -right, down, -down))
    for axis, by in ((1, down), (2, right)):
        if by:
            images = images.index_select(axis, _sources(images.shape[axis], by, fill).to(images.device))
    return images


def _sources(length: int, by: int, fill: str) -> Tensor:
    """(length,) where each pixel of a shifted row comes from."""
    place = torch.arange(length) - by
    if fill == "edge":
        return place.clamp(0, length - 1)
    place = torch.where(place < 0, -1 - place, place)  # the edge itself is repeated, as grid_sample does
    return torch.where(place >= length, 2 * length - 1 - place, place)


class Views(nn.Module):
    """A program from images (n, height, width, channels) uint8 to probabilities, averaged over views of the images."""

    def __init__(self, program: nn.Module, views: Sequence[View]) -> None:
        super().__init__()
        self.program, self._views = program, tuple(views)

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the probabilities (n, classes)."""
        total: Tensor = self.program(self._views[0](images))
        for view in self._views[1:]:
            total = total + self.program(view(images))
        return total / len(self._views)


def candidates(spec: AugmentSpec, image_shape: Sequence[int]) -> list[tuple[View, ...]]:
    """The sets of views that an augmentation allows for images (height, width, channels), each with the plain image.

    Symmetries are all that flips and rotate90 make together; shifts are by half of what training shifts, in four
    directions, also of the mirror image; crops are those of half of its zoom, in the middle and in the corners.
    """
    height, width = image_shape[:2]
    mirrors = (False, True) if spec.flip_horizontal else (False,)
    turned = spec.rotate90 and height == width
    symmetries = dict.fromkeys(
        View(mirror != upside, turns + 2 * upside)
        for mirror, upside, turns in product(
            mirrors, (False, True) if spec.flip_vertical else (False,), range(4) if turned else (0,)
        )
    )
    symmetries = dict.fromkeys(View(view.mirror, view.turns % 4) for view in symmetries)
    right = round(max(spec.crop, spec.shift * width) / 2) or int(bool(spec.crop))
    down = round(max(spec.crop, spec.shift * height) / 2) or int(bool(spec.crop))
    moves = [(0, 0), (right, 0), (-right, 0), (0, down), (0, -down)] if right and down else [(0, 0)]
    sets = [
        tuple(symmetries),
        tuple(View(mirror) for mirror in mirrors),
        tuple(View(right=x, down=y, fill=spec.fill) if x or y else PLAIN for x, y in moves),
        tuple(
            View(mirror, right=x, down=y, fill=spec.fill if x or y else "reflect")
            for mirror in mirrors
            for x, y in moves
        ),
        (PLAIN, *_crops(spec.zoom, height, width)),
    ]
    return [each for each in dict.fromkeys(sets) if len(each) > 1]


def _crops(zoom: float, height: int, width: int) -> list[View]:
    high, wide = (round(side / (1 + zoom / 2)) for side in (height, width))
    if (high, wide) == (height, width):
        return []
    tops, lefts = (0, height - high), (0, width - wide)
    corners = [View(crop=(top, left, high, wide)) for top, left in product(tops, lefts)]
    return [View(crop=((height - high) // 2, (width - wide) // 2, high, wide)), *corners]


@dataclass(frozen=True)
class Choice:
    """The views that are used, (PLAIN,) for none, and what they give on validation images.

    tried holds the mean cross-entropy of each set on all images, at its best temperature, by the views of the set.
    loss and accuracy are differences to the plain image: on each half of the images the set is used that is best on the
    other half. Views are used where the interval of the loss lies below 0 and the accuracy is not lower.
    """

    views: tuple[View, ...]
    tried: tuple[tuple[tuple[View, ...], float], ...]
    images: int
    loss: Difference
    accuracy: Difference

    def record(self) -> dict[str, Any]:
        """It as plain data."""
        return {
            "views": [str(view) for view in self.views],
            "tried": [{"views": list(map(str, views)), "loss": loss} for views, loss in self.tried],
            "images": self.images,
            "loss": asdict(self.loss),
            "accuracy": asdict(self.accuracy),
            "used": len(self.views) > 1,
        }


def choose(
    answer: Callable[[View], Tensor], labels: Tensor, sets: Sequence[tuple[View, ...]]
) -> tuple[Choice, Tensor, Tensor] | None:
    """Choose among sets of views, or none of them, and the probabilities (n, classes) of the chosen one.

    The third are probabilities (n, classes), each image's with the views that the other half of the images has chosen.

    answer gives the probabilities (n, classes) of the validation images under a view; labels (n,) int64. None where
    there is nothing to choose, or fewer than 100 images.
    """
    if not sets or len(labels) < FEWEST:
        return None
    each = {view: answer(view) for view in dict.fromkeys([PLAIN, *(view for views in sets for view in views)])}
    means = {views: torch.stack([each[view] for view in views]).mean(0) for views in [(PLAIN,), *sets]}
    plain = means[(PLAIN,)]
    losses, hits = torch.empty(2, len(labels), dtype=torch.float64), torch.empty(2, len(labels))
    fitted = torch.empty_like(plain)
    one, other = halves(len(labels))
    for chosen_on, judged in ((one, other), (other, one)):
        best = _best(means, labels, chosen_on)[0]
        fitted[judged] = means[best][judged]
        for row, found in enumerate((plain, means[best])):
            temperature = fit_temperature(found[chosen_on], labels[chosen_on])
            losses[row, judged] = cross_entropies(at_temperature(found[judged], temperature), labels[judged])
            hits[row, judged] = (found[judged].argmax(1) == labels[judged]).float()
    loss, accuracy = Difference.of(losses[1] - losses[0]), Difference.of(hits[1] - hits[0])
    best, tried = _best(means, labels, torch.arange(len(labels)))
    views = best if loss.high < 0 and accuracy.value >= 0 else (PLAIN,)
    return (
        Choice(views, tuple(tried.items()), len(labels), loss, accuracy),
        means[views],
        fitted if len(views) > 1 else plain,
    )


def _best(
    means: Mapping[tuple[View, ...], Tensor], labels: Tensor, rows: Tensor
) -> tuple[tuple[View, ...], dict[tuple[View, ...], float]]:
    """The set with the lowest cross-entropy on these rows, each at its best temperature there, and all of those.

    Averages are less sure of themselves; without the temperatures that alone would count as a gain.
    """
    losses = {}
    for views, found in means.items():
        part, truth = found[rows], labels[rows]
        fitted = at_temperature(part, fit_temperature(part, truth))
        losses[views] = float(cross_entropies(fitted, truth).mean())
    return min(losses, key=losses.__getitem__), losses
