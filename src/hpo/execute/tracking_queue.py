"""A queue of calls to the tracker, run in order by a thread: training never waits for the tracking store."""

from __future__ import annotations

import math
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

from hpo.database import is_damaged
from hpo.errors import StoreAwayError
from hpo.execute.process import SLOW, RunEnd
from hpo.execute.workers.job_process import JobProcess
from hpo.home import Home
from hpo.report.text import counted
from hpo.tracking.models import warm_up
from hpo.tracking.tracker import Tracker

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
        told_after = time.monotonic() + SLOW
        while True:
            self._pass_on(notify)
            with self._lock:
                pending, outage = self._pending, self._outage is not None
            if notify is not None and pending and not outage and time.monotonic() > told_after:
                told_after = math.inf
                notify(f"MLflow takes {counted(pending, 'record')}")
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
                    f"tracking: {counted(self._pending, 'record')} still to be delivered. {cause} The next hpo run of "
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
                self._notices.append(f"tracking is back: {counted(self._delivered_late, 'record')} delivered.")
                self._delivered_late = None

    def _note_failure(self, error: Exception) -> None:
        # A damaged database stays so; its error says what to do.
        text = f"tracking: {error}" + " The next hpo run of this study mends it." * (not is_damaged(str(error)))
        with self._lock:
            if text not in self._noticed:  # once, not once a trial
                self._noticed.add(text)
                self._notices.append(text)


class TrackerProcess:
    """A Tracker in a process of its own, where the import of mlflow takes no time of the supervisor.

    It has the methods of Tracker. If its process dies, the call is made again in another one.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        # Not from the fork server: it begins while that one still imports torch, which it has no use for.
        self._jobs = JobProcess(multiprocessing.get_context("spawn"))
        self._opening: tuple[Any, ...] = ()

    def load(self) -> None:
        """Begin to import mlflow."""
        self._jobs.submit(warm_up)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._call, method)

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        if method == "open_study":
            study, *others = arguments
            self._opening = replace(study, trials=()), *others
        return self._jobs.submit(write_runs, self.home, self._opening, method, arguments, options).result()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._jobs.close()


def tracker_of(home: Home, cleanup: Callable[[Callable[[], None]], Any]) -> Tracker:
    """The tracker of a run; cleanup takes what is to be called at its end."""
    if "mlflow" in sys.modules:  # as in a notebook that has looked at the runs: nothing is left to import
        return Tracker(home)
    process = TrackerProcess(home)
    process.load()
    cleanup(process.close)
    return cast("Tracker", process)


_here: list[Tracker] = []  # the tracker of a TrackerProcess, once the study is open in it


def write_runs(
    home: Home, opening: Sequence[Any], method: str, arguments: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    """Call a method of this process's tracker; a new one opens the study first."""
    tracker = _here[0] if _here else Tracker(home)
    if not _here and opening and method != "open_study":
        tracker.open_study(*opening)
    _here[:] = [tracker]  # not before: if the store is unavailable, the next try opens it
    return getattr(tracker, method)(*arguments, **options)
