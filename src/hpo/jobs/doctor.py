"""Compare the study storage, MLflow and the disk, report what is wrong, and repair it without losing a result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hpo.database import reading, sqlite_file
from hpo.errors import HpoError, StoreError, shown_address
from hpo.home import Home, remove
from hpo.jobs.shared.doctor_runs import numbers, run_cases
from hpo.jobs.shared.home_snapshot import Case, Finding, HomeSnapshot, leftover_work, size_of, take_snapshot
from hpo.jobs.stores import read_schema
from hpo.locks import seen_held
from hpo.relocation import earlier_roots, relocate
from hpo.report.text import counted
from hpo.tracking.ledger import (
    LEDGER,
    damaged_lines,
    damaged_tags,
    mend_tags,
    openings_of_lost,
    set_damaged_aside,
)
from hpo.tracking.store import is_server

_ROUNDS = 4  # a repair can reveal another problem: a trial that is recorded as stopped leaves a run to end
_LEAST_FREE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Checkup:
    """What is still wrong, what was repaired, and notes on what was not examined or not repaired."""

    wrong: tuple[Finding, ...] = ()
    fixed: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def well(self) -> bool:
        """True where nothing is wrong any more."""
        return not self.wrong


def doctor(*, home: str | Path | None = None, fix: bool = False) -> Checkup:
    """Examine the stores of a home; with fix, repair what can be repaired.

    Examining is read-only and safe while a study runs. A repair never deletes trials, metrics, artifacts or models. It
    leaves alone what belongs to a study that a living supervisor holds, and what belongs to all studies while any is
    held.
    """
    place = Home.find(home)
    fixed: list[Finding] = []
    refused: dict[Finding, str] = {}
    snapshot = take_snapshot(place)
    cases = list(_cases(snapshot))
    for _ in range(_ROUNDS if fix else 0):
        repaired = _repair(snapshot, [case for case in cases if case.finding not in {*fixed, *refused}], refused)
        if not repaired:
            break
        fixed += repaired
        snapshot = take_snapshot(place)
        cases = list(_cases(snapshot))
    wrong = [case.finding for case in cases]
    notes = [f"{title} is running: its runs and files were not compared." for title in sorted(snapshot.live)]
    notes += [f"not repaired: {finding.what}: {reason}" for finding, reason in refused.items()]
    return Checkup(tuple(wrong), tuple(one for one in dict.fromkeys(fixed) if one not in wrong), tuple(notes))


def _repair(snapshot: HomeSnapshot, cases: list[Case], refused: dict[Finding, str]) -> list[Finding]:
    """The findings that were repaired; refused gets those that were not, with the reason."""
    done = []
    for case in cases:
        finding = case.finding
        if case.mend is None:
            continue
        if held := snapshot.live & {finding.study} if finding.study else snapshot.live:
            refused[finding] = f"{', '.join(sorted(held))} is running; stop it first: hpo stop STUDY"
            continue
        try:
            case.mend()
        except (HpoError, OSError) as error:
            refused[finding] = str(error)
        else:
            done.append(finding)
    return done


def _cases(snapshot: HomeSnapshot) -> Iterator[Case]:
    """All problems; those that others depend on come first."""
    home = snapshot.home
    for url, error in snapshot.faults.items():
        yield Case.of(
            what=error.message.rstrip("."),
            where=_address(url),
            why="Its content cannot be examined.",
            hint=error.hint,
        )
    for package, url in (("optuna", home.storage_url), ("mlflow", home.tracking_uri)):
        if url not in snapshot.faults and not is_server(url):
            yield from _integrity(url)
            yield from _schema(home, package, url)
    yield from _moved(snapshot)
    yield from _unowned(snapshot)
    yield from _leftovers(snapshot)
    yield from _space(home)
    yield from _abandoned(snapshot)
    yield from _locks(snapshot)
    yield from _ledgers(home)
    yield from _lost(snapshot)
    yield from _ledger_tags(snapshot)
    yield from run_cases(snapshot)


def _address(url: str) -> str:
    return str(sqlite_file(url) or shown_address(url))


def _integrity(url: str) -> Iterator[Case]:
    """SQLite's own quick check of each page; a database server checks itself."""
    if sqlite_file(url) is None:
        return
    try:
        with reading(url) as reader:
            answers = [str(row[0]) for row in reader.rows("PRAGMA quick_check(3)")] if reader is not None else ["ok"]
    except StoreError as error:
        answers = [error.message]
    if answers != ["ok"]:
        yield Case.of(
            what=f"the database is damaged: {answers[0]}",
            where=_address(url),
            why="Its content may be wrong, and the next write may fail.",
            hint="Restore it from a copy; sqlite3 FILE .recover saves what can be read. "
            "A new mlflow.db is filled from the study storage by the next hpo run.",
        )


