"""The processes of a run: their start, their environment and signals, and their end."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of this container, seen from inside


def process_context() -> BaseContext:
    """The start method: a fork server that has imported torch (0.03 s per process instead of 5 s), else spawn."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpo.training.preload", "hpo.execute.workers.main"])
    return context


def end_fork_server() -> None:
    """Kill the fork server of this process, if it has one; multiprocessing has no call for that.

    By itself it takes seconds to end, and a reader of our output through a pipe waits for it.
    """
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    pid = getattr(server, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


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


def follow_supervisor(environment: Mapping[str, str], connection: Connection | None = None) -> None:
    """Make this process ignore Ctrl-C and SIGTERM, and end at once when its supervisor dies.

    environment is the supervisor's: the fork server keeps the environment of its start, and a notebook may have changed
    its own since. With a connection, on which the supervisor sends nothing, the process also ends when the supervisor
    closes it.
    """
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C reaches the whole terminal group, and a scheduler's SIGTERM the whole job. The supervisor decides what to
    # do, and needs its workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    supervisor = multiprocessing.parent_process()
    if supervisor is not None:
        signs = [supervisor.sentinel, *([connection] if connection else [])]
        threading.Thread(target=_end_with, args=(signs,), daemon=True).start()


def _end_with(signs: list[Any]) -> None:
    wait(signs)
    os._exit(0)


def cores(quota: Path = _QUOTA) -> int:
    """The number of CPU cores that this process may use, by its affinity and by the quota of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text(encoding="ascii").split()  # microseconds: "200000 100000", "max 100000"
    except (OSError, ValueError):
        return count
    return count if most == "max" else min(count, max(1, math.ceil(int(most) / int(period))))
