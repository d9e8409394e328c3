"""Workers in processes of this machine."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from operator import itemgetter
from typing import Any

from hpo.events import TrialEnded
from hpo.execute.engines.base import Message, StudyWork, WorkerLost, WorkerPlan, described, group_devices
from hpo.execute.process import begin, cores, end_family, end_leftovers, process_context
from hpo.execute.workers.main import serve
from hpo.execute.workers.task import Task
from hpo.options import RunOptions


@dataclass
class _Worker:
    device: str
    process: BaseProcess
    connection: Connection
    crashes: Connection
    busy: set[int] = field(default_factory=set)  # slots
    exclusive: bool = False  # a task has the process for itself, or waits for that
    held: tuple[int, Task] | None = None  # the task that waits for that, and its slot


class LocalProcesses:
    """One process for each of `devices`, each with `threads` torch threads and `stack` slots.

    Slots are dealt to the processes in turn, so that the first few tasks are spread over all of them. An exclusive task
    waits until its process is empty; until it has ended the process takes no other.
    """

    def __init__(
        self, devices: Sequence[str], *, threads: int, stack: int = 1, context: BaseContext | None = None
    ) -> None:
        self._context: Any = context or process_context()
        self._threads = threads
        self._stack = stack
        self._workers = [self._start(device) for device in devices]
        self.slots = len(devices) * stack

    def _start(self, device: str) -> _Worker:
        ours, workers_end = self._context.Pipe()
        crashes, crash_log = self._context.Pipe(duplex=False)
        arguments = (workers_end, crash_log, device, self._threads, self._stack, dict(os.environ))

        def start() -> BaseProcess:
            process: BaseProcess = self._context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            return process

        process = begin(start)
        workers_end.close()
        crash_log.close()
        if os.name == "posix":
            threading.Thread(target=_bury, args=(process, os.dup(ours.fileno())), daemon=True).start()
        return _Worker(device, process, ours, crashes)

    def accepts(self, slot: int) -> bool:
        """Whether no exclusive task has the slot's process."""
        return not self._workers[slot % len(self._workers)].exclusive

    def submit(self, slot: int, task: Task) -> None:
        """Send the task, or hold an exclusive one until its process is empty; a worker that died idle is replaced."""
        index = slot % len(self._workers)
        if not self._workers[index].busy and not self._workers[index].process.is_alive():
            self._replace(index)
        worker = self._workers[index]
        worker.exclusive = task.exclusive
        if task.exclusive and worker.busy:
            worker.held = slot, task
        else:
            self._send(slot, task)
        worker.busy.add(slot)

    def verdict(self, slot: int, *, go_on: bool) -> None:
        """Send the verdict."""
        self._send(slot, go_on)

    def _send(self, slot: int, content: Task | bool) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died just now: the next poll notices
            self._workers[slot % len(self._workers)].connection.send((slot, content))

    def poll(self, timeout: float) -> list[tuple[int, Message]]:
        """Messages of all workers that have one, in the order of slots."""
        open_workers = {worker.connection: index for index, worker in enumerate(self._workers) if worker.busy}
        ready = wait(list(open_workers), timeout) if open_workers else []
        messages = [found for connection in ready for found in self._receive(open_workers[connection])]  # type: ignore[index]
        return sorted(messages, key=itemgetter(0))

    def _receive(self, index: int) -> list[tuple[int, Message]]:
        """The next message of a worker; if it died, one for each of its candidates."""
        worker = self._workers[index]
        try:
            slot, message = worker.connection.recv()
        except (EOFError, ConnectionResetError, OSError):
            lost = self._replace(index)
            waiting = {worker.held[0]} if worker.held else set()
            successor = self._workers[index]
            successor.busy, successor.held, successor.exclusive = set(waiting), worker.held, bool(waiting)
            self._release(successor)
            return [(slot, lost) for slot in worker.busy - waiting]
        if isinstance(message, TrialEnded):
            worker.busy.discard(slot)
            self._release(worker)
        return [(slot, message)]

    def _release(self, worker: _Worker) -> None:
        """Send the exclusive task that waits for the process to be empty, if it is."""
        if worker.held and worker.busy == {worker.held[0]}:
            self._send(*worker.held)
            worker.held = None
        worker.exclusive = worker.exclusive and bool(worker.busy)

    def _replace(self, index: int) -> WorkerLost:
        worker = self._workers[index]
        _end(worker)
        self._workers[index] = self._start(worker.device)
        return WorkerLost(worker.process.exitcode, _crash_traceback(worker.crashes))

    def close(self) -> None:
        """Kill the workers: all that they hold is recorded already."""
        for worker in self._workers:
            _end(worker)


def _bury(process: BaseProcess, pipe: int) -> None:
    """Once a worker is dead, end what it had started, and its pipe, which that may hold open or half written."""
    with contextlib.suppress(OSError), socket.socket(fileno=pipe) as ours:
        wait([process.sentinel])
        end_leftovers(process)
        ours.shutdown(socket.SHUT_RD)  # what has arrived is still read, and the end after it


def _end(worker: _Worker) -> None:
    end_family(worker.process)
    worker.process.join(5)
    worker.connection.close()


def _crash_traceback(crashes: Connection) -> str:
    """The traceback that the fault handler of a dead worker wrote; "" without one."""
    with crashes:
        if os.name != "posix":
            return ""
        os.set_blocking(crashes.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            return os.read(crashes.fileno(), 65536).decode(errors="replace")
    return ""


class ProcessesFactory:
    """The default engine: one process for each core or GPU, or as many as --workers asks for."""

    stacks = True

    def __init__(self, options: RunOptions) -> None:
        self.device = options.device
        self._options = options

    def connect(self) -> None:
        """There is nothing to reach."""

    def plan(self, devices: Sequence[str], *, most: int) -> WorkerPlan:
        """One worker for each GPU, group of GPUs, or core, unless a number was asked for; devices in turn."""
        workers, ranks = self._options.workers, self._options.ranks
        devices = group_devices(devices, self._options)
        if workers is None:
            workers = cores() // ranks if devices[0] == "cpu" else len(devices)
        chosen = tuple(devices[index % len(devices)] for index in range(max(1, min(workers, most))))
        return WorkerPlan(chosen, max(1, cores() // len(chosen) // ranks), described(chosen, ranks), ranks)

    def start(self, plan: WorkerPlan, work: StudyWork, *, stack: int) -> LocalProcesses:  # noqa: ARG002 - tasks name it
        """Start the processes."""
        return LocalProcesses(plan.devices, threads=plan.threads, stack=stack)

    def close(self) -> None:
        """There is nothing to let go of."""
