"""Calls to the tracker, in order, in one thread of their own: training never waits for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Background:
    """Every submitted call runs after the one before it; failures are kept for whoever asks."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="hpo-tracker")
        self._failures: list[Exception] = []

    def submit(self, call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> Future[T]:
        """Queue call(*arguments, **options)."""

        def noted() -> T:
            try:
                return call(*arguments, **options)
            except Exception as error:
                self._failures.append(error)
                raise

        return self._thread.submit(noted)

    def failures(self) -> list[Exception]:
        """What went wrong since the last call."""
        taken, self._failures = self._failures, []
        return taken

    def join(self) -> None:
        """Wait for everything that was submitted."""
        self._thread.shutdown(wait=True)
