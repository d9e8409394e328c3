"""Calls to the tracker, in order, in one thread of their own: training waits neither for them nor for their store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from hpo.errors import StoreAwayError

P = ParamSpec("P")
T = TypeVar("T")

PATIENCE = 30.0  # seconds that the end of a study waits for a store that is away
_TICK = 0.1


class Background:
    """Every submitted call runs after the one before it.

    While the store is away (StoreAwayError) the calls wait: the first is tried again after first_pause seconds, then
    twice as long, at most longest_pause. Any other failure is told, and the next call follows.
    """

    def __init__(self, *, first_pause: float = 1.0, longest_pause: float = 30.0) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hpo-tracker")
        self._pauses = first_pause, longest_pause
        self._lock = threading.Lock()
        self._waiting = 0  # submitted and not done
        self._away: StoreAwayError | None = None  # why the store refuses now
        self._late: int | None = None  # delivered since it was back; None: nothing has waited
        self._gave_up = threading.Event()
        self._news: list[str] = []
        self._said: set[str] = set()
        self._waited = 0.0

    def submit(self, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        """Queue call(*arguments, **options)."""
        with self._lock:
            self._waiting += 1
        return self._thread.submit(self._deliver, partial(call, *arguments, **options))

    def news(self) -> list[str]:
        """What there is to tell the user since the last call: failures, that the store went away, that it is back."""
        with self._lock:
            taken, self._news = self._news, []
        return taken

    def settle(self, *, patience: float = PATIENCE, hear: Callable[[str], None] | None = None) -> bool:
        """Wait for all that was submitted, or until the store has been away for patience seconds; True: all is done.

        The seconds of several calls add up. hear is told the news meanwhile.
        """
        while True:
            for text in self.news() if hear else ():
                hear(text)  # type: ignore[misc]  # there is none without it
            with self._lock:
                waiting, away = self._waiting, self._away is not None
            if not waiting or (away and self._waited >= patience):
                return not waiting
            time.sleep(_TICK)
            self._waited += _TICK if away else 0.0

    def join(self, *, patience: float = PATIENCE, hear: Callable[[str], None] | None = None) -> None:
        """As settle; what is not done then is given up and told: the study storage has all of it."""
        settled = self.settle(patience=patience, hear=hear)
        if not settled and not self._gave_up.is_set():
            self._gave_up.set()
            with self._lock:
                self._news.append(
                    f"tracking: {_records(self._waiting)} still to be delivered. {self._away} The next hpo run of this "
                    "study delivers what is missing, and so does hpo doctor --fix."
                )
        self._thread.shutdown(wait=settled)
        for text in self.news() if hear else ():
            hear(text)  # type: ignore[misc]

    def _deliver(self, call: Callable[[], T]) -> T:
        pause, longest = self._pauses
        try:
            while True:
                if self._gave_up.is_set():
                    raise self._away or StoreAwayError("the run is over.")
                try:
                    result = call()
                except StoreAwayError as error:
                    self._note_away(error)
                    self._gave_up.wait(pause)
                    pause = min(2 * pause, longest)
                else:
                    self._note_back()
                    return result
        except StoreAwayError:
            raise
        except Exception as error:
            self._note_failure(error)
            raise
        finally:
            with self._lock:
                self._waiting -= 1

    def _note_away(self, error: StoreAwayError) -> None:
        with self._lock:
            if self._late is None:
                self._late = 0
                self._news.append(f"tracking waits: {error} Training goes on; nothing is lost.")
            self._away = error

    def _note_back(self) -> None:
        with self._lock:
            self._away = None
            if self._late is None:
                return
            self._late += 1
            if self._waiting == 1:  # this one
                self._news.append(f"tracking is back: {_records(self._late)} delivered.")
                self._late = None

    def _note_failure(self, error: Exception) -> None:
        text = f"tracking: {error} The next hpo run of this study mends it."
        with self._lock:
            if text not in self._said:  # once, not once a trial
                self._said.add(text)
                self._news.append(text)


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"
