"""Data parallel training: several processes, the ranks, train one network, each on its part of every batch."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

T = TypeVar("T")

# Objects always travel by gloo, so that a rank that waits for another's validation keeps no GPU waiting.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
# A rank that waits longer for another, the validation included, fails. Dead ranks are noticed at once, by their worker.
_TIMEOUT = timedelta(minutes=30)


def device_of(base: str, rank: int) -> str:
    """The device of a rank, where rank 0 has the device `base`: the GPUs of a trial follow each other."""
    device = torch.device(base)
    return base if device.type == "cpu" else f"{device.type}:{(device.index or 0) + rank}"


@dataclass(frozen=True)
class Ranks:
    """This process among the `count` that train one trial, each on a device of its own; alone, nothing is exchanged.

    All ranks do the same with the same random numbers, so that they take the same decisions. Rank 0 leads: it alone
    validates, and writes checkpoints and results. folder is a local one that all of them share.
    """

    rank: int = 0
    count: int = 1
    folder: str = ""

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def join(self, device_name: str) -> None:
        """Meet the other ranks, once in the life of a process; this one computes on the device."""
        if self.count == 1:
            return
        # All ranks are on this machine, whose name may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        device = torch.device(device_name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group(
            BACKENDS[device.type],
            init_method=(Path(self.folder) / "rendezvous").as_uri(),
            rank=self.rank,
            world_size=self.count,
            timeout=_TIMEOUT,
        )

    def same(self, value: T) -> T:
        """Rank 0's value, for all ranks."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]

    def total(self, sums: Tensor) -> Tensor:
        """The sums of all ranks, added up in place."""
        if self.count > 1:
            distributed.all_reduce(sums)
        return sums

    def part(self, images: int) -> tuple[slice, float]:
        """The rows of a batch of `images` that this rank trains on, and their weight.

        Batch norm cannot learn from a single image: a batch of less than two for each rank is trained on by all of
        them, and of each a share counts.
        """
        if images < 2 * self.count:
            return slice(None), 1 / self.count
        return slice(images * self.rank // self.count, images * (self.rank + 1) // self.count), 1.0


ALONE = Ranks()


class Forward:
    """The forward pass of a network, whose backward passes leave the gradient of all ranks; alone, just the network."""

    def __init__(self, net: nn.Module, ranks: Ranks, *, seed: int) -> None:
        self.ranks = ranks
        self._net, self._seed = net, seed
        self._trained: list[bool] = []
        self._call: Any = net

    def begin_epoch(self, number: int) -> None:
        """Prepare an epoch, counted from 1: which weights are trained may have changed."""
        if self.ranks.count == 1:
            return
        if not self.ranks.leads:
            # Ranks must not drop out the same neurons. Rank 0 keeps its generator, which checkpoints contain.
            words = np.random.SeedSequence((self._seed, number, self.ranks.rank)).generate_state(1)
            torch.manual_seed(int(words[0]))
        trained = [weights.requires_grad for weights in self._net.parameters()]
        if trained != self._trained:
            self._trained, self._call = trained, None  # before the next one is made, which needs as much memory
            self._call = _eager(self._net)

    def __call__(self, images: Tensor) -> Tensor:
        """Images -> logits."""
        logits: Tensor = self._call(images)
        return logits

    def step(self, *, last: bool) -> AbstractContextManager[None]:
        """Encloses forward and backward pass of one piece of a batch; gradients are exchanged after the last one."""
        together = last or self.ranks.count == 1
        exchange: Callable[[], AbstractContextManager[None]] = nullcontext if together else self._call.no_sync
        return exchange()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose backward pass adds a rank's share to the gradient: torch takes the mean of all ranks."""
        return loss if self.ranks.count == 1 else loss * self.ranks.count


def _eager(net: nn.Module) -> nn.Module:
    """DistributedDataParallel without torch's compiler, whose import takes longer than all else in a short trial.

    As in hpo.training.optimizers, what asks the compiler gets its answer outside of a compiled function.
    """
    kind = nn.parallel.DistributedDataParallel
    plain: Any = inspect.unwrap(kind._inside_ddp_forward)
    plain.__dynamo_disable = plain
    absent = "torch._dynamo" not in sys.modules
    if absent:
        answer = SimpleNamespace(get_optimize_ddp_mode=lambda: "no_optimization")
        vars(torch)["_dynamo"] = SimpleNamespace(utils=answer)
    try:
        return kind(net)
    finally:
        if absent:
            del vars(torch)["_dynamo"]
