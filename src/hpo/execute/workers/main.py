"""A worker process: tasks in, their messages out, several trainings side by side."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

from hpo.execute.process import follow_supervisor
from hpo.execute.workers.task import Task, Training, train_task
from hpo.records import EpochEnded, TrialEnded

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
    from hpo.training.compute.device import use_threads
    from hpo.training.stacking.stack import Stacks

    use_threads(threads)
    stacks = Stacks(places) if places > 1 else None
    live: dict[int, _Live] = {}
    free = places  # places whose next candidate may be on its way
    # A thread sends: else both sides could wait for the other to read, each with more to say than a pipe holds.
    with ThreadPoolExecutor(1) as outbox, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):

        def send(slot: int, message: EpochEnded | TrialEnded) -> None:
            outbox.submit(connection.send, (slot, message)).add_done_callback(_end_if_unsent)

        while True:
            while _has_to_wait(live) or connection.poll(_COURTESY if free else 0):
                slot, said = connection.recv()
                if isinstance(said, Task):
                    live[slot] = _Live(train_task(said, device, stacks), waits=said.wait)
                    free = max(0, free - 1)
                else:
                    live[slot].take(verdict=said)
            before = len(live)
            # Those that share their computation give None first: then all of them have joined.
            joined = []
            for slot in list(live):
                # One that shares with none gains nothing from a second one beside it, and its memory would be short.
                if live[slot].answer is None and any(one.lone for one in live.values()):
                    continue
                if not _advance(slot, live, send):
                    joined.append(slot)
                elif slot in live:
                    live[slot].lone = True
            for slot in joined:
                _advance(slot, live, send)
            free = before - len(live) if live else places


def _end_if_unsent(sent: Future[None]) -> None:
    """A supervisor that waits for what cannot be sent would wait for ever: it is told by the end of this process."""
    if (error := sent.exception()) is not None:
        if not isinstance(error, BrokenPipeError | ConnectionResetError):  # those: nobody waits any more
            traceback.print_exception(error)
        os._exit(1)


@dataclass
class _Live:
    training: Training
    waits: bool  # for a verdict on each epoch
    answer: bool | None = None  # None: it has not begun
    asks: bool = False
    lone: bool = False  # it trains, and shares with no other

    def take(self, *, verdict: bool) -> None:
        self.answer, self.asks = verdict, False


def _has_to_wait(live: Mapping[int, _Live]) -> bool:
    return not live or any(one.asks for one in live.values())


def _advance(slot: int, live: dict[int, _Live], send: Callable[[int, EpochEnded | TrialEnded], None]) -> bool:
    """Let a training go on to its next message, and send that; False where there is none yet."""
    one = live[slot]
    message = next(one.training) if one.answer is None else one.training.send(one.answer)
    one.answer = True
    if message is None:
        return False
    if isinstance(message, TrialEnded):
        del live[slot]
    one.asks = one.waits
    send(slot, message)
    return True
