"""What killed processes leave in a study's folder of work in progress, and how it goes."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.records import FINAL, StudyResult, TrialState

if TYPE_CHECKING:
    from hpo.search.study import Study


def wanted(study: StudyResult) -> set[int]:
    """Trials whose folder of work is still needed: those under way, and those that a model is still to be made of."""
    under_way = {t.number for t in study.trials if t.state in (TrialState.WAITING, TrialState.RUNNING)}
    return under_way | {trial.number for trial in [*study.ranked(), *study.ranked(FINAL)]}


def pictures_folder(work: Path, study: Study) -> Path:
    """Where this run draws the study's pictures: another run of the study may be drawing its own."""
    return work / study.lease.stem


def sweep(work: Path, study: Study) -> None:
    """Remove folders of trials that have ended, and of dead runs; what a model is still to be made from stays.

    work is the study's own folder. Trials that a living run answers for are left alone.
    """
    # Listed before the trials are read: a folder is made after its trial is written down.
    found = list(work.iterdir()) if work.is_dir() else []
    needed = wanted(study.result()) | study.attended()
    for path in found:
        dead = path.name.startswith("lease-") and not study.lease.is_held(f"{path.name}.lock")
        if dead or (path.name.isdecimal() and int(path.name) not in needed):
            shutil.rmtree(path, ignore_errors=True)
    for folder in (work / "checkpoints", work):
        with contextlib.suppress(OSError):  # there is something in it, or there is none
            folder.rmdir()
