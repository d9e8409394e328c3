"""Keep models and pictures of the best trials: export and draw beside the training, log, delete what falls out."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path

from hpo.errors import NO_SPACE, StoreError, disk_full
from hpo.execute.tracking_queue import Background
from hpo.execute.workers.job_process import Helper, Job, finish_trial
from hpo.records import FINAL, DataCard, Event, Notice, StudyResult, Trial, TrialResult, TrialState
from hpo.spec.study import StudySpec
from hpo.tracking.tracker import Tracker

_EXPORT_SHARE = 0.1


class Keeper:
    """The best trials, as many as spec.keep says, keep their model; the best of those, too, their pictures."""

    def __init__(
        self,
        tracker: Tracker,
        background: Background,
        helper: Helper,
        spec: StudySpec,
        *,
        data: DataCard,
        watch: Callable[[Event], None],
    ) -> None:
        self._tracker = tracker
        self._background = background
        self._helper = helper
        self._spec = spec
        self._data = data
        self._watch = watch
        self._values: dict[int, float] = {}
        self._finals: set[int] = set()
        self._kept: set[int] = set()
        self._drawn: set[int] = set()  # with pictures, as far as is known
        self._earlier: Future[dict[int, str]] | None = None
        self._waiting: dict[int, TrialResult] = {}
        self._pending: dict[int, Job] = {}
        self._began = self._exporting = time.monotonic()
        self._spent = 0.0  # seconds of exports that are over

    def resume(self, study: StudyResult, kept: Future[dict[int, str]], *, leave: Collection[int] = ()) -> None:
        """Take up where other runs ended: the models that they kept, and files that still wait to be logged.

        leave holds the trials whose own run lives and will see to their files.
        """
        self._earlier = kept
        self._values |= {trial.number: trial.value or 0.0 for trial in study.ranked()}
        self._finals |= {trial.number for trial in study.ranked(FINAL)}
        for trial in [*study.ranked(), *study.ranked(FINAL)]:
            if trial.result is None or trial.number in leave or trial.number in self._kept | self._pending.keys():
                continue
            if trial.result.folder and Path(trial.result.folder).is_dir():
                self.add(trial.result, final=trial.candidate.stage == FINAL)

    def add(self, result: TrialResult, *, final: bool = False) -> None:
        """A trial has ended: export its model if it is a final one or among the best, or remove its files."""
        if result.state is TrialState.COMPLETE and result.value is not None and result.folder and result.feasible:
            if final:
                self._finals.add(result.number)
            else:
                self._values[result.number] = result.value
            if result.number in self._best():
                self._waiting[result.number] = result
                return
        _remove(result.folder)

    def collect(self, *, wait: bool = False) -> None:
        """Have the tracker log what is exported, and drop what is no longer among the best.

        Raises StoreError where the disk is full; the trials' files stay for the next run.
        """
        if self._earlier is not None and self._earlier.done():
            if self._earlier.exception() is None:
                self._kept |= set(self._earlier.result())
                self._drawn |= set(self._earlier.result())
            self._earlier = None
        best = self._best()
        for number in self._waiting.keys() - best:
            _remove(self._waiting.pop(number).folder)
        self._export(wait=wait)
        for number in [number for number, job in self._pending.items() if wait or job.done()]:
            job = self._pending.pop(number)
            self._spent += time.monotonic() - self._exporting
            if (error := job.exception()) is not None:
                if disk_full(error):
                    raise StoreError(f"trial {number}: no space left on the disk for its model.", NO_SPACE)
                self._watch(Notice(f"trial {number}: its model could not be exported: {error}"))
            elif number in best:
                self._kept.add(number)
                self._background.submit(self._log, number, job.result())
            else:
                _remove(str(job.result()))
        for number in self._kept - best:
            self._kept.discard(number)
            self._drawn.discard(number)
            self._background.submit(self._tracker.drop_model, number)
        for number in (self._drawn & self._kept) - self._best(self._spec.keep.figure_count):
            self._drawn.discard(number)
            self._background.submit(self._tracker.drop_figures, number)

    def _export(self, *, wait: bool) -> None:
        """Begin what may begin: training comes first, so exports take a tenth of the time until it is over."""
        share = self._spent / max(time.monotonic() - self._began, 1e-9)
        if self._waiting and (wait or (not self._pending and share < _EXPORT_SHARE)):
            self._exporting = time.monotonic()
            pictured = self._best(self._spec.keep.figure_count)
            for number in sorted(self._waiting) if wait else [min(self._waiting)]:
                result, figures = self._waiting.pop(number), number in pictured
                self._drawn |= {number} if figures else set()
                self._pending[number] = self._helper.submit(finish_trial, result, self._data, figures=figures)

    def _log(self, number: int, folder: Path) -> None:
        self._tracker.keep_model(number, folder)
        _remove(str(folder))

    def _best(self, count: float | None = None) -> set[int]:
        """The final trials and this many of the search's; None: as many as keep their model."""
        count = self._spec.keep.count if count is None else count
        sign = -1.0 if self._spec.search.better == "maximize" else 1.0
        ranked = sorted(self._values, key=lambda number: (sign * self._values[number], number))
        if not count:
            return set()
        return self._finals | set(ranked if math.isinf(count) else ranked[: int(count)])

    def keeps(self, trial: Trial) -> bool:
        """Whether the trial's model is logged, or about to be."""
        return trial.number in self._kept


def _remove(folder: str) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
