"""Batches: the training images of each epoch, gathered from the data set, flipped, and changed at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from hpo.data.prepare import TrialData
from hpo.errors import TrainingError
from hpo.spec.training import AugmentSpec, TrainingSpec
from hpo.training.augment import MIXES, Augment, build_augment
from hpo.training.device import put

_MOST_BYTES = 2**28  # of all flips of a data set, in each worker
Change = Callable[[Tensor], Tensor]


def _mirror(images: Tensor) -> Tensor:
    """Left to right; torch is faster where it sees channels last."""
    return images.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)


def _upside_down(images: Tensor) -> Tensor:
    return images.flip(1)


def _transpose(images: Tensor) -> Tensor:
    """Swap rows and columns."""
    return images.transpose(1, 2)


@dataclass(frozen=True)
class Flips:
    """Mirror half of the images left to right, half upside down, and rotate each by a random multiple of 90 degrees.

    Each of the three is optional. alternate: mirroring left to right is not drawn; rows_of is told which images are.
    """

    horizontal: bool
    vertical: bool
    rotate90: bool
    alternate: bool = False

    @classmethod
    def of(cls, spec: AugmentSpec) -> Flips:
        """Those of a spec; all of them are drawn."""
        return cls(spec.flip_horizontal, spec.flip_vertical, spec.rotate90)

    def __bool__(self) -> bool:
        return self.horizontal or self.vertical or self.rotate90

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """The changes, applied one after the other; a rotation by a right angle is mirrors and a transposition."""
        across, down = self.horizontal or self.rotate90, self.vertical or self.rotate90
        return (_mirror,) * across + (_upside_down,) * down + (_transpose,) * self.rotate90

    @cached_property
    def _parity(self) -> Tensor:
        """(changes, draws) of 0 and 1: an image gets a change where an odd number of its draws contain it.

        rotate90 has two draws of probability 1/2: 180 degrees, which is both mirrors, and 90 degrees, a mirror and a
        transposition. So all four angles are equally likely.
        """
        draws: list[tuple[Change, ...]] = []
        draws += [(_mirror,)] * (self.horizontal and not self.alternate)
        draws += [(_upside_down,)] * self.vertical
        draws += [(_mirror, _upside_down), (_mirror, _transpose)] * self.rotate90
        table = [[change in draw for draw in draws] for change in self.changes]
        return torch.tensor(table).view(len(self.changes), len(draws)).long()

    def draw(self, count: int, generator: torch.Generator, *, batch: int | None = None) -> Tensor:
        """The changes of `count` images: (changes, count) int64 of 0 and 1, on the CPU.

        With batch, the numbers are those of draws of `batch` images each, one after the other.
        """
        batch, width = batch or count, self._parity.shape[1]
        if not width:
            return torch.zeros(len(self.changes), count, dtype=torch.int64)
        drawn = (torch.rand(width * count, generator=generator) < 0.5).long()
        tail = count % batch
        parts = (
            drawn[: width * (count - tail)].view(-1, width, batch),
            drawn[width * (count - tail) :].view(1, width, -1),
        )
        return torch.cat([(self._parity @ part % 2).transpose(0, 1).flatten(1) for part in parts], dim=1)

    def of_batch(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Change each of images (n, height, width, channels) at random. Raises TrainingError for oblong ones."""
        self._check(images)
        for change, chosen in zip(self.changes, self.draw(len(images), generator), strict=True):
            rows = chosen.nonzero().squeeze(1)
            order = torch.arange(len(images))
            order[rows] = torch.arange(len(images), len(images) + len(rows))
            # Whole images are gathered twenty times faster than they are written to chosen places.
            both = torch.cat([images, change(images.index_select(0, put(rows, images.device)))])
            images = both.index_select(0, put(order, images.device))
        return images

    def of_all(self, images: Tensor) -> Tensor:
        """All changes of images (n, ...), (n * 2 ** changes, ...); see rows_of. Raises TrainingError as of_batch."""
        self._check(images)
        for change in self.changes:
            images = torch.cat([images, change(images)])
        return images

    def rows_of(
        self,
        rows: Tensor,
        total: int,
        generator: torch.Generator,
        *,
        batch: int | None = None,
        mirrored: Tensor | None = None,
    ) -> Tensor:
        """The rows of of_all, of `total` images, with a random change of each of these rows; batch is that of draw.

        mirrored (n,) of 0 and 1 on the rows' device: which are mirrored left to right as well.
        """
        places = 1 << torch.arange(len(self.changes))
        codes = put(places @ self.draw(len(rows), generator, batch=batch), rows.device)
        # The first of the changes is that of the mirror.
        return rows + total * (codes if mirrored is None else codes ^ mirrored)

    def _check(self, images: Tensor) -> None:
        height, width = images.shape[1:3]
        if self.rotate90 and height != width:
            raise TrainingError(f"rotate90 needs square images, got {height}x{width}.", "Turn it off.")


def augmenter(spec: AugmentSpec) -> Augment | None:
    """All augmentations of spec but mixes as one function of (images, generator); None if none is on."""
    flips, change = Flips.of(spec), build_augment(spec)
    if not flips:
        return change

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        flipped = flips.of_batch(images, generator)
        return flipped if change is None else change(flipped, generator)

    return augment


def pick_view(features: Tensor, generator: torch.Generator) -> Tensor:
    """Features (n, 1 + views, count) -> (n, count): one of the augmented views of each image, at random.

    Without views, (n, count), they stay as they are.
    """
    if features.ndim == 2:
        return features
    picked = put(torch.randint(1, features.shape[1], (len(features),), generator=generator), features.device)
    return features[torch.arange(len(features), device=features.device), picked]


