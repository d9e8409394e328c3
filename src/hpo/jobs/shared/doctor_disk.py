"""What the doctor checks of databases and folders: whole, of the right version, in place, with room to grow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote

from hpo.database import engine_name, reading, sqlite_file
from hpo.errors import StoreError
from hpo.home import Home
from hpo.jobs.shared.database_schema import read_schema
from hpo.jobs.shared.home_snapshot import Case, Finding, Scene, leftovers, size_of
from hpo.storage.liveness import seen_held
from hpo.tracking.reader import place_of
from hpo.tracking.repair import move_places

_LEAST_FREE_BYTES = 1_000_000_000


def disk_cases(scene: Scene) -> Iterator[Case]:
    """What is wrong with the databases, the folders and the disk."""
    for url, error in scene.faults.items():
        yield Case(
            Finding(error.message.rstrip("."), _shown(url), "Nothing that it holds can be looked at.", hint=error.hint)
        )
    for package, url in _databases(scene.home).items():
        if url not in scene.faults:
            yield from _integrity(url)
            yield from _schema(scene.home, package, url)
    yield from _moved(scene)
    yield from _unowned(scene)
    yield from _leftovers(scene)
    yield from _space(scene.home)


def _databases(home: Home) -> dict[str, str]:
    addresses = {"optuna": home.storage_url, "mlflow": home.tracking_uri}
    return {package: url for package, url in addresses.items() if not url.startswith(("http://", "https://"))}


def _shown(url: str) -> str:
    return str(sqlite_file(url) or engine_name(url))


def _integrity(url: str) -> Iterator[Case]:
    """SQLite's own quick check of each page; servers see to themselves."""
    if sqlite_file(url) is None:
        return
    try:
        with reading(url) as reader:
            said = [str(row[0]) for row in reader.rows("PRAGMA quick_check(3)")] if reader is not None else ["ok"]
    except StoreError as error:
        said = [error.message]
    if said != ["ok"]:
        yield Case(
            Finding(
                what=f"the database is damaged: {said[0]}",
                where=_shown(url),
                why="What it says may be wrong, and the next write may fail.",
                hint="Restore it from a copy; sqlite3 FILE .recover saves what can be read. "
                "A new mlflow.db is filled from the study storage by the next hpo run.",
            )
        )


def _schema(home: Home, package: str, url: str) -> Iterator[Case]:
    found = read_schema(package, url)
    if found.current or seen_held(home.locks / "mlflow-create.lock"):
        return  # a database that is being made passes through all schemas
    found = read_schema(package, url)
    if found.current or found.is_new:
        return
    yield Case(
        Finding(
            what=f"the database was written by {'an older' if found.older else 'a newer'} {package} than is installed",
            where=f"{_shown(url)}: schema {found.version}, installed {found.newest}",
            why=f"{package} refuses to open it." if package == "mlflow" or not found.older else "It may refuse it.",
            hint="Copy it, then: hpo store upgrade" if found.older else f"Install a newer {package}.",
        )
    )


def _moved(scene: Scene) -> Iterator[Case]:
    """Experiments of ours whose artifacts lie in another folder than this home's."""
    if not scene.home.embedded or scene.tracking is None:
        return
    roots = set()
    for experiment in scene.tracking.experiments:
        place = place_of(experiment.place)
        if place is not None and experiment.place.endswith(f"/artifacts/{quote(experiment.name)}"):
            roots.add(place.parents[1])
    for old in sorted(root for root in roots if root != scene.home.root and not _same(root, scene.home.root)):
        yield Case(
            Finding(
                what="the project was moved or copied: MLflow still looks for artifacts and models in the old folder",
                where=f"{scene.home.root}, which was {old}",
                why="Models do not load; if the old folder still exists, both write to its files.",
                repair="makes a copy of mlflow.db, then has every place in it point to the new folder",
            ),
            partial(move_places, scene.home, old, scene.home.root),
        )


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _unowned(scene: Scene) -> Iterator[Case]:
    """Folders of runs and models that MLflow does not know."""
    if scene.tracking is None:
        if scene.folders and scene.home.embedded and not scene.faults:
            yield Case(
                Finding(
                    what=f"{len(scene.folders)} folders of runs and models, but MLflow's database is gone",
                    where=str(scene.home.root / "mlflow.db"),
                    why="Runs and registered models are not found.",
                    hint="Restore the file from a copy; without one hpo run writes the runs anew, but no model.",
                )
            )
        return
    if not scene.home.embedded:
        return
    known = {run.key for run in scene.tracking.runs} | {model.key for model in scene.tracking.models}
    lost = [
        path
        for path in scene.folders
        if path.name not in known and path.relative_to(scene.home.artifacts).parts[0] not in scene.live_names
    ]
    if lost:
        target = scene.home.root / "aside"
        yield Case(
            Finding(
                what=f"{len(lost)} artifact folders that no run and no model in MLflow owns",
                where=", ".join(map(str, lost[:3])) + (", ..." if len(lost) > 3 else ""),
                why=f"They take {_megabytes(sum(map(size_of, lost)))} and nothing leads to them.",
                repair=f"moves them to {target}; hpo clean --aside deletes them for good",
            ),
            partial(_set_aside, scene.home, lost),
        )


def _set_aside(home: Home, folders: list[Path]) -> None:
    for folder in folders:
        target = home.root / "aside" / folder.relative_to(home.artifacts)
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)


def _leftovers(scene: Scene) -> Iterator[Case]:
    lost = leftovers(scene)
    if lost:
        yield Case(
            Finding(
                what=f"{len(lost)} folders of work that nobody will take up again",
                where=", ".join(str(path) for _, path in lost[:3]) + (", ..." if len(lost) > 3 else ""),
                why=f"They take {_megabytes(sum(size_of(path) for _, path in lost))}.",
                repair="removes them: no result is in them",
            ),
            partial(_remove, [path for _, path in lost]),
        )


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _space(home: Home) -> Iterator[Case]:
    folder = next((path for path in (home.root, *home.root.parents) if path.exists()), Path("/"))
    free = shutil.disk_usage(folder).free
    if free < _LEAST_FREE_BYTES:
        yield Case(
            Finding(
                what=f"the disk is nearly full: {_megabytes(free)} left",
                where=str(folder),
                why="A study that cannot write stops.",
                hint="See what can go: hpo clean",
            )
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
