"""The processes of a run: their start, their environment and signals, and their end."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol, TypeVar

from hpo.errors import HpoError
from hpo.records import EndReason

T = TypeVar("T")

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of this container, seen from inside
_GRACE = 8.0  # seconds that a run may still save results after its deadline
_PATIENCE = 30.0  # and after Ctrl-C or hpo stop, since it has last saved one
_FOR_TRACKING = 3.0  # of these, kept from the export of models for their registration
_TICK = 0.1
_SIGNALS = {
    "SIGKILL": "often the system's answer when memory is short",
    "SIGSEGV": "native code crashed",
    "SIGABRT": "native code gave up",
    "SIGBUS": "native code crashed, or a disk that data is mapped from is full",
    "SIGILL": "native code for another processor",
    "SIGFPE": "native code crashed",
}
SLOW = 1.0  # seconds after which a notice says what a run waits for
_beginning = threading.Lock()
_SERVER_ENDS = 5.0  # seconds that a fork server may take to end
_LEAST_MEMORY = 8  # GB of addresses; torch alone maps three


class _Waitable(Protocol):
    """A future, or a job of the job process."""

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What it raised, or None; raises TimeoutError after timeout seconds."""


class RunEnd:
    """The end of a run that is asked for: its deadline, Ctrl-C or SIGTERM, hpo stop. Whatever waits, asks left().

    deadline is a time.monotonic() value or inf.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self._deadline = deadline
        self.interrupted = threading.Event()
        self._began = math.inf  # when the end was asked for
        self._progress = -math.inf  # when something was last saved
        self._stop_asked: Callable[[], bool] = lambda: False
        self._stop_every, self._stop_checked, self._stopped = 0.0, 0.0, False
        self._hurried = False  # by a second Ctrl-C
        self._shielded = self._held_back = False

    def watch_stop(self, asked: Callable[[], bool], *, every: float) -> None:
        """Also call this every `every` seconds: True ends the run."""
        self._stop_asked, self._stop_every, self._stop_checked = asked, every, time.monotonic()

    def reason(self) -> EndReason | None:
        """Why the run is to end; None: it is not."""
        now = time.monotonic()
        if not self._stopped and now - self._stop_checked > self._stop_every:
            self._stop_checked, self._stopped = now, self._stop_asked()
        if self.interrupted.is_set():
            reason = EndReason.INTERRUPTED
        elif now >= self._deadline:
            reason = EndReason.TIMEOUT
        elif self._stopped:
            reason = EndReason.STOPPED
        else:
            return None
        self._began = min(self._began, now, self._deadline)
        return reason

    def left(self, *, reserve: float = 0.0) -> float:
        """Seconds that the run may still save results, less a reserve; inf until its end is asked for.

        After a second Ctrl-C they are none.
        """
        reason = self.reason()
        if reason is None:
            return math.inf
        until = max(self._began, self._progress) + _PATIENCE if reason.by_user else self._began + _GRACE
        return 0.0 if self._hurried else max(0.0, until - reserve - time.monotonic())

    def note_progress(self) -> None:
        """Something was saved just now; from any thread."""
        self._progress = time.monotonic()

    def await_done(
        self, job: _Waitable, *, reserve: float = _FOR_TRACKING, slow: Callable[[], object] | None = None
    ) -> bool:
        """Wait for a job as long as there is time left; True: it is done. slow is called if it takes over a second."""
        told_after = time.monotonic() + SLOW
        while True:
            try:
                job.exception(timeout=min(_TICK, self.left(reserve=reserve)))
            except TimeoutError:
                if not self.left(reserve=reserve):
                    return False
                if slow is not None and time.monotonic() > told_after:
                    slow()
                    slow = None
            else:
                return True

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """A second Ctrl-C is heard after the block, a third one in it."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self._held_back:
            raise KeyboardInterrupt

    def note_signal(self, number: int) -> None:
        """Take in a signal. Raises KeyboardInterrupt at a second Ctrl-C, after which nothing waits any more."""
        # Schedulers send SIGTERM more than once; to end a process at once they have SIGKILL.
        if self.interrupted.is_set() and number == signal.SIGINT:
            self._hurried = True
            if self._shielded and not self._held_back:
                self._held_back = True
                return
            raise KeyboardInterrupt
        self.interrupted.set()


@contextlib.contextmanager
def interruptible(deadline: float = math.inf) -> Iterator[RunEnd]:
    """Ctrl-C and SIGTERM are noted by the RunEnd; a second Ctrl-C ends the process the usual way."""
    end = RunEnd(deadline)
    if threading.current_thread() is not threading.main_thread():
        yield end  # signals belong to the main thread
        return
    handlers: dict[int, Callable[[int, Any], None]] = {
        signal.SIGINT: lambda number, _: end.note_signal(number),
        signal.SIGTERM: lambda number, _: end.note_signal(number),
    }
    if hasattr(signal, "SIGTSTP") and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
        handlers[signal.SIGTSTP] = _suspend
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _suspend(*_: Any) -> None:
    """Ctrl-Z: workers have process groups of their own, which the terminal does not reach."""
    children = multiprocessing.active_children()
    for child in children:
        _signal_family(child, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)  # this process stands still here
    for child in children:
        _signal_family(child, signal.SIGCONT)