class Batches:
    """Gathers the images of a batch, uint8 (count, height, width, channels), changed as spec says; features unchanged.

    All flips of a small data set are made once, and a batch then only gathers rows of them. A larger one is flipped
    batch by batch, to the same images from the same random numbers. Generators are the CPU's. seed decides which images
    are mirrored in even epochs, with alternate_flips.
    """

    def __init__(self, images: Tensor, spec: AugmentSpec, *, seed: int = 0) -> None:
        pixels = images.dtype == torch.uint8
        alternate = spec.alternate_flips and spec.flip_horizontal and pixels
        flips = replace(Flips.of(spec), alternate=alternate)
        self._coins: Tensor | None = None
        if alternate:
            coins = torch.randint(2, (len(images),), generator=torch.Generator().manual_seed(seed))
            self._coins = coins.to(images.device)
        self._epoch = 1
        self._stored = pixels and bool(flips) and images.numel() << len(flips.changes) <= _MOST_BYTES
        self._flips, self._count = flips, len(images)
        self._source = _all_flipped(images, flips) if self._stored else images
        if pixels:
            others = spec.model_copy(update={"flip_horizontal": False}) if alternate else spec
            self._change = build_augment(spec) if self._stored else augmenter(others)
        else:
            self._change = pick_view if images.ndim == 3 else None  # features of several views, or of one
        # Where nothing else is drawn between two batches, flips can be drawn for the whole epoch at once.
        self._ahead = self._stored and self._change is None and not any(getattr(spec, name) for name in MIXES)

    @property
    def source(self) -> Tensor | None:
        """The tensor whose rows are the images of a batch, as returned by rows; None where batches are computed."""
        plain = self._ahead or (not self._stored and self._coins is None)
        return self._source if self._change is None and plain else None

    def rows(self, order: Tensor, batch: int, generator: torch.Generator, *, epoch: int = 1) -> Tensor:
        """The rows to gather for an epoch, counted from 1, with images in this order (n,), in batches of `batch`.

        Flips that are drawn here rather than in gather make a small perceptron's step a tenth to a fifth faster.
        """
        self._epoch = epoch
        return self._flipped(order, generator, batch) if self._ahead else order

    def gather(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The images of one batch; rows are its part of what the method rows returned."""
        if self._stored and not self._ahead:
            rows = self._flipped(rows, generator, len(rows))
        # index_select gathers rows ten times faster than indexing does.
        taken = self._source.index_select(0, rows)
        if self._coins is not None and not self._stored:
            taken = torch.where(self._mirrored(rows).bool().view(-1, 1, 1, 1), _mirror(taken), taken)
        return taken if self._change is None else self._change(taken, generator)

    def _flipped(self, rows: Tensor, generator: torch.Generator, batch: int) -> Tensor:
        mirrored = None if self._coins is None else self._mirrored(rows)
        return self._flips.rows_of(rows, self._count, generator, batch=batch, mirrored=mirrored)

    def _mirrored(self, rows: Tensor) -> Tensor:
        """(n,) of 0 and 1: which images of this epoch are mirrored."""
        if self._coins is None:
            return torch.zeros_like(rows)
        return (self._coins[rows] + self._epoch) % 2


@lru_cache(maxsize=2)
def _all_flipped(images: Tensor, flips: Flips) -> Tensor:
    """Remembered, for the trials of a study nearly always share their data and their augmentation."""
    return flips.of_all(images)


class GrowingSubset:
    """The training images of each epoch: all, or with data_growth a share that grows, see TrainingSpec.share.

    The images of an epoch are among those of every later one. Classes keep their shares, to one image. seed decides
    which images come first.
    """

    def __init__(self, data: TrialData, spec: TrainingSpec, *, seed: int) -> None:
        self._spec = spec
        self._rows = data.train
        if spec.data_growth < 1:
            self._rows = data.train[
                stratified_order(class_codes(data.labels[data.train]).cpu(), seed=seed).to(data.train.device)
            ]

    def of(self, epoch: int) -> Tensor:
        """The rows (n,) int64 of an epoch, counted from 1, in no particular order."""
        return self._rows[: self._count(epoch)]

    def batches(self, epochs: int) -> int:
        """The number of batches in the first `epochs` epochs."""
        if self._spec.data_growth == 1:
            return epochs * -(-len(self._rows) // self._spec.batch_size)
        return sum(-(-self._count(epoch) // self._spec.batch_size) for epoch in range(1, epochs + 1))

    def _count(self, epoch: int) -> int:
        # Batch norm cannot learn from a single image.
        return min(len(self._rows), max(2, round(self._spec.share(epoch) * len(self._rows))))


def class_codes(labels: Tensor) -> Tensor:
    """Labels (n,), or (n, labels) -> (n,): the same number for the same labels."""
    return labels if labels.ndim == 1 else torch.unique(labels, dim=0, return_inverse=True)[1]


def stratified_order(labels: Tensor, *, seed: int) -> Tensor:
    """labels (n,) int64 on the CPU -> a random order (n,) of 0..n-1 of which every beginning has the same class shares.

    The first m hold m * n_c / n images of a class of n_c, to one or two.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    each = labels[by_class]
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[each]
    # The k-th of n_c images comes after a share of (k + 1/2) / n_c of all images.
    return by_class[((place + 0.5) / counts[each]).argsort(stable=True)]
