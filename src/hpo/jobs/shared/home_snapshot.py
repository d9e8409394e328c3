"""What doctor and clean look at: storage, tracking and disk of a home at one moment, and who is at work there."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import StoreError
from hpo.execute.workdir import wanted
from hpo.home import Home
from hpo.storage.liveness import seen_held
from hpo.storage.reader import StudySnapshot, read_snapshots
from hpo.tracking.reader import Tracking, place_of
from hpo.tracking.reader import look as look_at_tracking

# What a trial, or the drawing of a study's pictures, leaves in the study's folder of work. Checkpoints are none of it.
_SCRAP = re.compile(r"[0-9]+|study|lease-.*")
_YOUNG_SECONDS = 60.0  # a lease file this young may be about to be held


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what, where, why it matters, and what --fix does about it ("": nothing can be done).

    study is the title of the one study that it concerns; "" where it concerns the whole home. hint is what a person
    can do where --fix cannot.
    """

    what: str
    where: str
    why: str
    repair: str = ""
    study: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Case:
    """A finding and its repair."""

    finding: Finding
    mend: Callable[[], object] | None = None


@dataclass(frozen=True)
class Scene:
    """A home at a moment. studies are by title; tracking is None where there is no store or it cannot be read.

    live are the titles of studies that a living supervisor holds. faults are databases that cannot be read: address ->
    what they say. folders are the artifact folders that were there before the tracking store was read.
    """

    home: Home
    studies: Mapping[str, StudySnapshot]
    tracking: Tracking | None
    live: frozenset[str]
    faults: Mapping[str, StoreError]
    folders: tuple[Path, ...]
    stale_leases: tuple[Path, ...]

    @property
    def storage_read(self) -> bool:
        """Whether the studies are all that there are."""
        return self.home.storage_url not in self.faults

    @property
    def live_names(self) -> frozenset[str]:
        """The names of the studies at work, all their generations being in one experiment."""
        return frozenset(self.studies[title].study.name for title in self.live if title in self.studies)

    def inside(self, uri: str) -> Path | None:
        """The path of artifacts that lie in this home; None for those elsewhere, which are nobody's to judge here."""
        place = place_of(uri)
        return place if place is not None and place.is_relative_to(self.home.artifacts) else None


def see(home: Home) -> Scene:
    """Look at everything, in an order in which what is under way is never taken for a fault.

    A study is called alive if it was before or after; files are listed before the runs that own them, and runs before
    the trials that they are of.
    """
    faults: dict[str, StoreError] = {}
    before = _studies(home, faults)
    folders = tuple(_artifact_folders(home))
    try:
        tracking = look_at_tracking(home)
    except StoreError as error:
        tracking = None
        faults[home.tracking_uri] = error
    studies = _studies(home, faults)
    live = {title for each in (before, studies) for title, one in each.items() if one.holders}
    return Scene(home, studies, tracking, frozenset(live), faults, folders, tuple(_stale_leases(home)))


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
    now = time.time()
    return [
        path
        for path in sorted(home.locks.glob("lease-*.lock"))
        if now - path.stat().st_mtime > _YOUNG_SECONDS and not seen_held(path)
    ]


def leftovers(scene: Scene) -> list[tuple[str, Path]]:
    """(study's title or "", folder) of work that nobody will take up again: of trials that are over, or of no study.

    Which are needed is the rule by which runs tidy up themselves. Checkpoints, and results that the storage has not
    taken yet, are never counted as left over.
    """
    if not scene.storage_read:
        return []
    found = []
    for folder in sorted(path for path in scene.home.work.glob("*") if path.is_dir()):
        if folder.name in scene.live:
            continue
        one = scene.studies.get(folder.name)
        if one is None:
            found += [("", folder)] if not _holds_result(folder) else []
            continue
        needed = set(map(str, wanted(one.study)))
        scrap = [path for path in sorted(folder.iterdir()) if _SCRAP.fullmatch(path.name) and path.name not in needed]
        found += [(folder.name, path) for path in scrap if not _holds_result(path)]
    return found


def _holds_result(folder: Path) -> bool:
    return any(folder.rglob("result.json"))


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
