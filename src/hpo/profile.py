"""Where time goes: clocks that add it up phase by phase, and the records of what they found."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

T = TypeVar("T")
_FAR = 0.25  # of the roof


@dataclass(frozen=True)
class Profile:
    """Where a trial's time went, and how near its steps came to what its device can do.

    seconds and cpu_seconds are by phase. flops and traffic (bytes that operators read and write) are of all forward and
    backward passes; peak_flops, in FLOP/s, and peak_traffic, in bytes/s, are what plain matrix products and copies
    reached in the trial's worker, with its threads and precision.
    """

    seconds: Mapping[str, float]
    cpu_seconds: Mapping[str, float]
    flops: float = 0.0
    traffic: float = 0.0
    peak_flops: float = 0.0
    peak_traffic: float = 0.0


@dataclass(frozen=True)
class Limit:
    """What the forward and backward passes of some trials reached, and what plain products and copies reached there.

    flops and peak_flops are in FLOP/s; traffic and peak_traffic in bytes/s, as operators read and write: what a cache
    serves makes them exceed the peak, which is of memory. intensity is in FLOP a byte.
    """

    device: str
    precision: str
    threads: str
    flops: float
    peak_flops: float
    traffic: float
    peak_traffic: float

    @property
    def intensity(self) -> float:
        """FLOP for each byte that moves."""
        return self.flops / self.traffic

    @property
    def roof(self) -> float:
        """FLOP/s that the slower of the two, arithmetic and memory, would allow (Williams et al. 2009)."""
        return min(self.peak_flops, self.intensity * self.peak_traffic)

    @property
    def bound(self) -> str:
        """arithmetic or memory, whichever makes the roof; neither where the network stays far below it.

        Small networks do, whose operators take longer to call than to compute, and those of operators that suit the
        device badly.
        """
        if self.flops < _FAR * self.roof:
            return "neither"
        return "arithmetic" if self.roof == self.peak_flops else "memory"


@dataclass(frozen=True)
class StudyProfiled:
    """Where a run's time went. trials are those of this run that were trained to some end.

    seconds is how long the workers stood ready; phases are what they did meanwhile, all of them together, and beside
    what other processes did for them, both as (seconds, CPU seconds). limits says how near the networks came to what
    the device can do, one for each device, precision and number of threads.
    """

    trials: int
    workers: int
    seconds: float
    phases: Mapping[str, tuple[float, float]]
    beside: Mapping[str, tuple[float, float]]
    limits: tuple[Limit, ...]


def _nothing() -> None:
    """A device that computes as it is told has nothing to wait for."""


class Clock:
    """Seconds and CPU seconds by phase, of one thread at a time.

    CPU seconds are those of the calling thread, which on the CPU runs forward and backward passes too: beside wall
    seconds they tell what a busy machine took away. sync waits for a device that computes behind the program's back.
    """

    def __init__(self, sync: Callable[[], None] = _nothing) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.cpu_seconds: dict[str, float] = defaultdict(float)
        self._sync = sync
        self._last = time.perf_counter(), time.thread_time()

    def lap(self, phase: str) -> None:
        """All that has passed since the last lap, or since the clock was made, was this phase."""
        self._sync()
        now = time.perf_counter(), time.thread_time()
        self.add(phase, now[0] - self._last[0], now[1] - self._last[1])
        self._last = now

    def add(self, phase: str, seconds: float, cpu_seconds: float) -> None:
        """Count what was measured otherwise."""
        self.seconds[phase] += seconds
        self.cpu_seconds[phase] += cpu_seconds

    @contextmanager
    def span(self, phase: str) -> Iterator[None]:
        """The block is this phase, in whatever thread it runs; laps are left alone."""
        began = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - began[0], time.thread_time() - began[1])


class _Stopped(Clock):
    def lap(self, phase: str) -> None:
        """Nobody asks."""

    def add(self, phase: str, seconds: float, cpu_seconds: float) -> None:
        """Nobody asks."""


NO_CLOCK: Clock = _Stopped()


class _Timed:
    """Stands for another object; methods named in phases are timed."""

    def __init__(self, target: object, clock: Clock, phases: dict[str, str]) -> None:
        self._target, self._clock, self._phases = target, clock, phases

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if name not in self._phases:
            return found

        def timed(*arguments: Any, **options: Any) -> Any:
            with self._clock.span(self._phases[name]):
                return found(*arguments, **options)

        return timed


def timed(target: T, clock: Clock, **phases: str) -> T:
    """target, with the time of its methods (name=phase) counted by the clock; target itself where that is NO_CLOCK."""
    return target if clock is NO_CLOCK else cast("T", _Timed(target, clock, phases))
