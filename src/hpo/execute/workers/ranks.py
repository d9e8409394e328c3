"""One trial in several processes, its ranks: started for it, watched, and ended with it.

A rank that waits for another in a computation cannot receive messages, least of all on a GPU. So the worker itself is
no rank: it passes on epochs and verdicts, and ends all ranks where one fails.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from hpo.events import EpochEnded
from hpo.execute.process import begin, cause_of_death, follow_supervisor, process_context
from hpo.records import Epoch, FailureKind, TrialResult, TrialState

if TYPE_CHECKING:
    from hpo.execute.workers.task import Task

_SETTLE = 2.0  # seconds after the first failure in which others may still tell the cause of it
# In the reasons of ranks that fail because another one did.
_ECHOES = ("gloo", "NCCL", "DistBackendError", "DistNetworkError", "DistStoreError")


@dataclass(frozen=True)
class _Rank:
    process: BaseProcess
    connection: Connection


def train_in_ranks(
    train: Callable[..., Generator[EpochEnded | None, bool, TrialResult]], task: Task, device_name: str
) -> Generator[EpochEnded | None, bool, TrialResult]:
    """train(task, ...) in task.ranks processes, the first on the device and the others on the next; none outlives this.

    The result is that of the first rank. Where one fails or dies, it is the failure that was the cause.
    """
    multiprocessing.current_process().daemon = False  # a worker is one, and those may start none
    folder = tempfile.mkdtemp(prefix="hpo-ranks-")
    ranks: list[_Rank] = []
    try:
        # One by one: if the second cannot be started, the first is ended.
        ranks.extend(_start(train, task, device_name, rank, folder) for rank in range(task.ranks))
        return (yield from _follow(task, ranks))
    finally:
        for started in ranks:
            started.process.kill()
        for started in ranks:
            started.process.join()
            started.connection.close()
        shutil.rmtree(folder, ignore_errors=True)


def _start(train: Callable[..., Any], task: Task, device_name: str, rank: int, folder: str) -> _Rank:
    from hpo.training.device import threads_in_use

    context: Any = process_context()
    ours, theirs = context.Pipe()
    arguments = (theirs, train, task, device_name, rank, folder, threads_in_use(), dict(os.environ))
    process = context.Process(target=_serve, args=arguments, daemon=True)
    begin(process.start)
    theirs.close()
    return _Rank(process, ours)


def _follow(task: Task, ranks: list[_Rank]) -> Generator[EpochEnded | None, bool, TrialResult]:
    """Pass on the epochs of the first rank, and their verdicts to all; its result, or that of the failed one."""
    epochs: list[Epoch] = []
    failures: list[TrialResult] = []
    left, until = dict(enumerate(ranks)), float("inf")
    while left and (seconds := until - time.monotonic()) > 0:
        signs = [sign for rank in left.values() for sign in (rank.connection, rank.process.sentinel)]
        ready = wait(signs, seconds if failures else None)
        for number, rank in list(left.items()):
            if rank.connection not in ready and rank.process.sentinel not in ready:
                continue
            message = _receive(task, number, rank)
            if isinstance(message, EpochEnded):
                epochs.append(message.epoch)
                go_on = yield message
                for each in ranks:
                    with contextlib.suppress(OSError):  # it died just now
                        each.connection.send(go_on)
                continue
            del left[number]
            if message.state in (TrialState.COMPLETE, TrialState.PRUNED):
                if number == 0:
                    return message
            else:
                failures.append(message)
                until = min(until, time.monotonic() + _SETTLE)
    cause = min(failures, key=lambda failure: any(word in failure.reason for word in _ECHOES))
    return replace(cause, epochs=tuple(epochs))


def _receive(task: Task, number: int, rank: _Rank) -> EpochEnded | TrialResult:
    """The next message of a rank, or a result that says how it died."""
    with contextlib.suppress(EOFError, OSError):
        if rank.connection.poll():
            message: EpochEnded | TrialResult = rank.connection.recv()
            return message
    rank.process.join(5)
    return TrialResult(
        task.number,
        TrialState.FAILED,
        reason=f"process {number + 1} of {task.ranks} of the trial died ({cause_of_death(rank.process.exitcode)})",
        failure=FailureKind.WORKER_DIED,
        settings={"ranks": str(task.ranks)},
    )


def _serve(
    connection: Connection,
    train: Callable[..., Generator[EpochEnded | None, bool, TrialResult]],
    task: Task,
    device_name: str,
    rank: int,
    folder: str,
    threads: int,
    environment: Mapping[str, str],
) -> None:
    """Train as one rank: the first sends its epochs, all receive the verdicts, and send their results."""
    follow_supervisor(environment, last=lambda: shutil.rmtree(folder, ignore_errors=True))
    if hasattr(os, "setpgid"):  # it ends with the worker's process group, even where it hangs
        with contextlib.suppress(OSError):
            os.setpgid(0, os.getpgid(os.getppid()))
    from hpo.training.data_parallel import Ranks, device_of
    from hpo.training.device import use_threads

    use_threads(threads)
    training = train(task, device_of(device_name, rank), ranks=Ranks(rank, task.ranks, folder))
    go_on: bool | None = None
    try:
        while True:
            message = next(training) if go_on is None else training.send(go_on)
            if rank == 0:
                connection.send(message)
            go_on = connection.recv()
    except StopIteration as end:
        connection.send(end.value)
