"""Add up where a profiled run's time went: in its workers, and beside them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from hpo.execute.events import Emit, Subscriber
from hpo.execute.workers.job_process import JobProcess, spent
from hpo.profile import Clock, Limit, Profile, StudyProfiled
from hpo.records import RunEvent, SearchEnded, StudyOpened, TrialEnded, TrialResult, WinnerChosen

# Methods of Study that a worker's next candidate waits for, and of Tracker, by the name of their phase.
STUDY = {"ask": "ask", "ask_final": "ask", "report": "report", "tell": "tell"}
TRACKER = dict.fromkeys(
    ("open_study", "reconcile", "start_trial", "log_epochs", "end_trial", "keep_model", "drop_model", "drop_figures"),
    "track",
)
Times = Mapping[str, float]


class Profiler:
    """Hears the events of a run while the workers stand ready: from its making until stop."""

    def __init__(self) -> None:
        self._results: list[TrialResult] = []
        self._began = time.monotonic()
        self._seconds = 0.0

    def hear(self, event: RunEvent) -> None:
        """Keep the trials that were profiled; an answer taken from an earlier trial took no time."""
        if isinstance(event, TrialEnded) and event.result.profile and event.result.seconds:
            self._results.append(event.result)

    def stop(self) -> None:
        """The last trial is over."""
        self._seconds = time.monotonic() - self._began

    def sum_up(self, *, workers: int, beside: Iterable[tuple[Times, Times]]) -> StudyProfiled:
        """What it all comes to; beside holds seconds and CPU seconds by phase of other processes and threads.

        What the profile itself took, which no other run pays, is told beside them.
        """
        phases = _sum((one.seconds, one.cpu_seconds) for _, one in self._profiles())
        itself = {"profile": phases.pop("profile")} if "profile" in phases else {}
        idle = workers * self._seconds - sum(result.seconds for result in self._results)
        return StudyProfiled(
            trials=len(self._results),
            workers=workers,
            seconds=self._seconds,
            phases={**phases, "idle": (max(0.0, idle), 0.0)},
            beside={**_sum(beside), **itself},
            limits=tuple(self._limits()),
        )

    def _profiles(self) -> Iterator[tuple[TrialResult, Profile]]:
        return ((result, result.profile) for result in self._results if result.profile)

    def _limits(self) -> Iterator[Limit]:
        alike: dict[tuple[str, str, str], list[Profile]] = defaultdict(list)
        for result, profile in self._profiles():
            if profile.flops:
                device, precision, threads = (result.settings[name] for name in ("device", "precision", "threads"))
                alike[device, precision, threads].append(profile)
        for (device, precision, threads), profiles in alike.items():
            # What else ran on a shared processor is not the network's fault; a GPU's work takes no CPU time.
            times = [one.cpu_seconds if device == "cpu" else one.seconds for one in profiles]
            seconds = sum(time["forward"] + time["backward"] for time in times)
            yield Limit(
                device=device,
                precision=precision,
                threads=threads,
                flops=sum(one.flops for one in profiles) / seconds,
                peak_flops=max(one.peak_flops for one in profiles),
                traffic=sum(one.traffic for one in profiles) / seconds,
                peak_traffic=max(one.peak_traffic for one in profiles),
            )


class Profiling(Subscriber):
    """Emits a StudyProfiled once the winner is chosen. clock has timed this process; jobs has a clock of its own."""

    def __init__(self, clock: Clock, jobs: JobProcess, *, emit: Emit) -> None:
        self._clock, self._jobs, self._emit = clock, jobs, emit
        self._profiler = Profiler()
        self._workers = 1

    def __call__(self, event: RunEvent) -> None:
        """Add up the trials between the opening of the study and the end of the search."""
        if isinstance(event, StudyOpened):
            self._profiler, self._workers = Profiler(), event.workers
        self._profiler.hear(event)
        if isinstance(event, SearchEnded):
            self._profiler.stop()
        elif isinstance(event, WinnerChosen):
            other = [(self._clock.seconds, self._clock.cpu_seconds), self._jobs.submit(spent).result()]
            self._emit(self._profiler.sum_up(workers=self._workers, beside=other))


def _sum(times: Iterable[tuple[Times, Times]]) -> dict[str, tuple[float, float]]:
    """Phase -> (seconds, CPU seconds), in the order of their first appearance."""
    total: dict[str, tuple[float, float]] = {}
    for seconds, cpu_seconds in times:
        for name, value in seconds.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = before[0] + value, before[1] + cpu_seconds[name]
    return total
