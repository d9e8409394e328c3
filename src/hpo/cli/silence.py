"""A word in the terminal when a command has printed nothing for a second."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE = 1.0  # seconds
_timer: threading.Timer | None = None  # of the command that runs in this process


@contextmanager
def announced(doing: str) -> Iterator[None]:
    """Print in a terminal what is being done, if the block takes longer than a second and prints nothing before."""
    global _timer
    if not (doing and sys.stderr.isatty()):
        yield
        return
    _timer = threading.Timer(_PATIENCE, _say, [doing])
    _timer.daemon = True
    _timer.start()
    try:
        yield
    finally:
        break_silence()


def break_silence() -> None:
    """Something is printed now, so nothing need be announced."""
    if _timer is not None:
        _timer.cancel()


def _say(doing: str) -> None:
    sys.stderr.write(f"{doing} ...\n")
    sys.stderr.flush()
