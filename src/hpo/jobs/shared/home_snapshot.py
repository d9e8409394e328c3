"""The study storage, the tracking store and the disk of a home at one moment, for hpo doctor and hpo clean."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import StoreError
from hpo.execute.workdir import wanted
from hpo.home import Home
from hpo.locks import seen_held
from hpo.relocation import local_path
from hpo.storage.reader import StudySnapshot, read_snapshots
from hpo.tracking.reader import TrackingSnapshot, read_tracking

# Work of a trial, or of drawing the study's figures, in the study's work folder. Checkpoints are not part of it.
_WORK = re.compile(r"[0-9]+|study|lease-.*")
_YOUNG_SECONDS = 60.0  # the supervisor of a lease file this young may still be starting


@dataclass(frozen=True)
class Finding:
    """One problem: what, where, why it matters, and what --fix does about it ("": --fix does nothing).

    study is the title of the one study that it concerns, "" where it concerns the whole home. hint is what a person
    can do where --fix does nothing.
    """

    what: str
    where: str
    why: str
    repair: str = ""
    study: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Case:
    """A finding and the function that repairs it."""

    finding: Finding
    mend: Callable[[], object] | None = None

    @classmethod
    def of(cls, mend: Callable[[], object] | None = None, **finding: str) -> Case:
        """The case of a finding with these fields."""
        return cls(Finding(**finding), mend)


@dataclass(frozen=True)
class HomeSnapshot:
    """A home at one moment. studies are by title; tracking is None where there is no store or it cannot be read.

    live are the titles of studies that a living supervisor holds. faults are the databases that cannot be read:
    address -> error. folders are the artifact folders that existed before the tracking store was read.
    """

    home: Home
    studies: Mapping[str, StudySnapshot]
    tracking: TrackingSnapshot | None
    live: frozenset[str]
    faults: Mapping[str, StoreError]
    folders: tuple[Path, ...]
    stale_leases: tuple[Path, ...]

    @property
    def storage_read(self) -> bool:
        """True where the study storage could be read, so that studies are complete."""
        return self.home.storage_url not in self.faults

    @property
    def live_names(self) -> frozenset[str]:
        """The names of the live studies; all generations of a name share one experiment."""
        return frozenset(self.studies[title].study.name for title in self.live if title in self.studies)

    def inside(self, uri: str) -> Path | None:
        """The path of artifacts inside this home; None for any others, which hpo doctor does not judge."""
        path, artifacts = local_path(uri), self.home.artifacts
        if path is None or path.is_relative_to(artifacts):
            return path
        return path if path.resolve().is_relative_to(artifacts.resolve()) else None  # the home by another name


def take_snapshot(home: Home) -> HomeSnapshot:
    """Read everything, in an order in which work in progress is never taken for a fault.

    A study is live if it was live before or after; folders are listed before the runs that own them, and runs are read
    before their trials.
    """
    faults: dict[str, StoreError] = {}
    before = _studies(home, faults)
    folders = tuple(_artifact_folders(home))
    try:
        tracking = read_tracking(home)
    except StoreError as error:
        tracking = None
        faults[home.tracking_uri] = error
    studies = _studies(home, faults)
    live = {title for each in (before, studies) for title, one in each.items() if one.holders}
    return HomeSnapshot(home, studies, tracking, frozenset(live), faults, folders, tuple(_stale_leases(home)))


def _studies(home: Home, faults: dict[str, StoreError]) -> dict[str, StudySnapshot]:
    try:
        return {one.study.title: one for one in read_snapshots(home)}
    except StoreError as error:
        faults[home.storage_url] = error
        return {}


def _artifact_folders(home: Home) -> list[Path]:
    """The folders of runs and of models."""
    folders = [path for path in home.artifacts.glob("*/*") if path.is_dir() and path.name != "models"]
    return sorted(folders + [path for path in home.artifacts.glob("*/models/*") if path.is_dir()])


def _stale_leases(home: Home) -> list[Path]:
    return [path for path in sorted(home.locks.glob("lease-*.lock")) if is_old(path) and not seen_held(path)]


def is_old(path: Path) -> bool:
    """Whether a file was last written so long ago that no process is just making it."""
    return time.time() - path.stat().st_mtime > _YOUNG_SECONDS


def leftover_work(snapshot: HomeSnapshot) -> list[tuple[str, Path]]:
    """(title of the study or "", folder) of work that no run will use: of ended trials, or of no study.

    The rule is the one by which runs clean up after themselves. Checkpoints, and results that the storage has not
    accepted yet, are not leftovers.
    """
    if not snapshot.storage_read:
        return []
    found = []
    for folder in sorted(path for path in snapshot.home.work.glob("*") if path.is_dir()):
        if folder.name in snapshot.live:
            continue
        one = snapshot.studies.get(folder.name)
        if one is None:
            found += [("", folder)] if not _holds_result(folder) else []
            continue
        needed = set(map(str, wanted(one.study)))
        work = [path for path in sorted(folder.iterdir()) if _WORK.fullmatch(path.name) and path.name not in needed]
        found += [(folder.name, path) for path in work if not _holds_result(path)]
    return found


def _holds_result(folder: Path) -> bool:
    return any(folder.rglob("result.json"))


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
