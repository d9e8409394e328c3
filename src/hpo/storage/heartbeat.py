"""Signs of life of a supervisor for its trials, where others cannot see its lease: on a server shared by machines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from hpo.storage.optuna_storage import BEAT, Storage


class Pulse:
    """A thread that beats for the trials that running() names (Optuna's ids), until it is closed."""

    def __init__(self, storage: Storage, running: Callable[[], Collection[int]]) -> None:
        self._storage, self._running = storage, running
        self._heard = self._unbroken_since = time.monotonic()  # when the server last answered; since when it always has
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="signs of life")
        self._thread.start()

    @property
    def steady(self) -> bool:
        """Whether the server has answered for so long, two beats, that the silence of others means something.

        After an outage all trials have been silent, the living ones too; who has just come cannot know of it.
        """
        now = time.monotonic()
        return now - self._heard < 2 * BEAT < now - self._unbroken_since

    def await_steady(self) -> None:
        """Wait until the silence of others means something, or four beats where the server does not answer."""
        deadline = time.monotonic() + 4 * BEAT
        while not self.steady and time.monotonic() < deadline:
            time.sleep(0.1)

    def close(self) -> None:
        """Beat no more."""
        self._ended.set()
        self._thread.join(5)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                with suppress(KeyError):  # a trial that is no more
                    self._storage.beat(self._running())
            except (SQLAlchemyError, OptunaError):
                continue
            now = time.monotonic()
            # It has waited for a server that was away, or with the whole process while that stood still.
            if now - self._heard > 2 * BEAT:
                self._unbroken_since = now
            self._heard = now
