"""Profile a training with torch.profiler: seconds of its epochs by phase, and its slowest operators."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from hpo.records import Epoch, Profile

PHASES = ("batch", "augment", "forward", "backward", "optimizer")
_WARM_UP, _STEPS = 5, 20  # training steps before the recording, and in it
_OPERATORS = 8  # slowest ones that a profile keeps
_NO_LABEL: AbstractContextManager[None] = nullcontext()
_active: TrainingProfiler | None = None  # of this process; profiled trials train one at a time


def phase(name: str) -> AbstractContextManager[None]:
    """Label a part of a training step, one of PHASES; does nothing unless a profiler watches."""
    return _NO_LABEL if _active is None else _active.label(name)


class TrainingProfiler:
    """Records the first training steps of a trial and applies their shares to all its epochs.

    The time of an epoch after its last optimizer step is its evaluation.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._operators: defaultdict[str, float] = defaultdict(float)
        self._recorded: defaultdict[str, float] = defaultdict(float)
        self._recorder: profile | None = None
        self._stepped = 0.0  # when the last step ended

    def watch(self, epochs: Generator[Epoch, None, None]) -> Generator[Epoch, None, None]:
        """Pass on the epochs of one training; record its first steps unless an earlier training was recorded."""
        global _active
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it logs to the terminal otherwise
        if not self._recorded:
            steps = schedule(wait=0, warmup=_WARM_UP, active=_STEPS, repeat=1)
            self._recorder = profile(activities=[ProfilerActivity.CPU], schedule=steps, on_trace_ready=self._read)
        _active = self
        try:
            with self._recorder or nullcontext():
                for epoch in epochs:
                    evaluation = min(time.perf_counter() - self._stepped, epoch.seconds)
                    self._seconds["evaluate"] += evaluation
                    self._seconds["steps"] += epoch.seconds - evaluation
                    yield epoch
        finally:
            _active = self._recorder = None
            epochs.close()

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Record the block as this phase; "batch" begins a step and "optimizer" ends it."""
        if name == "batch" and self._recorder is not None:
            self._recorder.step()
        with record_function(name):
            yield
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.synchronize()  # kernels run later than the calls that start them
        if name == "optimizer":
            self._stepped = time.perf_counter()

    def _read(self, recorder: profile) -> None:
        """Add up the recorded events: labels by phase, and the self time of operators."""
        for event in recorder.key_averages():
            if event.key in PHASES:
                self._recorded[event.key] += event.cpu_time_total
            elif event.key.startswith("aten::"):
                self._operators[event.key] += event.self_cpu_time_total

    def result(self) -> Profile:
        """The profile so far; without recorded steps their time is not divided by phase."""
        seconds = dict(self._seconds)
        if recorded := sum(self._recorded.values()):
            steps = seconds.pop("steps", 0.0)
            seconds = {name: steps * self._recorded[name] / recorded for name in PHASES} | seconds
        total = sum(self._operators.values())
        slowest = sorted(self._operators, key=self._operators.__getitem__, reverse=True)[:_OPERATORS]
        return Profile(seconds, {name: self._operators[name] / total for name in slowest})
