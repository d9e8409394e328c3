"""Add up where the time of a profiled run went."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from hpo.events import RunEvent, SearchEnded, StudyOpened, StudyProfiled, TrialEnded, WinnerChosen
from hpo.execute.process import RunEnd
from hpo.execute.subscribers import Emit, Subscriber
from hpo.execute.workers.job_process import JobProcess


class StudyProfiler:
    """Sums the profiles of trials that end between its creation and stop; those without a profile are left out."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._seconds = self._trial_seconds = 0.0
        self._trials = 0
        self._phases: Counter[str] = Counter()
        self._operators: Counter[str] = Counter()

    def hear(self, event: RunEvent) -> None:
        """Add a trial's profile; a result copied from an earlier trial took no time and does not count."""
        if isinstance(event, TrialEnded) and event.result.profile and event.result.seconds:
            self._trials += 1
            self._trial_seconds += event.result.seconds
            self._phases.update(event.result.profile.seconds)
            self._operators.update(event.result.profile.operators)

    def stop(self) -> None:
        """Note when the last trial is over."""
        self._seconds = time.monotonic() - self._began

    def profile(self, *, workers: int, outside: Mapping[str, float]) -> StudyProfiled:
        """The sum; outside holds CPU seconds of the other processes of the run."""
        between = max(0.0, self._trial_seconds - self._phases.total()) if self._trials else 0.0
        idle = max(0.0, workers * self._seconds - self._trial_seconds)
        return StudyProfiled(
            trials=self._trials,
            workers=workers,
            seconds=self._seconds,
            phases={**self._phases, **({"between epochs": between} if self._trials else {}), "idle": idle},
            outside=dict(outside),
            operators={name: share / self._trials for name, share in self._operators.most_common(8)},
        )


class Profiling(Subscriber):
    """Emits a StudyProfiled once the winner is chosen. in_process: this process trains; its CPU time is left out."""

    def __init__(self, jobs: JobProcess, end: RunEnd, *, emit: Emit, in_process: bool) -> None:
        self._end = end
        self._jobs, self._emit, self._in_process = jobs, emit, in_process
        self._profiler, self._workers = StudyProfiler(), 1

    def __call__(self, event: RunEvent) -> None:
        """Add up the trials between the opening of the study and the end of the search."""
        if isinstance(event, StudyOpened):
            self._profiler, self._workers = StudyProfiler(), event.workers
        self._profiler.hear(event)
        if isinstance(event, SearchEnded):
            self._profiler.stop()
        elif isinstance(event, WinnerChosen):
            job, outside = self._jobs.submit(time.process_time), {}
            if self._end.await_done(job):
                outside["export and figures"] = job.result()
            if not self._in_process:
                outside["search and tracking"] = time.process_time()
            self._emit(self._profiler.profile(workers=self._workers, outside=outside))
