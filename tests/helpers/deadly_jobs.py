"""Jobs that kill the process that does them, never end, or start processes of their own."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def die_once(mark: Path) -> str:
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die_once_with_child(file: Path) -> str:
    if not file.exists():
        leave_child(file)
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die_always() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(**_: object) -> None:
    time.sleep(600)


def prints_to_stderr() -> bool:
    """Whether what this process and its native code print goes to standard error."""
    return sys.stdout is sys.stderr and os.path.sameopenfile(1, 2)


def leave_child(file: Path) -> None:
    """Start a process that outlives this one and holds all its pipes open; its id is in the file."""
    if (child := os.fork()) == 0:
        time.sleep(600)
        os._exit(0)
    file.write_text(str(child), encoding="ascii")


def is_alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_end(process: int) -> bool:
    """Whether a process ends within a minute."""
    ends = time.monotonic() + 60
    while is_alive(process) and time.monotonic() < ends:
        time.sleep(0.02)
    return not is_alive(process)