def _schema(home: Home, package: str, url: str) -> Iterator[Case]:
    found = read_schema(package, url)
    if found.current or seen_held(home.locks / "mlflow-create.lock"):
        return  # a database that is being created passes through all schemas
    found = read_schema(package, url)
    if not found.current and not found.is_new:
        age = "an older" if found.older else "a newer"
        yield Case.of(
            what=f"the database was written by {age} {package} than is installed",
            where=f"{_address(url)}: schema {found.version}, installed {found.newest}",
            why=f"{package} refuses to open it." if package == "mlflow" or not found.older else "It may refuse it.",
            hint="Copy it, then: hpo store upgrade" if found.older else f"Install a newer {package}.",
        )


def _moved(snapshot: HomeSnapshot) -> Iterator[Case]:
    """Addresses in the databases that are in another folder than this home."""
    home = snapshot.home
    roots = earlier_roots(home)
    if roots:
        yield Case.of(
            partial(_follow, home),
            what="the project was moved or copied: its databases still name files in the old folder",
            where=f"{home.root}, which was {', '.join(map(str, roots))}",
            why="Models do not load in MLflow, until the next command that writes corrects the addresses.",
            repair="copies mlflow.db, then corrects the addresses in both databases",
        )


def _follow(home: Home) -> None:
    if not relocate(home):
        raise StoreError(f"{home.root}: cannot be written, or a run uses it under its old path.", "Stop the run first.")


def _unowned(snapshot: HomeSnapshot) -> Iterator[Case]:
    """Folders of runs and models that MLflow does not know."""
    home = snapshot.home
    if not home.embedded:
        return
    if snapshot.tracking is None:
        if snapshot.folders and not snapshot.faults:
            yield Case.of(
                what=f"{len(snapshot.folders)} folders of runs and models, but MLflow's database is gone",
                where=str(home.root / "mlflow.db"),
                why="Runs and registered models are not found.",
                hint="Restore the file from a copy. Without one, hpo run writes the runs again, but no model.",
            )
        return
    known = {run.id for run in snapshot.tracking.runs} | {model.id for model in snapshot.tracking.models}
    lost = [
        path
        for path in snapshot.folders
        if path.name not in known and path.relative_to(home.artifacts).parts[0] not in snapshot.live_names
    ]
    if lost:
        yield Case.of(
            partial(_set_aside, home, lost),
            what=f"{len(lost)} artifact folders that no run and no model in MLflow owns",
            where=_first(lost),
            why=f"They take {_megabytes(sum(map(size_of, lost)))} and nothing refers to them.",
            repair=f"moves them to {home.root / 'aside'}; hpo clean --aside deletes them for good",
        )


def _set_aside(home: Home, folders: list[Path]) -> None:
    for folder in folders:
        target = home.root / "aside" / home.check_inside(folder).relative_to(home.artifacts)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)


def _leftovers(snapshot: HomeSnapshot) -> Iterator[Case]:
    lost = [path for _, path in leftover_work(snapshot)]
    if lost:
        yield Case.of(
            partial(_remove_all, snapshot.home, lost),
            what=f"{len(lost)} folders of work that no run will use",
            where=_first(lost),
            why=f"They take {_megabytes(sum(map(size_of, lost)))}.",
            repair="deletes them: they hold no result",
        )


def _remove_all(home: Home, paths: list[Path]) -> None:
    for path in paths:
        remove(home.work, path)


