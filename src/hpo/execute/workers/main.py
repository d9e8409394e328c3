"""The main loop of a worker process: it receives tasks, trains several at once, and sends their messages."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

from hpo.events import EpochEnded, TrialEnded
from hpo.execute.process import follow_supervisor
from hpo.execute.workers.task import Task, Training, train_task

_GATHER = 0.1  # seconds that idle slots wait for their next task: one that arrives late misses a shared epoch


def serve(
    connection: Connection, crashes: Connection, device: str, threads: int, stack: int, environment: Mapping[str, str]
) -> None:
    """Train up to `stack` tasks at a time, until the supervisor closes the connection or dies.

    It receives (slot, task) and (slot, verdict), and sends (slot, message).
    """
    follow_supervisor(environment)
    if os.name == "posix":
        # Writes where Python was when native code crashed.
        faulthandler.enable(crashes.fileno(), all_threads=False)
    from hpo.training.device import use_threads
    from hpo.training.stack import Stacks

    use_threads(threads)
    stacks = Stacks(stack) if stack > 1 else None
    running: dict[int, _Running] = {}
    free = stack  # slots whose next task may be on its way
    # A thread sends: otherwise both sides could block on full pipes, each waiting for the other to read.
    with ThreadPoolExecutor(1) as outbox, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):

        def send(slot: int, message: EpochEnded | TrialEnded) -> None:
            outbox.submit(connection.send, (slot, message)).add_done_callback(_end_if_unsent)

        while True:
            while _has_to_wait(running) or connection.poll(_GATHER if free else 0):
                slot, content = connection.recv()
                if isinstance(content, Task):
                    running[slot] = _Running(train_task(content, device, stacks), waits=content.wait)
                    free = max(0, free - 1)
                else:
                    running[slot].take(verdict=content)
            before = len(running)
            # Trainings that share a computation yield None first: after that, all of them have joined it.
            joined = []
            for slot in list(running):
                # An unstacked training gains nothing from a second one at the same time, and its memory would be short.
                if running[slot].answer is None and any(training.unstacked for training in running.values()):
                    continue
                if not _advance(slot, running, send):
                    joined.append(slot)
                elif slot in running:
                    running[slot].unstacked = True
            for slot in joined:
                _advance(slot, running, send)
            free = before - len(running) if running else stack


def _end_if_unsent(sent: Future[None]) -> None:
    """End this process where a message cannot be sent: the supervisor would wait for it for ever."""
    if (error := sent.exception()) is not None:
        if not isinstance(error, BrokenPipeError | ConnectionResetError):  # in those cases nobody waits
            traceback.print_exception(error)
        os._exit(1)


@dataclass
class _Running:
    training: Training
    waits: bool  # for a verdict on each epoch
    answer: bool | None = None  # None: it has not begun
    waiting: bool = False  # for a verdict now
    unstacked: bool = False  # it trains, and shares its computation with no other

    def take(self, *, verdict: bool) -> None:
        self.answer, self.waiting = verdict, False


def _has_to_wait(running: Mapping[int, _Running]) -> bool:
    return not running or any(training.waiting for training in running.values())


def _advance(slot: int, running: dict[int, _Running], send: Callable[[int, EpochEnded | TrialEnded], None]) -> bool:
    """Run a training to its next message, and send that; False where there is none yet."""
    entry = running[slot]
    message = next(entry.training) if entry.answer is None else entry.training.send(entry.answer)
    entry.answer = True
    if message is None:
        return False
    if isinstance(message, TrialEnded):
        del running[slot]
    entry.waiting = entry.waits
    send(slot, message)
    return True
