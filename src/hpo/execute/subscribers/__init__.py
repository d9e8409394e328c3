"""The one way out of the supervisor: events, and the subscribers that hear them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hpo.events import Event, RunEvent

Emit = Callable[[RunEvent], None]
Watch = Callable[[Event], None]


class Subscriber:
    """Hears every event of a run, in order. What it raises ends the run."""

    def __call__(self, event: RunEvent) -> None:
        """Take in one event."""

    def poll(self) -> None:
        """Do what has become due; called several times a second while trials run."""

    def close(self) -> None:
        """Let go of everything, also after an error; no event follows."""


class Watcher(Subscriber):
    """Passes on to a caller's function the events that are meant for users."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __call__(self, event: RunEvent) -> None:
        """Pass the event on."""
        if isinstance(event, Event):
            self._watch(event)


class Events:
    """Delivers each event to all subscribers, in the order in which they subscribed; without any, to nobody."""

    def __init__(self, subscribers: Iterable[Subscriber] = ()) -> None:
        self._subscribers = list(subscribers)

    def subscribe_first(self, *subscribers: Subscriber) -> None:
        """Add subscribers that hear every event before those there are."""
        self._subscribers[:0] = subscribers

    def emit(self, event: RunEvent) -> None:
        """Deliver an event."""
        for subscriber in self._subscribers:
            subscriber(event)

    def poll(self) -> None:
        """Let every subscriber do what has become due."""
        for subscriber in self._subscribers:
            subscriber.poll()

    def close(self) -> None:
        """Close every subscriber."""
        for subscriber in self._subscribers:
            subscriber.close()