def _space(home: Home) -> Iterator[Case]:
    folder = next((path for path in (home.root, *home.root.parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(folder).free
    if free < _LEAST_FREE_BYTES:
        yield Case.of(
            what=f"the disk is nearly full: {_megabytes(free)} free",
            where=str(folder),
            why="A study that cannot write stops.",
            hint="See what can be deleted: hpo clean",
        )


def _abandoned(snapshot: HomeSnapshot) -> Iterator[Case]:
    for title, one in snapshot.studies.items():
        if one.abandoned:
            yield Case.of(
                partial(_reap, snapshot.home, title),
                what=f"{counted(len(one.abandoned), 'trial')} running, but nobody runs it: its supervisor is dead",
                where=f"{title}: trial {numbers(one.abandoned)}",
                why="They count against the budget, and other supervisors may wait for them.",
                repair="records them as stopped and enqueues them again, as the next hpo run does",
                study=title,
            )


def _locks(snapshot: HomeSnapshot) -> Iterator[Case]:
    titles: set[str] = set()
    if snapshot.storage_read:
        files = snapshot.home.locks.glob("*.ask.lock")
        titles = {path.name.removesuffix(".ask.lock") for path in files} - set(snapshot.studies)
    stale = len(snapshot.stale_leases) + len(titles)
    if stale:
        yield Case.of(
            partial(_drop_locks, snapshot.home, titles),
            what=f"{counted(stale, 'lock file')} of dead supervisors or of studies that no longer exist",
            where=str(snapshot.home.locks),
            why="They block nothing, but they hide which supervisors live.",
            repair="deletes them",
        )


def _ledgers(home: Home) -> Iterator[Case]:
    """Damaged lines of the ledger of test openings, in the home and in the data cache."""
    from hpo.home import cache_folder

    cache = cache_folder() / "openings"
    for file, held in (
        (home.root / LEDGER, home.locks / "openings.lock"),
        (cache / LEDGER, cache / "openings.lock"),
    ):
        damaged = damaged_lines(file)
        if damaged:
            yield Case(
                Finding(
                    what=f"{counted(len(damaged), 'damaged line')} in the ledger of test openings",
                    where=f"{file}: line {', '.join(map(str, damaged))}",
                    why="An opening may go uncounted: promote, evaluate and compare open no test part.",
                    repair="moves them to openings.damaged.jsonl next to it, which every later opening mentions",
                ),
                partial(set_damaged_aside, file, lock_file=held),
            )


def _lost(snapshot: HomeSnapshot) -> Iterator[Case]:
    """Studies that opened a test part, and that the study storage does not have any more."""
    if not snapshot.storage_read:
        return
    lost = openings_of_lost(snapshot.home, [one.study for one in snapshot.studies.values()])
    if lost:
        yield Case.of(
            what=f"the ledger has {counted(len(lost), 'test opening')} of studies that the study storage does not have",
            where=f"{', '.join(sorted({each.study for each in lost}))}: {_address(snapshot.home.storage_url)}",
            why="Their trials are gone: was the database emptied, or replaced by another?",
            hint="Restore it from a copy. The openings still count.",
        )


def _ledger_tags(snapshot: HomeSnapshot) -> Iterator[Case]:
    """Damaged copies of openings in MLflow."""
    for run in snapshot.tracking.runs if snapshot.tracking else ():
        if damaged := damaged_tags(run.tags):
            yield Case.of(
                partial(mend_tags, snapshot.home, run.id, run.tags),
                what=f"{counted(len(damaged), 'damaged tag')} of test openings in MLflow",
                where=f"run {run.id}: {', '.join(sorted(damaged))}",
                why="An opening may go uncounted: promote, evaluate and compare open no test part.",
                repair="writes them again from the ledger, and moves what it lacks to openings.damaged.jsonl",
            )


def _reap(home: Home, title: str) -> None:
    from hpo.search.lifecycle import reap

    reap(home, title)


def _drop_locks(home: Home, titles: set[str]) -> None:
    from hpo.search.lifecycle import drop_locks

    drop_locks(home, titles)


def _first(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (", ..." if len(paths) > 3 else "")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
