"""Calls to a tracking store that goes away and comes back."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from hpo.errors import StoreAwayError, StoreError
from hpo.execute import tracking_queue
from hpo.execute.tracking_queue import TrackingQueue


class _Store:
    """Takes what it is told while it is up."""

    def __init__(self, *, up: bool = True) -> None:
        self.up = threading.Event()
        self.taken: list[int] = []
        if up:
            self.up.set()

    def take(self, number: int) -> int:
        if not self.up.is_set():
            raise StoreAwayError("the store: nothing answers.")
        self.taken.append(number)
        return number


def _queue() -> TrackingQueue:
    return TrackingQueue(first_pause=0.01, longest_pause=0.02)


def _wait_for_notices(queue: TrackingQueue) -> list[str]:
    deadline = time.monotonic() + 10
    while not (notices := queue.notices()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return notices


def test_calls_wait_in_order_while_the_store_is_away_and_the_user_hears_of_it_twice():
    queue, store = _queue(), _Store()
    queue.submit(store.take, 0).result()
    store.up.clear()
    futures = [queue.submit(store.take, number) for number in range(1, 6)]
    (away,) = _wait_for_notices(queue)
    assert away.startswith("tracking waits: the store: nothing answers.")
    time.sleep(0.1)
    assert queue.notices() == []
    store.up.set()
    queue.close()
    assert store.taken == list(range(6))
    assert [future.result() for future in futures] == [1, 2, 3, 4, 5]
    assert queue.notices() == ["tracking is back: 5 records delivered."]


def test_the_end_waits_for_a_store_that_is_away_only_so_long():
    queue, store = _queue(), _Store(up=False)
    futures = [queue.submit(store.take, number) for number in range(3)]
    heard: list[str] = []
    started = time.monotonic()
    assert not queue.wait(timeout=0.3, notify=heard.append)
    queue.close(timeout=0.3, notify=heard.append)  # the same seconds, not once more
    assert time.monotonic() - started < 3
    assert len(heard) == 2
    assert heard[1].startswith("tracking: 3 records still to be delivered. the store: nothing answers.")
    assert "hpo run" in heard[1]
    assert isinstance(futures[0].exception(timeout=5), StoreAwayError)
    store.up.set()
    assert isinstance(futures[2].exception(timeout=5), StoreAwayError)
    assert store.taken == [], "after one is given up, none that follows is delivered"


def test_a_call_that_is_refused_for_good_is_told_once_and_the_next_follows():
    queue, store = _queue(), _Store()

    def refuse() -> None:
        raise StoreError("no such run.")

    queue.submit(refuse)
    queue.submit(refuse)
    queue.submit(store.take, 1)
    queue.close()
    assert store.taken == [1]
    assert queue.notices() == ["tracking: no such run. The next hpo run of this study mends it."]


def test_of_a_damaged_database_nobody_says_that_the_next_run_mends_it():
    queue = _queue()

    def refuse() -> None:
        raise StoreError("MLflow: database disk image is malformed.", "Restore it from a copy.")

    queue.submit(refuse)
    queue.close()
    assert queue.notices() == ["tracking: MLflow: database disk image is malformed. Restore it from a copy."]


class _Away:
    """A tracker in a new process, whose store is away at its first call."""

    def __init__(self, home):
        self.opened, self.away = [], True

    def open_study(self, study):
        if self.away:
            self.away = False
            raise StoreAwayError("away.")
        self.opened.append(study)

    def end_trial(self, number):
        return self.opened, number


def test_a_tracker_that_a_new_process_could_not_open_is_opened_by_the_next_try(monkeypatch):
    away = _Away(None)
    monkeypatch.setattr(tracking_queue, "Tracker", lambda _: away)
    monkeypatch.setattr(tracking_queue, "_here", [])
    call = partial(tracking_queue.write_runs, None, ("study",), "end_trial", (3,), {})
    with pytest.raises(StoreAwayError):
        call()
    assert call() == call() == (["study"], 3)
