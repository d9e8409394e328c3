"""A study's folder of work in progress: checkpoints, files of trials, and their removal once nothing needs them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.events import RunEvent, StudyEnded, StudyOpened, TrialEnded, TrialStarted
from hpo.execute.subscribers import Subscriber
from hpo.home import remove
from hpo.records import Candidate, StudyResult, TrialState

if TYPE_CHECKING:
    from hpo.search.study import Study


def checkpoint_file(work: Path, candidate: Candidate) -> Path:
    """The file of a candidate's checkpoint, the same for all its attempts; work is the study's folder."""
    return work / "checkpoints" / f"{candidate.stage or 'search'}-{candidate.ordinal}-{candidate.seed}.pt"


def drop_finished(work: Path, study: StudyResult) -> None:
    """Delete the checkpoints of finished candidates, and the parts that a killed process was writing.

    They remain where a process was killed between the end of a trial and the removal of its checkpoint. A candidate
    whose newest attempt was stopped is not tried again, as a final training with settings of before: a retry would have
    been enqueued first.
    """
    if not (work / "checkpoints").is_dir():
        return
    last = {checkpoint_file(work, trial.candidate): trial for trial in study.trials}
    for file, trial in last.items():
        if trial.state.finished or trial.state is TrialState.STOPPED:
            _drop(work, file)


def _drop(work: Path, checkpoint: Path) -> None:
    """Delete a checkpoint, and the parts of it that killed processes were writing, of this attempt or earlier ones."""
    for path in (checkpoint, *checkpoint.parent.glob(f"{checkpoint.name}.*.part")):
        remove(work, path)


def wanted(study: StudyResult) -> set[int]:
    """The trials whose folder is still needed: those in progress, and those whose model is still to be made."""
    open_states = (TrialState.WAITING, TrialState.RUNNING, TrialState.PAUSED)
    in_progress = {trial.number for trial in study.trials if trial.state in open_states}
    done = [*study.ranked(), *study.after_search()]
    return in_progress | {trial.number for trial in done if trial.result is not None and trial.result.folder}


def pictures_folder(work: Path, study: Study) -> Path:
    """The folder for this run's figures of the study; each run of a study has its own."""
    return work / study.lease.stem


def sweep(work: Path, study: Study) -> None:
    """Remove the folders of ended trials and of dead runs, but keep the files of models that are still to be made.

    work is the study's folder. Trials that another living run answers for are left alone.
    """
    # Listed before the trials are read: a trial's folder is made after the trial is recorded.
    paths = list(work.iterdir()) if work.is_dir() else []
    needed = wanted(study.result()) | study.trials_of_others()
    for path in paths:
        dead = path.name.startswith("lease-") and not study.lease.is_held(f"{path.name}.lock")
        if dead or (path.name.isdecimal() and int(path.name) not in needed):
            remove(work, path, ignore_errors=True)
    for folder in (work / "checkpoints", work):
        with contextlib.suppress(OSError):  # it is not empty, or does not exist
            folder.rmdir()


class WorkdirCleanup(Subscriber):
    """Removes checkpoints as trials finish, not as they are paused; at the end of the run, whatever is not needed."""

    def __init__(self, work: Path, study: Study) -> None:
        self._work = work
        self._study = study
        self._running: dict[int, Candidate] = {}

    def __call__(self, event: RunEvent) -> None:
        """Remove the files that the event makes superfluous."""
        match event:
            case StudyOpened(study):
                drop_finished(self._work, study)
                paused = [trial for trial in study.trials if trial.state is TrialState.PAUSED]
                self._running |= {trial.number: trial.candidate for trial in paused}
            case TrialStarted(candidate):
                self._running[candidate.number] = candidate
            case TrialEnded(result):
                ended = self._running.pop(result.number, None)
                if result.state.finished and ended is not None:  # else another run has paused it
                    _drop(self._work, checkpoint_file(self._work, ended))
            case StudyEnded(study):
                drop_finished(self._work, study)
                remove(self._work, pictures_folder(self._work, self._study), ignore_errors=True)
                sweep(self._work, self._study)
            case _:
                pass
