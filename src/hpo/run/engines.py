"""Where workers live: in this process, or in processes of this machine, behind one small protocol."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from hpo.records import EpochEnded, TrialEnded
from hpo.run.worker import Task, Training, train_task

Trainer = Callable[[Task, str], Training]


@dataclass(frozen=True)
class WorkerLost:
    """The worker of a slot died with its candidate; a new one is in its place. exitcode < 0 is a signal.

    traceback says where Python was when native code crashed, "" where it cannot be known.
    """

    exitcode: int | None
    traceback: str = ""

    @property
    def cause(self) -> str:
        """signal 11, SIGSEGV: native code crashed."""
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

    def submit(self, slot: int, task: Task) -> None:
        """Start the task in an idle slot."""

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

    def submit(self, slot: int, task: Task) -> None:  # noqa: ARG002 - there is one slot
        """Start the task."""
        self._training, self._go_on = self._trainer(task, self._device), None

    def poll(self, timeout: float) -> list[tuple[int, Message]]:  # noqa: ARG002 - there is nothing to wait for
        """Train one more epoch."""
        if self._training is None:
            return []
        message = next(self._training) if self._go_on is None else self._training.send(self._go_on)
        self._go_on = True
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


def process_context() -> BaseContext:
    """Processes forked from a server that has imported torch: 0.03 s each instead of 5 s; spawned where none is."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpo.learn.preload", "hpo.run.worker"])
    return context


def end_fork_server() -> None:
    """Kill the fork server of this process, if it has one; it has no other way to be ended before its interpreter.

    Left alone it takes seconds to take torch down, and whoever reads our output through a pipe waits for it.
    """
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    pid = getattr(server, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Start processes inside: they do not import the user's script again, which needs no `if __name__` guard then."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    main.__spec__ = None
    main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


def follow_supervisor(environment: Mapping[str, str], connection: Connection | None = None) -> None:
    """Called in a process of ours: it leaves Ctrl-C to its supervisor, and ends at once when that dies.

    environment is the supervisor's: the fork server keeps the one that it was started with, and a notebook may have
    changed its own since. With a connection on which nothing is sent this way, the process also ends when the
    supervisor closes that.
    """
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C reaches the whole terminal group; the supervisor alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        signs = [supervisor.sentinel, *([connection] if connection else [])]
        threading.Thread(target=_end_with, args=(signs,), daemon=True).start()


def _end_with(signs: list[Any]) -> None:
    wait(signs)
    os._exit(0)


def _serve(
    connection: Connection, crashes: Connection, device: str, threads: int, environment: Mapping[str, str]
) -> None:
    """A worker process: a task in, its messages out, until the supervisor closes the connection or dies."""
    follow_supervisor(environment)
    if os.name == "posix":
        # Where Python was when native code crashed; all that a dead process can still say.
        faulthandler.enable(crashes.fileno(), all_threads=False)
    from hpo.learn.device import use_threads

    use_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task: Task = connection.recv()
            training = train_task(task, device)
            message = next(training)
            while not isinstance(message, TrialEnded):
                connection.send(message)
                message = training.send(connection.recv() if task.wait else True)
            connection.send(message)


@dataclass
class _Slot:
    device: str
    process: BaseProcess
    connection: Connection
    crashes: Connection
    busy: bool = False


class LocalProcesses:
    """One process for each of `devices`, each with its share of the torch threads."""

    def __init__(self, devices: Sequence[str], *, threads: int, context: BaseContext | None = None) -> None:
        self._context: Any = context or process_context()
        self._threads = threads
        self._workers = [self._start(device) for device in devices]
        self.slots = len(devices)

    def _start(self, device: str) -> _Slot:
        ours, theirs = self._context.Pipe()
        crashes, last_words = self._context.Pipe(duplex=False)
        arguments = (theirs, last_words, device, self._threads, dict(os.environ))
        process = self._context.Process(target=_serve, args=arguments, daemon=True)
        with hidden_main():
            process.start()
        theirs.close()
        last_words.close()
        return _Slot(device, process, ours, crashes)

    def submit(self, slot: int, task: Task) -> None:
        """Send the task; a worker that died idle is replaced first."""
        if not self._workers[slot].process.is_alive():
            self._replace(slot)
        self._workers[slot].busy = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died just now: the next poll says so
            self._workers[slot].connection.send(task)

    def poll(self, timeout: float) -> list[tuple[int, Message]]:
        """Messages of all slots that have one, in slot order."""
        open_slots = {worker.connection: slot for slot, worker in enumerate(self._workers) if worker.busy}
        ready = wait(list(open_slots), timeout) if open_slots else []
        return sorted(
            ((open_slots[connection], self._receive(open_slots[connection])) for connection in ready),  # type: ignore[index]
            key=lambda item: item[0],
        )

    def _receive(self, slot: int) -> Message:
        worker = self._workers[slot]
        try:
            message: Message = worker.connection.recv()
        except (EOFError, ConnectionResetError, OSError):
            return self._replace(slot)
        if isinstance(message, TrialEnded):
            worker.busy = False
        return message

    def verdict(self, slot: int, *, go_on: bool) -> None:
        """Send the verdict; a worker that died meanwhile is noticed by the next poll."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._workers[slot].connection.send(go_on)

    def _replace(self, slot: int) -> WorkerLost:
        worker = self._workers[slot]
        _end(worker)
        self._workers[slot] = self._start(worker.device)
        told = _last_words(worker.crashes)
        return WorkerLost(worker.process.exitcode, told)

    def close(self) -> None:
        """Kill the workers: they hold nothing that is not recorded already."""
        for worker in self._workers:
            _end(worker)


def _end(worker: _Slot) -> None:
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


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
