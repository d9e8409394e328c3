"""Run a study on the jobs of a cluster: begin it, submit its workers, and watch the study until it is done."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpo.cluster.begin import begin_study, shared_home
from hpo.cluster.slurm import Jobs, read_settings, submit, worker_command
from hpo.errors import HpoError, StoreError
from hpo.execute.run_study import interruptible
from hpo.execute.supervisor import Watch
from hpo.home import Home
from hpo.jobs.stop import stop_study
from hpo.records import ModelVersion, Notice, StudyEnded, StudyOpened, StudyResult
from hpo.spec.study import StudySpec
from hpo.storage.reader import list_trials
from hpo.storage.watch import StudyWatcher
from hpo.tracking.registry import versions

_TICK = 1.0  # seconds between looks at the study
_SUM_UP = 300.0  # seconds that the workers of a study that is done have to end


@dataclass(frozen=True)
class Submitted:
    """An array of workers that goes on without us. jobs are the scheduler's names; folder holds their logs."""

    study: str
    jobs: tuple[str, ...]
    folder: Path


def run_array(
    spec: StudySpec,
    *,
    workers: int,
    settings: Sequence[str] = (),
    options: Sequence[str] = (),
    home: str | Path | None = None,
    detach: bool = False,
    cluster: str = "slurm",
    watch: Watch | None = None,
    **begin: Any,
) -> StudyResult | Submitted:
    """Run or continue a study on an array of `workers` jobs, each an `hpo worker`.

    settings are texts for submitit (see read_settings), options those of `hpo worker`; begin are those of begin_study.
    This process only watches: the workers register the best model. Ctrl-C ends the study and the jobs cleanly; killing
    this process ends neither. detach returns once the jobs are submitted. cluster is slurm, or local for processes of
    this machine. Raises HpoError, also where all jobs have ended before the study.
    """
    chosen = read_settings(settings)
    place = shared_home(home)
    if workers < 1:
        raise HpoError(f"--workers {workers}: is no number of jobs.", "Give 1 or more.")
    say: Watch = watch or (lambda _: None)
    if cluster == "slurm" and shutil.which("sbatch") is None:  # before anything is written
        raise HpoError(
            "--engine slurm: there is no sbatch here.", "Submit on a login node, or print the script: --print"
        )
    opened = begin_study(spec, home=home, watch=watch, **begin)
    study = opened.study
    if opened.finished >= opened.budget and spec.final is None:
        say(opened)
        say(StudyEnded(study, "budget", _model(place, study)))
        return study
    follower = StudyWatcher(place, study)
    follower.new_events()  # as it stands before the first job
    folder = place.root / "jobs" / study.title
    command = worker_command(study.exact, options, home=place.root.parent)
    jobs = submit(command, name=study.name, workers=workers, folder=folder, settings=chosen, cluster=cluster)
    say(replace(opened, workers=len(jobs), device=cluster))
    say(Notice(f"submitted {jobs}; logs in {folder}"))
    if detach:
        return Submitted(study.title, jobs.names, folder)
    return _Watching(place, opened, follower, jobs, say).run()


class _Watching:
    def __init__(self, home: Home, opened: StudyOpened, follower: StudyWatcher, jobs: Jobs, say: Watch) -> None:
        self._home, self._opened, self._follower, self._jobs, self._say = home, opened, follower, jobs, say
        self._away = False

    def run(self) -> StudyResult:
        with interruptible() as interrupted:
            reason = self._watch(interrupted)
        study = list_trials(self._home, self._opened.study.exact)
        self._say(StudyEnded(study, reason, _model(self._home, study)))
        return study

    def _watch(self, interrupted: threading.Event) -> str:
        """Until the study or all jobs have ended: the reason of StudyEnded."""
        follower, deadline = self._follower, float("inf")
        while True:
            ended = not self._jobs.left()  # first: what the last job did is then seen below
            self._look()
            if interrupted.is_set():
                self._stop()
                return "interrupted"
            done = follower.over and (follower.renewed or follower.finished >= self._opened.budget)
            if ended:
                if done or follower.stopped:
                    return "stopped" if not done else self._reason()
                raise self._unfinished()
            if done and follower.renewed and deadline == float("inf"):
                deadline = time.monotonic() + _SUM_UP
                self._jobs.cancel(waiting=True)  # they would find nothing to do
            if time.monotonic() > deadline:
                return self._reason()
            interrupted.wait(_TICK)

    def _reason(self) -> str:
        return "budget" if self._follower.finished >= self._opened.budget else "exhausted"

    def _look(self) -> None:
        try:
            events = self._follower.new_events()
        except StoreError as error:  # the jobs wait for it too
            if not self._away:
                self._say(Notice(f"the study cannot be seen: {error} The jobs go on."))
            self._away = True
            return
        if self._away:
            self._say(Notice("the study can be seen again."))
        self._away = False
        for event in events:
            self._say(event)

    def _stop(self) -> None:
        self._say(Notice("stopping the study and its jobs ..."))
        self._jobs.cancel(waiting=True)
        try:
            stop_study(self._opened.study.exact, home=self._home.root.parent)
        except StoreError as error:
            self._say(Notice(str(error)))
        self._jobs.cancel()
        self._look()

    def _unfinished(self) -> HpoError:
        study, done = self._opened.study, f"{self._follower.finished} of {self._opened.budget} trials done"
        message = f"{study.title}: all jobs have ended, with {done}."
        words = self._jobs.last_words()
        if not words:
            return HpoError(message, f"They left no log in {self._jobs.folder}: see what SLURM says of {self._jobs}.")
        return HpoError(
            f"{message} The last words of {words}",
            f"Mend what it says, or give the jobs more time, and run this again: it goes on. Logs: {self._jobs.folder}",
        )


def _model(home: Home, study: StudyResult) -> ModelVersion | None:
    """The newest version that the study has registered; None also where the registry cannot be read now."""
    try:
        known = versions(home, study.name)
    except StoreError:
        return None
    return next((version for version in known if version.study == study.title), None)
