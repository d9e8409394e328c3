"""System metrics of a trial: processor and memory of machine and worker, and its GPUs, sampled while it trains.

One thread of the worker samples for all of its trials: every second at first, later every ten seconds. A trial keeps a
few values, however long it takes; each is the mean of the samples since the one before.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from typing import Self

import psutil
import torch

OFF = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"  # MLflow's own switch; here false turns the samples off
_SHORTEST, _LONGEST = 1.0, 10.0  # seconds between two samples
_MOST = 16  # values of a trial
_FRESH = 0.05  # seconds: trials that end together share a sample
_IDLE = 5.0  # seconds without a trial after which the thread ends

# (used, passed): the ratio of their growth between two readings is a utilisation.
Counter = tuple[float, float]


@dataclass(frozen=True)
class Sample:
    """The state of machine, worker and GPUs at a time (seconds since 1970).

    Names are MLflow's without its prefix system/, and worker_... for the process itself. levels are those of the
    moment.
    """

    time: float
    counters: Mapping[str, Counter]
    levels: Mapping[str, float]


def read_counters() -> dict[str, Counter]:
    """The processor time of the machine, all cores together, and of this process, where 1 is one core."""
    counters = {"worker_cpu_utilization_percentage": (time.process_time(), time.perf_counter())}
    with suppress(Exception):  # whatever the system refuses to tell: no trial fails for it
        times = psutil.cpu_times()
        passed = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # parts of user and nice
        counters["cpu_utilization_percentage"] = passed - times.idle - getattr(times, "iowait", 0.0), passed
    return counters


def read_levels(gpus: Sequence[int] = ()) -> dict[str, float]:
    """Memory of the machine and of this process; memory and utilisation of GPUs, given by torch's indices."""
    levels: dict[str, float] = {}
    with suppress(Exception):
        memory = psutil.virtual_memory()
        levels["system_memory_usage_megabytes"] = memory.used / 1e6
        levels["system_memory_usage_percentage"] = 100 * memory.used / memory.total
        levels["worker_memory_usage_megabytes"] = psutil.Process().memory_info().rss / 1e6
    for index in gpus:
        with suppress(Exception):
            levels[f"gpu_{index}_utilization_percentage"] = float(torch.cuda.utilization(index))
        with suppress(Exception):
            used = torch.cuda.device_memory_used(index)
            levels[f"gpu_{index}_memory_usage_megabytes"] = used / 1e6
            # The question for the whole memory starts CUDA, which a worker that only starts ranks must not do.
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                whole = torch.cuda.get_device_properties(index).total_memory
                levels[f"gpu_{index}_memory_usage_percentage"] = 100 * used / whole
    return levels


def gpus_of(device_name: str, ranks: int = 1) -> tuple[int, ...]:
    """The indices of a trial's GPUs: that of its device, and the next ones where several ranks train it."""
    device = torch.device(device_name)
    first = device.index or 0
    return tuple(range(first, first + ranks)) if device.type == "cuda" else ()


@dataclass
class SystemMetrics:
    """Takes samples within a `with` block and keeps at most _MOST values of them: then neighbours are merged.

    gpus are those of read_levels. worker: with the values of this process, which trains.
    """

    gpus: tuple[int, ...] = ()
    worker: bool = True
    due: float = field(default=0.0, init=False)  # on the monotonic clock
    _span: int = field(default=1, init=False)  # samples in a value
    _samples: list[dict[str, float]] = field(default_factory=list, init=False)  # of the next value
    _values: list[dict[str, float]] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        self._on = os.environ.get(OFF, "true").lower() not in ("false", "0")
        if self._on:
            self._begun = time.monotonic()
            self._counters: Mapping[str, Counter] = read_counters()
            self.due = self._begun + _SHORTEST
            _sampler.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._on:
            _sampler.remove(self)
            if not self._values and not self._samples:  # a short trial
                self.take(_sampler.sample(self.gpus))

    def take(self, sample: Sample) -> None:
        """Add a sample."""
        now = time.monotonic()
        self.due = now + min(_LONGEST, max(_SHORTEST, (now - self._begun) / 8))
        values = {"time": sample.time, **sample.levels}
        for name, (used, passed) in sample.counters.items():
            earlier = self._counters.get(name, (used, passed))
            if passed > earlier[1]:
                values[name] = 100 * (used - earlier[0]) / (passed - earlier[1])
        self._counters = sample.counters
        self._samples.append({name: value for name, value in values.items() if self.worker or name[:6] != "worker"})
        if len(self._samples) == self._span:
            self._values.append(_mean(self._samples))
            self._samples = []
        if len(self._values) == _MOST:
            self._values = [_mean(self._values[index : index + 2]) for index in range(0, _MOST, 2)]
            self._span *= 2

    def columns(self) -> dict[str, tuple[float, ...]]:
        """Name -> its values, in order, and `time`, when each was taken; for after the block."""
        rows = self._values + ([_mean(self._samples)] if self._samples else [])
        names = [name for name in rows[0] if all(name in row for row in rows)] if rows else []
        return {name: tuple(round(row[name], 3 if name == "time" else 1) for row in rows) for name in names}


def _mean(samples: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each name that all samples have; the time is that of the last one."""
    names = [name for name in samples[0] if all(name in sample for sample in samples)]
    return {name: fmean(sample[name] for sample in samples) for name in names} | {"time": samples[-1]["time"]}


class _Sampler:
    """The thread of this process that takes samples for its trials; it runs while there are any."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watching: list[SystemMetrics] = []
        self._running = False
        self._latest: tuple[float, tuple[int, ...], Sample] | None = None  # its time on the monotonic clock, its GPUs

    def sample(self, gpus: tuple[int, ...]) -> Sample:
        """A sample, or that of a moment ago if there is one."""
        now, latest = time.monotonic(), self._latest
        if latest is None or latest[1] != gpus or now - latest[0] > _FRESH:
            self._latest = latest = now, gpus, Sample(time.time(), read_counters(), read_levels(gpus))
        return latest[2]

    def add(self, watcher: SystemMetrics) -> None:
        """Take samples for the watcher whenever it is due."""
        with self._changed:
            self._watching.append(watcher)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="hpo-system-metrics", daemon=True).start()
            self._changed.notify()

    def remove(self, watcher: SystemMetrics) -> None:
        """Take no more samples for the watcher."""
        with self._changed:
            self._watching.remove(watcher)

    def _run(self) -> None:
        with self._changed:
            while self._changed.wait_for(lambda: self._watching, _IDLE):
                self._changed.wait(max(0.0, min(watcher.due for watcher in self._watching) - time.monotonic()))
                for watcher in self._watching:
                    if watcher.due <= time.monotonic():
                        watcher.take(self.sample(watcher.gpus))
            self._running = False


_sampler = _Sampler()
