"""Networks that run out of memory, raise, or crash in native code; named by dotted paths in studies of the tests."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import torch
from torch import distributed, nn

from deadly_jobs import leave_child
from hpo.execute.workers import job_process
from hpo.models.backbones import Backbone
from hpo.models.transfer import Transfer


class Hungry(nn.Module):
    """Has memory for `room` images at once where it learns; what it was given is noted in a file."""

    def __init__(self, net: nn.Module, room: int, note: str, error: str) -> None:
        super().__init__()
        self.net, self.room, self.note, self.error = net, room, note, error

    def forward(self, images):
        if self.training:
            with Path(self.note).open("a") as file:
                file.write(f"{len(images)}\n")
            if len(images) > self.room:
                raise _ERRORS[self.error]
        return self.net(images)


_ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8589934592 bytes."
    ),
    "python": MemoryError(),
}


class Crashing(nn.Module):
    """Ends its process when it first learns: abort, segfault, kill, exit, hang, or never.

    orphan:FILE kills it while a process that it has started lives, whose id is in the file.
    """

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, images):
        if self.training:
            how, _, file = self.how.partition(":")
            _ENDS[how](*[file] * bool(file))
        return self.net(images)


def _kill_with_child(file: str) -> None:
    leave_child(Path(file))
    os.kill(os.getpid(), 9)


_ENDS = {
    "orphan": _kill_with_child,
    "hang": lambda: time.sleep(600),
    "never": lambda: None,
    "abort": os.abort,
    "segfault": lambda: ctypes.string_at(0),
    "kill": lambda: os.kill(os.getpid(), 9),
    "exit": lambda: os._exit(3),
    "kill the second": lambda: distributed.get_rank() == 1 and os.kill(os.getpid(), 9),
    "fail in the second": lambda: distributed.get_rank() == 1 and 1 / 0,
}


class Noting(nn.Module):
    """Notes in a file which processes it learns in, and how its neurons drop out there."""

    def __init__(self, net: nn.Module, note: str) -> None:
        super().__init__()
        self.net, self.note = net, note

    def forward(self, images):
        if self.training:
            kept = (nn.functional.dropout(torch.ones(30)) > 0).int().tolist()
            with Path(self.note).open("a") as file:
                file.write(f"{os.getpid()} {''.join(map(str, kept))}\n")
        return self.net(images)


class Raising(nn.Module):
    """Raises when it first learns."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images):
        if self.training:
            raise ZeroDivisionError("my own mistake")
        return self.net(images)


def _dense(image_shape, classes, width=16):
    height, wide, channels = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(height * wide * channels, width), nn.ReLU(), nn.Linear(width, classes))


def hungry(*, image_shape, classes, room, note, error="gpu", width=16):
    return Hungry(_dense(image_shape, classes, width), room, note, error)


def crashing(*, image_shape, classes, how, width=16):
    return Crashing(_dense(image_shape, classes, width), how)


def noting(*, image_shape, classes, note):
    return Noting(_dense(image_shape, classes), note)


def thawing(*, image_shape, classes):
    """A frozen body that learns from the second epoch on."""
    height, wide, channels = image_shape
    body = nn.Sequential(nn.Flatten(), nn.Linear(height * wide * channels, 16), nn.Tanh())
    frozen = Backbone(body, mean=[0.5] * channels, std=[0.5] * channels, label="tiny")
    return Transfer([frozen], nn.Linear(16, classes), freeze="all", unfreeze_epoch=2)


def raising(*, image_shape, classes):
    return Raising(_dense(image_shape, classes))


def unbuilt(*, image_shape, classes):
    raise ZeroDivisionError("my own mistake")


def talking(*, image_shape, classes):
    print("my own words")  # noqa: T201 - as a user's network does
    return _dense(image_shape, classes)


def hanging(*, image_shape, classes, mark, train):
    """While the file `mark`.now is there: never built by the process that exports, nor trained where train is set.

    A file that options name would be part of the study's identity; nothing is at `mark` itself.
    """
    there = Path(f"{mark}.now").exists()
    if there and job_process._progress is not None:
        time.sleep(600)
    hangs = train and there
    return Crashing(_dense(image_shape, classes), "hang" if hangs else "never")


class Slow(nn.Module):
    """Takes a second for each batch of images."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images):
        time.sleep(1)
        return self.net(images)


def slow_answers(*, image_shape, classes, train):
    """Slow in the process that exports; where train is set, it hangs in training."""
    net = _dense(image_shape, classes)
    return Slow(net) if job_process._progress is not None else Crashing(net, "hang" if train else "never")
