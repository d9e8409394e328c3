"""Signs of life of a supervisor for its trials, where others cannot see its lease: on a server shared by machines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from hpo.search.storage import BEAT, GRACE, Storage


class Pulse:
    """A thread that beats for the trials that running() names (Optuna's ids), until it is closed."""

    def __init__(self, storage: Storage, running: Callable[[], Collection[int]]) -> None:
        self._storage, self._running = storage, running
        self._troubled = -float("inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="signs of life")
        self._thread.start()

    @property
    def steady(self) -> bool:
        """Whether the storage has taken what came for so long that the silence of others means something.

        After an outage all trials have been silent, the living ones too.
        """
        return time.monotonic() - self._troubled > GRACE

    def close(self) -> None:
        """Beat no more."""
        self._ended.set()
        self._thread.join(5)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            began = time.monotonic()
            try:
                with suppress(KeyError):  # a trial that is no more
                    self._storage.beat(self._running())
            except (SQLAlchemyError, OptunaError):
                self._troubled = time.monotonic()
            # It waits for a server that is away, and for the whole process while that stands still.
            if time.monotonic() - began > BEAT:
                self._troubled = time.monotonic()
