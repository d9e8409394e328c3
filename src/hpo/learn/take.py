"""Take the images of a batch out of the data, changed at random as a training wants them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from hpo.learn.augment import build_augment
from hpo.learn.features import pick_view
from hpo.learn.turns import Turns
from hpo.spec.training import AugmentSpec

# Rows of the data (n,) int64, and the CPU's generator -> what the network's input is made of.
Take = Callable[[Tensor, torch.Generator], Tensor]

_MOST_BYTES = 2**28  # that the mirrored and turned images of a data set may take in each worker


def build_take(images: Tensor, spec: AugmentSpec) -> Take:
    """What takes rows of images, uint8 (count, height, width, channels) or features, with the changes of spec.

    Of a small data set all mirrored and turned images are made once, and cost nothing then. Of a larger one they are
    made batch by batch: the same images, from the same draws.
    """
    if images.dtype != torch.uint8:
        return lambda rows, generator: pick_view(images.index_select(0, rows), generator)
    turns = Turns.of(spec)
    kept = bool(turns) and images.numel() << len(turns.changes) <= _MOST_BYTES
    augment = build_augment(spec, turned=kept)
    source = _all_turned(images, turns) if kept else images

    def take(rows: Tensor, generator: torch.Generator) -> Tensor:
        place = turns.rows_of(rows, len(images), generator) if kept else rows
        # index_select gathers rows ten times faster than indexing does.
        taken = source.index_select(0, place)
        return taken if augment is None else augment(taken, generator)

    return take


@lru_cache(maxsize=1)
def _all_turned(images: Tensor, turns: Turns) -> Tensor:
    """Remembered: the candidates of a study nearly always share their data and their augmentation."""
    return turns.of_all(images)
