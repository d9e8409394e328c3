"""Compare the study storage, MLflow and the disk; say what is wrong, and repair it without losing a result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hpo.errors import HpoError
from hpo.home import Home
from hpo.jobs.shared.doctor_disk import disk_cases
from hpo.jobs.shared.doctor_runs import run_cases
from hpo.jobs.shared.home_snapshot import Case, Finding, Scene, see
from hpo.storage.reader import StudySnapshot

_ROUNDS = 4  # a repair brings to light what it hid: a trial settled leaves a run to end


@dataclass(frozen=True)
class Checkup:
    """What the doctor found: what is wrong still, what was repaired, and what was not looked at or not repaired."""

    wrong: tuple[Finding, ...] = ()
    fixed: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def well(self) -> bool:
        """Whether nothing is left to repair."""
        return not self.wrong


@dataclass
class _Repairs:
    """What has been repaired so far, and what would not be."""

    done: list[Finding] = field(default_factory=list)
    refused: dict[Finding, str] = field(default_factory=dict)


def doctor(*, home: str | Path | None = None, fix: bool = False) -> Checkup:
    """Examine the stores of a home; with fix, repair what can be.

    Looking makes and locks nothing and may go on beside a running study. A repair never deletes trials, metrics,
    artifacts or models; what belongs to a study that a living supervisor holds is left alone, and so is what belongs to
    all studies while any is held.
    """
    place = Home.find(home)
    repairs = _Repairs()
    scene = see(place)
    cases = list(_cases(scene))
    for _ in range(_ROUNDS if fix else 0):
        if not _repair(scene, cases, repairs):
            break
        scene = see(place)
        cases = list(_cases(scene))
    left = [case.finding for case in cases]
    notes = [f"{title} is running: its runs and files were not compared." for title in sorted(scene.live)]
    notes += [f"not repaired: {finding.what}: {reason}" for finding, reason in repairs.refused.items()]
    return Checkup(
        wrong=tuple(left),
        fixed=tuple(finding for finding in dict.fromkeys(repairs.done) if finding not in left),
        notes=tuple(notes),
    )


def _cases(scene: Scene) -> Iterator[Case]:
    """Everything that is wrong, what others depend on first."""
    yield from disk_cases(scene)
    for one in scene.studies.values():
        yield from _abandoned(scene, one)
    yield from _locks(scene)
    yield from run_cases(scene)


def _repair(scene: Scene, cases: list[Case], repairs: _Repairs) -> bool:
    """Repair what may be; whether anything was."""
    before = len(repairs.done)
    for case in cases:
        finding = case.finding
        if case.mend is None or finding in repairs.done or finding in repairs.refused:
            continue
        if held := scene.live & {finding.study} if finding.study else scene.live:
            repairs.refused[finding] = f"{', '.join(sorted(held))} is running; stop it first: hpo stop STUDY"
            continue
        try:
            case.mend()
        except (HpoError, OSError) as error:
            repairs.refused[finding] = str(error)
        else:
            repairs.done.append(finding)
    return len(repairs.done) > before


def _abandoned(scene: Scene, one: StudySnapshot) -> Iterator[Case]:
    if one.abandoned:
        title = one.study.title
        yield Case(
            Finding(
                what=f"{_count(len(one.abandoned), 'trial')} running, but nobody runs it: its supervisor is dead",
                where=f"{title}: trial {_numbers(one.abandoned)}",
                why="They count against the budget, and other supervisors may wait for them.",
                repair="records them as stopped and enqueues them again, as the next hpo run does",
                study=title,
            ),
            partial(_reap, scene.home, title),
        )


def _locks(scene: Scene) -> Iterator[Case]:
    gone = {path.name.removesuffix(".ask.lock") for path in scene.home.locks.glob("*.ask.lock")} - set(scene.studies)
    stale = len(scene.stale_leases) + (len(gone) if scene.storage_read else 0)
    if stale:
        yield Case(
            Finding(
                what=f"{_count(stale, 'lock file')} of dead supervisors or of studies that are no more",
                where=str(scene.home.locks),
                why="They hold nothing up, but they hide which supervisors live.",
                repair="removes them",
            ),
            partial(_drop_locks, scene.home, gone if scene.storage_read else set()),
        )


def _reap(home: Home, title: str) -> None:
    from hpo.search.repair import reap  # and with it Optuna, which looking does not need

    reap(home, title)


def _drop_locks(home: Home, titles: set[str]) -> None:
    from hpo.search.repair import drop_locks

    drop_locks(home, titles)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def _numbers(numbers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown}, ... ({len(numbers)} in all)" if len(numbers) > 8 else shown