def process_context() -> BaseContext:
    """The start method: a fork server that has imported torch (0.03 s per process instead of 5 s), else spawn."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpo.training.preload", "hpo.execute.workers.main"])
    return context


def start_fork_server() -> None:
    """Begin to import torch in the fork server, while this process does other things."""
    if process_context().get_start_method() == "forkserver":
        from multiprocessing.forkserver import ensure_running

        with _beginning, hidden_main():
            ensure_running()


def _fork_server() -> int | None:
    """The process id of this process's fork server, for which multiprocessing has no call; None where it has none."""
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    pid: int | None = getattr(server, "_forkserver_pid", None)
    return pid


def end_fork_server() -> None:
    """Kill the fork server of this process, if it has one.

    By itself it takes seconds to end, and a reader of our output through a pipe waits for it.
    """
    if (pid := _fork_server()) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def begin(start: Callable[[], T]) -> T:
    """start(), which starts a process; once more if the fork server dies of it. Raises HpoError if it dies again.

    One thread at a time.
    """
    with _beginning, hidden_main():
        try:
            return start()
        except (EOFError, ConnectionError):
            _await_fork_server()
        try:
            return start()
        except (EOFError, ConnectionError):
            code = _await_fork_server()
    raise HpoError(f"no process can be started: the server that forks them ended twice ({code}).", _memory_hint())


def _await_fork_server() -> str:
    """Wait until the fork server, which has closed its pipes, has ended, and leave it to multiprocessing; its end."""
    pid, until = _fork_server(), time.monotonic() + _SERVER_ENDS
    with contextlib.suppress(ChildProcessError):
        while pid is not None and time.monotonic() < until:
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
            if ended is not None:
                return f"exit code {ended.si_status}" if ended.si_code == os.CLD_EXITED else f"signal {ended.si_status}"
            time.sleep(_TICK)
    return "no cause is known"


def _memory_hint() -> str:
    """What to do where a process cannot start, which mostly is for lack of memory."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return "Is memory short? End other programs, or use fewer workers: --workers 1"
    return (
        f"The address space of a process is limited to {limit / 1e9:.1f} GB, which is used up: torch needs "
        f"{_LEAST_MEMORY} GB. Raise the limit: ulimit -v unlimited"
    )


def end_family(process: BaseProcess) -> None:
    """Kill a process with all that it has started; of a dead one, what it has left."""
    if hasattr(os, "killpg"):
        _signal_family(process, signal.SIGKILL)
    if process.is_alive():
        process.kill()


def end_leftovers(process: BaseProcess) -> None:
    """Kill what a dead process had started; from any thread, since this does not read the exit code."""
    _signal_family(process, signal.SIGKILL)


def _signal_family(process: BaseProcess, number: int) -> None:
    if hasattr(os, "killpg") and process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has no group yet, or none any more
            os.killpg(process.pid, number)


@contextlib.contextmanager
def hidden_main() -> Iterator[None]:
    """Processes started inside do not import the user's script again, so that it needs no `if __name__` guard."""
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    main.__spec__ = None
    main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


def follow_supervisor(
    environment: Mapping[str, str],
    connection: Connection | None = None,
    *,
    last: Callable[[], object] = lambda: None,
) -> None:
    """Make this process ignore Ctrl-C and SIGTERM, and end at once when its supervisor dies, with all that it started.

    environment is the supervisor's: the fork server keeps the environment of its start, and a notebook may have changed
    its own since. With a connection, on which the supervisor sends nothing, the process also ends when the supervisor
    closes it. What it prints goes to standard error: standard output belongs to the command.
    """
    os.environ.clear()
    os.environ.update(environment)
    with contextlib.suppress(OSError):  # one of them is closed
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # what it starts is found by this, and ended with it
    # Ctrl-C reaches the whole terminal group, and a scheduler's SIGTERM the whole job. The supervisor decides what to
    # do, and needs its workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        signs = [supervisor.sentinel, *([connection] if connection else [])]
        threading.Thread(target=_end_with, args=(signs, last), daemon=True).start()


def _end_with(signs: list[Any], last: Callable[[], object]) -> None:
    wait(signs)
    last()
    if hasattr(os, "getpgrp") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def cores(quota: Path = _QUOTA) -> int:
    """The number of CPU cores that this process may use, by its affinity and by the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text(encoding="ascii").split()  # microseconds: "200000 100000", "max 100000"
    except (OSError, ValueError):
        return count
    return count if most == "max" else min(count, max(1, math.ceil(int(most) / int(period))))


def cause_of_death(exitcode: int | None) -> str:
    """Why a process ended, by its exit code: signal 11, SIGSEGV: native code crashed."""
    code = exitcode or 0
    if code >= 0:
        return f"exit code {code}"
    name = {number.value: number.name for number in signal.Signals}.get(-code, "")
    return ", ".join(filter(None, [f"signal {-code}", f"{name}: {_SIGNALS[name]}" if name in _SIGNALS else name]))
