"""Where the checkpoints of a study's trainings lie, and which of them nobody needs any more."""

from __future__ import annotations

from pathlib import Path

from hpo.records import Candidate, StudyResult


def checkpoint_file(work: Path, candidate: Candidate) -> Path:
    """The file of a candidate, the same for all its tries; work is the study's folder of work in progress."""
    return work / "checkpoints" / f"{candidate.stage or 'search'}-{candidate.ordinal}-{candidate.seed}.pt"


def drop_finished(work: Path, study: StudyResult) -> None:
    """Delete the checkpoints of candidates that are done, and what a killed process was writing.

    That is what is left where a process was killed between a trial's end and its checkpoint's.
    """
    if not (work / "checkpoints").is_dir():
        return
    last = {checkpoint_file(work, trial.candidate): trial for trial in study.trials}
    for file, trial in last.items():
        if trial.state.finished:
            for left in (file, *file.parent.glob(f"{file.name}.*.part")):
                left.unlink(missing_ok=True)
