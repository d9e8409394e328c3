"""A queue of calls to the tracker, run in order by a thread: training never waits for the tracking store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from hpo.database import is_damaged
from hpo.errors import StoreAwayError
from hpo.execute.process import RunEnd

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT = 30.0  # seconds that the end of a study waits for a store that is unavailable
_TICK = 0.1


class TrackingQueue:
    """Runs every submitted call after the one before it.

    While the store is unavailable (StoreAwayError) the calls wait: the first is tried again after first_pause seconds,
    then after twice as long each time, at most longest_pause. Any other failure becomes a notice, and the next call
    follows. Whatever the store does, waiting hears the end of the run.
    """

    def __init__(self, *, first_pause: float = 1.0, longest_pause: float = 30.0, end: RunEnd | None = None) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hpo-tracker")
        self._pauses = first_pause, longest_pause
        self._end = end or RunEnd()
        self._lock = threading.Lock()
        self._pending = 0  # submitted and not done
        self._outage: StoreAwayError | None = None  # why the store refuses now
        self._delivered_late: int | None = None  # calls since the store is back; None: none has waited
        self._gave_up = threading.Event()
        self._notices: list[str] = []
        self._noticed: set[str] = set()
        self._waited = 0.0

    def submit(self, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        """Queue call(*arguments, **options)."""
        with self._lock:
            self._pending += 1
        return self._thread.submit(self._deliver, partial(call, *arguments, **options))

    def notices(self) -> list[str]:
        """Lines for the user since the last call: failures, the beginning and the end of an outage."""
        with self._lock:
            taken, self._notices = self._notices, []
        return taken

    def wait(self, *, timeout: float = TIMEOUT, notify: Callable[[str], None] | None = None) -> bool:
        """Wait until all calls are done; True: they are. It ends too when the time is up.

        That is so where the store has been unavailable for timeout seconds, or where no time is left for the run.

        The seconds of several calls of this method add up. notify takes the notices meanwhile.
        """
        while True:
            self._pass_on(notify)
            with self._lock:
                pending, outage = self._pending, self._outage is not None
            if not pending or (outage and self._waited >= timeout) or not self._end.left():
                return not pending
            time.sleep(_TICK)
            self._waited += _TICK if outage else 0.0

    def close(self, *, timeout: float = TIMEOUT, notify: Callable[[str], None] | None = None) -> None:
        """Wait as wait does, then give up what is not done, with a notice: the study storage has all of it."""
        done = self.wait(timeout=timeout, notify=notify)
        if not done and not self._gave_up.is_set():
            self._gave_up.set()
            with self._lock:
                cause = self._outage or "The run had to end."
                self._notices.append(
                    f"tracking: {_records(self._pending)} still to be delivered. {cause} The next hpo run of "
                    "this study delivers what is missing, and so does hpo doctor --fix."
                )
        self._thread.shutdown(wait=done)
        self._pass_on(notify)

    def _pass_on(self, notify: Callable[[str], None] | None) -> None:
        if notify is not None:
            for text in self.notices():
                notify(text)

    def _deliver(self, call: Callable[[], T]) -> T:
        pause, longest = self._pauses
        try:
            while True:
                if self._gave_up.is_set():
                    raise self._outage or StoreAwayError("the run is over.")
                try:
                    result = call()
                except StoreAwayError as error:
                    self._note_outage(error)
                    self._gave_up.wait(pause)
                    pause = min(2 * pause, longest)
                else:
                    self._note_delivery()
                    return result
        except StoreAwayError:
            raise
        except Exception as error:
            self._note_failure(error)
            raise
        finally:
            self._end.note_progress()
            with self._lock:
                self._pending -= 1

    def _note_outage(self, error: StoreAwayError) -> None:
        with self._lock:
            if self._delivered_late is None:
                self._delivered_late = 0
                self._notices.append(f"tracking waits: {error} Training continues; nothing is lost.")
            self._outage = error

    def _note_delivery(self) -> None:
        with self._lock:
            self._outage = None
            if self._delivered_late is None:
                return
            self._delivered_late += 1
            if self._pending == 1:  # this one
                self._notices.append(f"tracking is back: {_records(self._delivered_late)} delivered.")
                self._delivered_late = None

    def _note_failure(self, error: Exception) -> None:
        # A damaged database stays so; its error says what to do.
        text = f"tracking: {error}" + " The next hpo run of this study mends it." * (not is_damaged(str(error)))
        with self._lock:
            if text not in self._noticed:  # once, not once a trial
                self._noticed.add(text)
                self._notices.append(text)


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count} records"
