"""Mirror images and turn them by right angles: of a batch, or all that there are of a data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hpo.errors import TrainingError
from hpo.spec.training import AugmentSpec

Change = Callable[[Tensor], Tensor]


def _mirror(images: Tensor) -> Tensor:
    """Left to right; torch is quick at it where it sees that the channels come last."""
    return images.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)


def _upside_down(images: Tensor) -> Tensor:
    return images.flip(1)


def _exchange(images: Tensor) -> Tensor:
    """Rows for columns."""
    return images.transpose(1, 2)


@dataclass(frozen=True)
class Turns:
    """Half of the images mirrored left to right, half upside down, each turned by a right angle, as it is asked."""

    horizontal: bool
    vertical: bool
    rotate90: bool

    @classmethod
    def of(cls, spec: AugmentSpec) -> Turns:
        """Those that spec asks for."""
        return cls(spec.flip_horizontal, spec.flip_vertical, spec.rotate90)

    def __bool__(self) -> bool:
        return self.horizontal or self.vertical or self.rotate90

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """What all of it comes to, one after the other: a right angle is mirrors and an exchange."""
        across, down = self.horizontal or self.rotate90, self.vertical or self.rotate90
        return (_mirror,) * across + (_upside_down,) * down + (_exchange,) * self.rotate90

    @cached_property
    def _parity(self) -> Tensor:
        """(changes, draws) of 0 and 1: an image gets a change where an odd number of its draws ask for it.

        A right angle is two draws: half a turn, which is both mirrors, then a quarter, a mirror and an exchange. Each
        half of the time: all four angles are equally likely.
        """
        draws: list[tuple[Change, ...]] = []
        draws += [(_mirror,)] * self.horizontal
        draws += [(_upside_down,)] * self.vertical
        draws += [(_mirror, _upside_down), (_mirror, _exchange)] * self.rotate90
        return torch.tensor([[change in draw for draw in draws] for change in self.changes]).long()

    def draw(self, count: int, generator: torch.Generator, *, batch: int | None = None) -> Tensor:
        """Which of changes each of `count` images gets: (changes, count) int64 of 0 and 1, on the CPU.

        With batch, as if so many at a time were drawn for, one after the other.
        """
        batch, width = batch or count, self._parity.shape[1]
        drawn = (torch.rand(width * count, generator=generator) < 0.5).long()
        tail = count % batch
        parts = (
            drawn[: width * (count - tail)].view(-1, width, batch),
            drawn[width * (count - tail) :].view(1, width, -1),
        )
        return torch.cat([(self._parity @ part % 2).transpose(0, 1).flatten(1) for part in parts], dim=1)

    def of_batch(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """images (n, height, width, channels), each changed by chance. Raises TrainingError for oblong ones."""
        self._check(images)
        for change, chosen in zip(self.changes, self.draw(len(images), generator), strict=True):
            rows = chosen.nonzero().squeeze(1)
            order = torch.arange(len(images))
            order[rows] = torch.arange(len(images), len(images) + len(rows))
            # Whole images are gathered twenty times faster than they are written to chosen places.
            both = torch.cat([images, change(images.index_select(0, rows.to(images.device)))])
            images = both.index_select(0, order.to(images.device))
        return images

    def of_all(self, images: Tensor) -> Tensor:
        """images (n, height, width, channels) -> (n * 2 ** changes, ...), see rows_of. Raises as of_batch does."""
        self._check(images)
        for change in self.changes:
            images = torch.cat([images, change(images)])
        return images

    def rows_of(self, rows: Tensor, total: int, generator: torch.Generator, *, batch: int | None = None) -> Tensor:
        """Where of_all of `total` images has the images of these rows, each changed by chance; batch as in draw."""
        steps = total << torch.arange(len(self.changes))
        return rows + (steps @ self.draw(len(rows), generator, batch=batch)).to(rows.device)

    def _check(self, images: Tensor) -> None:
        height, width = images.shape[1:3]
        if self.rotate90 and height != width:
            raise TrainingError(f"rotate90 needs square images, got {height}x{width}.", "Turn it off.")
