"""A worker process: tasks in, their messages out, several trainings side by side."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from hpo.records import TrialEnded
from hpo.run.process import follow_supervisor
from hpo.run.worker import Task, Training, train_task

_COURTESY = 0.1  # seconds that idle places wait for their next candidate: one that comes late misses a shared epoch


def serve(
    connection: Connection, crashes: Connection, device: str, threads: int, places: int, environment: Mapping[str, str]
) -> None:
    """Train up to `places` tasks at a time, until the supervisor closes the connection or dies.

    What comes in is (slot, task) or (slot, verdict), what goes out is (slot, message).
    """
    follow_supervisor(environment)
    if os.name == "posix":
        # Where Python was when native code crashed; all that a dead process can still say.
        faulthandler.enable(crashes.fileno(), all_threads=False)
    from hpo.learn.device import use_threads
    from hpo.learn.stack import Stacks

    use_threads(threads)
    stacks = Stacks(places) if places > 1 else None
    live: dict[int, _Live] = {}
    free = places  # places whose next candidate may be on its way
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            while _has_to_wait(live) or connection.poll(_COURTESY if free else 0):
                slot, said = connection.recv()
                if isinstance(said, Task):
                    live[slot] = _Live(train_task(said, device, stacks), waits=said.wait)
                    free -= 1
                else:
                    live[slot].take(verdict=said)
            free = 0
            # Those that share their computation give None first: then all of them have joined.
            joined = [slot for slot in list(live) if not _advance(connection, slot, live)]
            for slot in joined:
                _advance(connection, slot, live)
            free = places - len(live)


@dataclass
class _Live:
    training: Training
    waits: bool  # for a verdict on each epoch
    answer: bool | None = None  # None: it has not begun
    asks: bool = False

    def take(self, *, verdict: bool) -> None:
        self.answer, self.asks = verdict, False


def _has_to_wait(live: Mapping[int, _Live]) -> bool:
    return not live or any(one.asks for one in live.values())


def _advance(connection: Connection, slot: int, live: dict[int, _Live]) -> bool:
    """Let a training go on to its next message, and send that; False where there is none yet."""
    one = live[slot]
    message = next(one.training) if one.answer is None else one.training.send(one.answer)
    one.answer = True
    if message is None:
        return False
    if isinstance(message, TrialEnded):
        del live[slot]
    one.asks = one.waits
    connection.send((slot, message))
    return True
