"""Keep the models and figures of the best trials: export them while others train, log them, delete the others."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

from hpo.errors import NO_SPACE, StoreError, disk_full
from hpo.events import EpochEnded, Notice, RunEvent, SearchEnded, StudyOpened, TrialEnded, TrialStarted, WinnerChosen
from hpo.execute.process import SLOW, RunEnd
from hpo.execute.subscribers import Emit, Subscriber
from hpo.execute.subscribers.tracking import store_timeout
from hpo.execute.tracking_queue import TrackingQueue
from hpo.execute.workers.job_process import Job, JobProcess, draw_trial, finish_trial, warm_up
from hpo.home import remove
from hpo.records import AFTER_SEARCH, FINAL, DataCard, EndReason, StudyResult, Trial, TrialResult, TrialState
from hpo.report.text import counted
from hpo.spec.study import StudySpec
from hpo.tracking.runs import FIGURES
from hpo.tracking.tracker import Tracker

_EXPORT_SHARE = 0.1  # of the time, while trials train,
_EXPORTS_FREE = 1.0  # beyond these seconds
_TICK = 0.1  # seconds


class ModelRetention(Subscriber):
    """Keeps the models of the best trials, as many as spec.keep says, and the figures of the best of those.

    work is the study's folder of work in progress; the files of a trial are in the folder of its number there.
    """

    def __init__(
        self,
        tracker: Tracker,
        queue: TrackingQueue,
        jobs: JobProcess | None,
        spec: StudySpec,
        *,
        work: Path,
        data: DataCard,
        emit: Emit,
        end: RunEnd | None = None,
    ) -> None:
        self._tracker = tracker
        self._queue = queue
        self._jobs = jobs
        self._spec = spec
        self._work = work
        self._hurry = work / f".hurry-{os.getpid()}"  # there: exports leave out what takes long
        self._data = data
        self._emit = emit
        self._end = end or RunEnd()
        self._values: dict[int, float] = {}
        self._finals: set[int] = set()  # complete final trainings
        self._running_finals: set[int] = set()
        self._kept: set[int] = set()  # with a model
        self._drawn: set[int] = set()  # with figures, as far as is known
        self._kept_before: Future[dict[int, str]] | None = None
        self._waiting: dict[int, TrialResult] = {}
        self._undrawn: dict[int, TrialResult] = {}  # exported in this run
        self._logging: dict[int, Future[str]] = {}
        self._pending: dict[int, Job] = {}
        self._started = self._export_started = time.monotonic()
        self._export_seconds = 0.0
        self._told_of_end = self._told_of_saving = False
        self._imports: Job | None = None  # of what exports need
        self._drawing: dict[int, Job] = {}

    def __call__(self, event: RunEvent) -> None:
        """Follow the trials; at the end of the search, export every model that is to be kept, and draw the best."""
        match event:
            case StudyOpened(study):
                self._hurry.unlink(missing_ok=True)  # of a killed run that had this number
                self.resume(study, self._queue.submit(self._tracker.kept_models, study), leave=event.trials_of_others)
            case TrialStarted(candidate) if candidate.stage == FINAL:
                self._running_finals.add(candidate.number)
            case EpochEnded() if not self._imports and self._jobs and self._spec.keep.count:
                self._imports = self._jobs.submit(warm_up)
            case TrialEnded(result):
                self.add(result, final=result.number in self._running_finals)
            case SearchEnded(study, reason, trials_of_others):
                self.resume(study, self._queue.submit(self._tracker.kept_models, study), leave=trials_of_others)
                self._export(wait=True)
                self._queue.wait(timeout=store_timeout(reason), notify=lambda text: self._emit(Notice(text)))
                self.collect(wait=True)
                self._hurry.unlink(missing_ok=True)
                self._begin_drawing()
            case WinnerChosen():
                self.draw()
            case _:
                pass

    def resume(self, study: StudyResult, kept: Future[dict[int, str]], *, leave: Collection[int] = ()) -> None:
        """Take over from other runs: the models that they kept, and files that still wait to be logged.

        leave holds the trials whose own run is alive and takes care of their files.
        """
        self._kept_before = kept
        self._values |= {trial.number: trial.value or 0.0 for trial in study.ranked()}
        self._finals |= {trial.number for trial in study.after_search()}
        for trial in [*study.ranked(), *study.after_search()]:
            if trial.result is None or trial.number in leave or trial.number in self._kept | self._pending.keys():
                continue
            if trial.result.folder and self._folder(trial.number).is_dir():
                self.add(trial.result, final=trial.candidate.stage in AFTER_SEARCH)

    def add(self, result: TrialResult, *, final: bool = False) -> None:
        """Queue the export of an ended trial's model if it is a final one or among the best; else remove its files."""
        result = replace(result, folder=str(self._folder(result.number)) if result.folder else "")
        if result.state is TrialState.COMPLETE and result.value is not None and result.folder and result.feasible:
            if final:
                self._finals.add(result.number)
            else:
                self._values[result.number] = result.value
            if result.number in self._best():
                self._waiting[result.number] = result
                return
        if result.folder:
            self._remove(result.number)

    def poll(self) -> None:
        """Export, log and drop what has become due."""
        self.collect()

    def collect(self, *, wait: bool = False) -> None:
        """Log the models that are exported, and drop those no longer among the best; wait: export all that remain.

        Where the run has to end before that, the next one does it. Raises StoreError where the disk is full; the
        trials' files stay for the next run then.
        """
        if self._kept_before is not None and self._kept_before.done():
            if self._kept_before.exception() is None:
                self._kept |= set(self._kept_before.result())
                self._drawn |= set(self._kept_before.result())
            self._kept_before = None
        best = self._best()
        for number in self._waiting.keys() - best:
            del self._waiting[number]
            self._remove(number)
        self._export(wait=wait)
        for number, job in list(self._pending.items()):
            if not (self._await(job) if wait else job.done()):
                continue
            del self._pending[number]
            self._end.note_progress()
            self._export_seconds += time.monotonic() - self._export_started
            if (error := job.exception()) is not None:
                if disk_full(error):
                    raise StoreError(f"trial {number}: no space left on the disk for its model.", NO_SPACE)
                self._emit(Notice(f"trial {number}: its model could not be exported: {error}"))
            elif number in best:
                self._kept.add(number)
                self._logging[number] = self._queue.submit(self._tracker.keep_model, number, job.result())
            else:
                self._remove(number)
        if wait and (count := len(self._pending)):
            self._emit(Notice(f"{_models(count)} not saved yet: the next hpo run of this study does it"))
        for number in self._kept - best:
            self._kept.discard(number)
            self._drawn.discard(number)
            self._queue.submit(self._tracker.drop_model, number)
            if self._undrawn.pop(number, None):
                self._queue.submit(self._let_go, number)
        for number in (self._drawn & self._kept) - self._best(self._spec.keep.figure_count):
            self._drawn.discard(number)
            self._queue.submit(self._tracker.drop_figures, number)

    def _await(self, job: Job) -> bool:
        """Wait for an export; False where the run has to end before."""
        told_after = time.monotonic() + SLOW
        while not self._end.reason():
            with contextlib.suppress(TimeoutError):
                job.exception(timeout=_TICK)
                return True
            if not self._told_of_saving and self._pending and time.monotonic() > told_after:
                self._told_of_saving = True
                self._emit(Notice(f"saving {_models(len(self._pending))}"))
        if not self._told_of_end and not job.done():
            self._told_of_end = True
            self._emit(Notice(f"stopping: saving {_models(len(self._pending))}; Ctrl-C again ends now"))
            if self._end.reason() is EndReason.TIMEOUT:
                self._hurry.touch()
        return self._end.await_done(job)

    def _export(self, *, wait: bool) -> None:
        """Start the exports that are due, the best first. While trials train, they take a tenth of the time at most."""
        ready = not self._pending and (self._imports is None or self._imports.done())
        most = _EXPORTS_FREE + _EXPORT_SHARE * (time.monotonic() - self._started)
        if self._jobs and self._waiting and (wait or (ready and self._export_seconds < most)):
            self._export_started = time.monotonic()
            best_first = [number for number in self._ranked() if number in self._waiting]
            for number in best_first if wait else [min(self._waiting)]:
                self._undrawn[number] = self._waiting.pop(number)
                self._pending[number] = self._jobs.submit(
                    finish_trial, self._undrawn[number], self._data, self._spec.predict, self._hurry
                )

    def _begin_drawing(self) -> None:
        """Start to draw the figures of the best trials of this run."""
        if self._jobs is None:
            return
        chosen = self._best(self._spec.keep.figure_count) & self._kept & self._undrawn.keys()
        for number in sorted(chosen - self._drawing.keys()):
            folder = self._folder(number) / FIGURES
            self._drawing[number] = self._jobs.submit(draw_trial, self._undrawn[number], self._data, folder)

    def draw(self) -> None:
        """Log the figures of the best trials once they are drawn; the files of the others are not needed any more."""
        self._begin_drawing()
        for number in self._undrawn:
            if (job := self._drawing.get(number)) is not None:
                waits = partial(self._emit, Notice(f"drawing the figures of trial {number}"))
                if not self._end.await_done(job, slow=waits):
                    return
                if job.exception() is None:
                    self._queue.submit(self._tracker.log_figures, number, self._folder(number) / FIGURES)
            self._queue.submit(self._let_go, number)
        self._undrawn.clear()

    def _let_go(self, number: int) -> None:
        """Remove the files of a trial whose model is logged; of any other the next run needs them."""
        if number in self._logging and self._logging[number].exception() is None:
            self._remove(number)

    def _folder(self, number: int) -> Path:
        # Never the path that a result names: since it was stored, the project may have been moved or copied.
        return self._work / str(number)

    def _remove(self, number: int) -> None:
        remove(self._work, self._folder(number), ignore_errors=True)

    def _best(self, count: float | None = None) -> set[int]:
        """The final trials, and the best `count` of the search; None: as many as keep their model."""
        count = self._spec.keep.count if count is None else count
        ranked = [number for number in self._ranked() if number not in self._finals]
        if not count:
            return set()
        return self._finals | set(ranked if math.isinf(count) else ranked[: int(count)])

    def _ranked(self) -> list[int]:
        """The final trials, then those of the search, the best first."""
        sign = -1.0 if self._spec.search.better == "maximize" else 1.0
        search = sorted(self._values, key=lambda number: (sign * self._values[number], number))
        return sorted(self._finals) + [number for number in search if number not in self._finals]

    def keeps(self, trial: Trial) -> bool:
        """True if the trial's model is logged, or queued to be."""
        return trial.number in self._kept


def _models(count: int) -> str:
    return f"the model{'s' * (count != 1)} of {counted(count, 'trial')}"
