"""Calls to a tracking store that goes away and comes back."""

from __future__ import annotations

import threading
import time

from hpo.errors import StoreAwayError, StoreError
from hpo.execute.tracking_queue import Background


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


def _background() -> Background:
    return Background(first_pause=0.01, longest_pause=0.02)


def _wait_for_news(background: Background) -> list[str]:
    deadline = time.monotonic() + 10
    while not (news := background.news()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return news


def test_calls_wait_in_order_while_the_store_is_away_and_the_user_hears_of_it_twice():
    background, store = _background(), _Store()
    background.submit(store.take, 0).result()
    store.up.clear()
    futures = [background.submit(store.take, number) for number in range(1, 6)]
    (away,) = _wait_for_news(background)
    assert away.startswith("tracking waits: the store: nothing answers.")
    time.sleep(0.1)
    assert background.news() == []
    store.up.set()
    background.join()
    assert store.taken == list(range(6))
    assert [future.result() for future in futures] == [1, 2, 3, 4, 5]
    assert background.news() == ["tracking is back: 5 records delivered."]


def test_the_end_waits_for_a_store_that_is_away_only_so_long():
    background, store = _background(), _Store(up=False)
    futures = [background.submit(store.take, number) for number in range(3)]
    heard: list[str] = []
    started = time.monotonic()
    assert not background.settle(patience=0.3, hear=heard.append)
    background.join(patience=0.3, hear=heard.append)  # the same patience, not once more
    assert time.monotonic() - started < 3
    assert len(heard) == 2
    assert heard[1].startswith("tracking: 3 records still to be delivered. the store: nothing answers.")
    assert "hpo run" in heard[1]
    assert isinstance(futures[0].exception(timeout=5), StoreAwayError)
    store.up.set()
    assert isinstance(futures[2].exception(timeout=5), StoreAwayError)
    assert store.taken == [], "after one is given up, none that follows is delivered"


def test_a_call_that_is_refused_for_good_is_told_once_and_the_next_follows():
    background, store = _background(), _Store()

    def refuse() -> None:
        raise StoreError("no such run.")

    background.submit(refuse)
    background.submit(refuse)
    background.submit(store.take, 1)
    background.join()
    assert store.taken == [1]
    assert background.news() == ["tracking: no such run. The next hpo run of this study mends it."]
