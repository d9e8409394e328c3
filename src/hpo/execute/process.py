"""The processes that a study starts: how they begin, whom they follow, how they end."""

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

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of the own container, as it sees it


def process_context() -> BaseContext:
    """Processes forked from a server that has imported torch: 0.03 s each instead of 5 s; spawned where none is."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hpo.training.compute.preload", "hpo.execute.workers.main"])
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
    """Called in a process of ours: it leaves Ctrl-C and SIGTERM to its supervisor, and ends at once when that dies.

    environment is the supervisor's: the fork server keeps the one that it was started with, and a notebook may have
    changed its own since. With a connection on which nothing is sent this way, the process also ends when the
    supervisor closes that.
    """
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl-C reaches the whole terminal group, a scheduler's SIGTERM the whole job: the supervisor alone decides what
    # they mean, and needs its workers until then.
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
    """CPU cores that this process may use: those it may run on, or fewer where its container is given less time."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = quota.read_text(encoding="ascii").split()  # microseconds: "200000 100000", "max 100000"
    except (OSError, ValueError):
        return count
    return count if most == "max" else min(count, max(1, math.ceil(int(most) / int(period))))
