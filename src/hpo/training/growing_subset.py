"""Which training images an epoch goes through: all, or in the first epochs a share that grows."""

from __future__ import annotations

import torch
from torch import Tensor

from hpo.data.prepare import TrialData
from hpo.spec.training import TrainingSpec


class GrowingRows:
    """The rows of each epoch, by TrainingSpec.share. Those of an epoch are among those of every later one.

    Classes keep their shares in each, to one image. seed decides which images come first.
    """

    def __init__(self, data: TrialData, spec: TrainingSpec, *, seed: int) -> None:
        self._spec = spec
        self._rows = data.train
        if spec.data_growth < 1:
            self._rows = data.train[stratified_order(data.labels[data.train].cpu(), seed=seed).to(data.train.device)]

    def of(self, epoch: int) -> Tensor:
        """The rows (n,) int64 of an epoch, counted from 1, in no order that means anything."""
        return self._rows[: self._count(epoch)]

    def batches(self, epochs: int) -> int:
        """How many batches the first so many epochs have together."""
        if self._spec.data_growth == 1:
            return epochs * -(-len(self._rows) // self._spec.batch_size)
        return sum(-(-self._count(epoch) // self._spec.batch_size) for epoch in range(1, epochs + 1))

    def _count(self, epoch: int) -> int:
        # Batch norm cannot learn from a single image.
        return min(len(self._rows), max(2, round(self._spec.share(epoch) * len(self._rows))))


def stratified_order(labels: Tensor, *, seed: int) -> Tensor:
    """labels (n,) int64 on the CPU -> a random order (n,) of 0..n-1 whose every beginning has their class shares.

    The first m hold m * n_c / n images of a class of n_c, to one or two.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    each = labels[by_class]
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[each]
    # The k-th of n_c images stands where (k + 1/2) / n_c of all have come.
    return by_class[((place + 0.5) / counts[each]).argsort(stable=True)]
