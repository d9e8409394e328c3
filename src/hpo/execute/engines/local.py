"""Where workers live: in this process, or in processes of this machine, behind one small protocol."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from operator import itemgetter
from typing import Any, Protocol

from hpo.execute.process import hidden_main, process_context
from hpo.execute.workers.main import serve
from hpo.execute.workers.task import Task, Training, train_task
from hpo.records import EpochEnded, TrialEnded

Trainer = Callable[[Task, str], Training]


@dataclass(frozen=True)
class WorkerLost:
    """The worker of a slot died with its candidate; a new one is in its place. exitcode < 0 is a signal.

    traceback says where Python was when native code crashed, "" where it cannot be known. words say what is known of
    the cause where there is no exit code.
    """

    exitcode: int | None
    traceback: str = ""
    words: str = ""

    @property
    def cause(self) -> str:
        """signal 11, SIGSEGV: native code crashed."""
        if self.words:
            return self.words
        code = self.exitcode or 0
        if code >= 0:
            return f"exit code {code}"
        names = {number.value: number.name for number in signal.Signals}
        name = names.get(-code, "")
        return ", ".join(filter(None, [f"signal {-code}", f"{name}: {_CAUSES[name]}" if name in _CAUSES else name]))


_CAUSES = {
    "SIGKILL": "often the system's answer when memory is short",
    "SIGSEGV": "native code crashed",
    "SIGABRT": "native code gave up",
    "SIGBUS": "native code crashed, or a disk that data is mapped from is full",
    "SIGILL": "native code for another processor",
    "SIGFPE": "native code crashed",
}


Message = EpochEnded | TrialEnded | WorkerLost


class Engine(Protocol):
    """Slots that train one task each. A slot is busy from submit until its TrialEnded or WorkerLost."""

    slots: int

    def accepts(self, slot: int) -> bool:
        """Whether an idle slot may be given a task now: one that is to be alone keeps others away.

        A slot whose worker is yet to start may refuse, too: where none accepts a task, the next polls change that.
        """

    def submit(self, slot: int, task: Task) -> None:
        """Start the task in an idle slot that accepts it."""

    def poll(self, timeout: float) -> list[tuple[int, Message]]:
        """What has come in from the slots; waits at most timeout seconds for the first message."""

    def verdict(self, slot: int, *, go_on: bool) -> None:
        """Answer the last EpochEnded of a slot whose task waits for a verdict."""

    def close(self) -> None:
        """End all workers at once, whatever they do."""


class InProcess:
    """One slot in the calling process, one epoch at a time: for tests, debugging, and where processes cannot be."""

    slots = 1

    def __init__(self, device: str = "cpu", *, trainer: Trainer = train_task) -> None:
        self._device = device
        self._trainer = trainer
        self._training: Training | None = None
        self._go_on: bool | None = None  # None: the generator has not started

    def accepts(self, slot: int) -> bool:  # noqa: ARG002 - there is one slot
        """Always."""
        return True

    def submit(self, slot: int, task: Task) -> None:  # noqa: ARG002 - there is one slot
        """Start the task."""
        self._training, self._go_on = self._trainer(task, self._device), None

    def poll(self, timeout: float) -> list[tuple[int, Message]]:  # noqa: ARG002 - there is nothing to wait for
        """Train one more epoch."""
        if self._training is None:
            return []
        message = next(self._training) if self._go_on is None else self._training.send(self._go_on)
        self._go_on = True
        if message is None:
            return []
        if isinstance(message, TrialEnded):
            self._training.close()
            self._training = None
        return [(0, message)]

    def verdict(self, slot: int, *, go_on: bool) -> None:  # noqa: ARG002 - there is one slot
        """Answer the last epoch."""
        self._go_on = go_on

    def close(self) -> None:
        """End the training where it is."""
        if self._training is not None:
            self._training.close()
            self._training = None


@dataclass
class _Worker:
    device: str
    process: BaseProcess
    connection: Connection
    crashes: Connection
    busy: set[int] = field(default_factory=set)  # slots
    lone: bool = False  # a task has the process for itself, or waits for that
    held: tuple[int, Task] | None = None  # what waits for it


class LocalProcesses:
    """One process for each of `devices`, each with its share of the torch threads and `places` slots of its own.

    Slots go round the processes, so that the first few tasks are spread over all of them. A task that is to be alone
    waits until its process is empty, and keeps it so.
    """

    def __init__(
        self, devices: Sequence[str], *, threads: int, places: int = 1, context: BaseContext | None = None
    ) -> None:
        self._context: Any = context or process_context()
        self._threads = threads
        self._places = places
        self._workers = [self._start(device) for device in devices]
        self.slots = len(devices) * places

    def _start(self, device: str) -> _Worker:
        ours, theirs = self._context.Pipe()
        crashes, last_words = self._context.Pipe(duplex=False)
        arguments = (theirs, last_words, device, self._threads, self._places, dict(os.environ))
        process = self._context.Process(target=serve, args=arguments, daemon=True)
        with hidden_main():
            process.start()
        theirs.close()
        last_words.close()
        return _Worker(device, process, ours, crashes)

    def accepts(self, slot: int) -> bool:
        """Whether nothing has the slot's process for itself."""
        return not self._workers[slot % len(self._workers)].lone

    def submit(self, slot: int, task: Task) -> None:
        """Send the task, or hold it until it can be alone; a worker that died idle is replaced first."""
        place = slot % len(self._workers)
        if not self._workers[place].busy and not self._workers[place].process.is_alive():
            self._replace(place)
        worker = self._workers[place]
        worker.lone = task.alone
        if task.alone and worker.busy:
            worker.held = slot, task
        else:
            self._send(slot, task)
        worker.busy.add(slot)

    def verdict(self, slot: int, *, go_on: bool) -> None:
        """Send the verdict."""
        self._send(slot, go_on)

    def _send(self, slot: int, said: Task | bool) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died just now: the next poll says so
            self._workers[slot % len(self._workers)].connection.send((slot, said))

    def poll(self, timeout: float) -> list[tuple[int, Message]]:
        """Messages of all workers that have one, in the order of slots."""
        open_workers = {worker.connection: place for place, worker in enumerate(self._workers) if worker.busy}
        ready = wait(list(open_workers), timeout) if open_workers else []
        messages = [told for connection in ready for told in self._receive(open_workers[connection])]  # type: ignore[index]
        return sorted(messages, key=itemgetter(0))

    def _receive(self, place: int) -> list[tuple[int, Message]]:
        """The next message of a worker; if it died, one for each of its candidates."""
        worker = self._workers[place]
        try:
            slot, message = worker.connection.recv()
        except (EOFError, ConnectionResetError, OSError):
            lost = self._replace(place)
            waiting = {worker.held[0]} if worker.held else set()
            now = self._workers[place]
            now.busy, now.held, now.lone = set(waiting), worker.held, bool(waiting)
            self._release(now)
            return [(slot, lost) for slot in worker.busy - waiting]
        if isinstance(message, TrialEnded):
            worker.busy.discard(slot)
            self._release(worker)
        return [(slot, message)]

    def _release(self, worker: _Worker) -> None:
        """Let in what waits for the process to be empty, if it is."""
        if worker.held and worker.busy == {worker.held[0]}:
            self._send(*worker.held)
            worker.held = None
        worker.lone = worker.lone and bool(worker.busy)

    def _replace(self, place: int) -> WorkerLost:
        worker = self._workers[place]
        _end(worker)
        self._workers[place] = self._start(worker.device)
        told = _last_words(worker.crashes)
        return WorkerLost(worker.process.exitcode, told)

    def close(self) -> None:
        """Kill the workers: they hold nothing that is not recorded already."""
        for worker in self._workers:
            _end(worker)


def _end(worker: _Worker) -> None:
    if worker.process.is_alive():
        worker.process.kill()
    worker.process.join(5)
    worker.connection.close()


def _last_words(crashes: Connection) -> str:
    """What the fault handler of a dead worker wrote."""
    with crashes:
        if os.name != "posix":
            return ""
        os.set_blocking(crashes.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            return os.read(crashes.fileno(), 65536).decode(errors="replace")
    return ""
