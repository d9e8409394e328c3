"""Move a study between stores: all that Optuna, MLflow and the ledger know of it, through one file."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import StoreError
from hpo.home import Home
from hpo.jobs.shared.archive import Archive, damaged, reading, writing
from hpo.locks import locked
from hpo.records import StudyResult, TrialState
from hpo.tracking.ledger import Opening
from hpo.tracking.store import knock, shown

if TYPE_CHECKING:
    from hpo.tracking.transfer.export_runs import Side

_ID = re.compile(r"(m-)?[0-9a-f]{32}")
_MOST_VERSIONS = 10_000  # of a registered model; to reach a number all below it have to be used up
_WRONG = (KeyError, TypeError, ValueError, AttributeError)  # what reading another shape of JSON raises


@dataclass(frozen=True)
class Exported:
    """What a file holds of a study: how many of each. notes say what stays behind, and why."""

    title: str
    file: Path
    trials: int
    runs: int
    models: int
    versions: int
    openings: int
    bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Imported:
    """What was new to the stores: how many of each; openings counts those of the file.

    standing says how the study storage stood before: absent, behind, same, or ahead, in which case nothing is written.
    """

    title: str
    store: str
    standing: str
    trials: int
    runs: int
    models: int
    versions: int
    openings: int
    notes: tuple[str, ...] = ()


def export_study(study: str, *, home: str | Path | None = None, file: str | Path | None = None) -> Exported:
    """Write a study, its runs with every point of their metrics, their files, its models and versions to one file.

    study is a name (its newest generation) or a title such as name~2; file is TITLE.zip by default, and replaced where
    it exists. The study's stores are left as they are, but what dead supervisors left is settled as the next run would.
    Raises StoreError where there is no such study, while somebody runs it, and where a store or the disk refuses.
    """
    from hpo.search import repair
    from hpo.storage import transfer as moving
    from hpo.storage.reader import list_trials
    from hpo.tracking.transfer import export_runs as tracking

    place = Home.find(home)
    found = list_trials(place, study)
    moving.refuse_running(place, found.title)
    if found.count(TrialState.RUNNING):
        repair.reap(place, found.title)
        moving.refuse_running(place, found.title)
    taken = moving.export_study(place, found.exact)
    try:
        record = moving.check(taken)
    except _WRONG as error:
        raise StoreError(f"{found.title}: cannot be exported: {error}.", "See what is wrong: hpo doctor") from None
    target = Path(file) if file is not None else Path(f"{record.title}.zip")
    head = {"title": record.title, "created": record.created, "exported": time.time()}
    with writing(target, head) as archive:
        side = tracking.take(place, record, archive.add_file)
        trials = archive.add_lines("trials.jsonl", iter(taken.pop("trials")))
        archive.add_json("study.json", taken)
        archive.add_lines("runs.jsonl", iter(side.runs))
        archive.add_lines("models.jsonl", iter(side.models))
        archive.add_json("registered.json", side.registered)
        archive.add_lines("openings.jsonl", map(asdict, side.openings))
    return Exported(
        title=record.title,
        file=target,
        trials=trials,
        runs=len(side.runs),
        models=len(side.models),
        versions=len(side.registered["versions"]) if side.registered else 0,
        openings=len(side.openings),
        bytes=target.stat().st_size,
        notes=tuple(_left_behind(place, record.title, side)),
    )


def import_study(file: str | Path, *, home: str | Path | None = None) -> Imported:
    """Bring a study that export_study wrote into the stores of home; again, or after a kill, nothing comes twice.

    All of the file is checked before anything is written. A study of the same origin is completed; where it has more
    trials than the file, nothing is written. Raises StoreError for a file that is damaged or of a later format, where
    the stores have another study of this title or one that went on otherwise, while somebody runs it, and where a store
    or the disk refuses.
    """
    from hpo.storage import transfer as moving
    from hpo.tracking.transfer import import_runs

    place = Home.find(home)
    disk = next(folder for folder in place.root.parents if folder.is_dir())
    with reading(Path(file), scratch=disk) as archive:
        study, record, side = _read(archive)
        knock(place.create())
        with locked(place.locks / "import.lock"):
            moving.refuse_running(place, record.title)
            standing = moving.relation(place, study)
            added, trials = import_runs.Added(), 0
            if standing is not moving.Relation.AHEAD:
                # The trials last: a study that can be run is there whole.
                added = import_runs.put(place, record, side, archive.extract)
                trials = moving.import_study(place, study)
    return Imported(
        title=record.title,
        store=shown(place.tracking_uri),
        standing=standing.value,
        trials=trials,
        runs=added.runs,
        models=added.models,
        versions=added.versions,
        openings=len(side.openings),
        notes=tuple(added.notes),
    )


def _left_behind(home: Home, title: str, side: Side) -> Iterable[str]:
    from hpo.storage.optuna_storage import read_study

    for version in (side.registered or {"versions": ()})["versions"]:
        if not version["model"]:
            yield f"not exported: registered version {version['number']}, which has no logged model"
    waiting = [
        trial.number
        for trial in read_study(home, title).trials
        if trial.result is not None and trial.result.folder and Path(trial.result.folder).is_dir()
    ]
    if waiting:
        numbers = ", ".join(map(str, waiting))
        yield f"not exported: what trials {numbers} left on the disk; the next hpo run logs models from it"


def _read(archive: Archive) -> tuple[dict[str, Any], StudyResult, Side]:
    """Study, its record and its side of MLflow, as far as its types go as export_study writes them."""
    from hpo.storage import transfer as moving
    from hpo.tracking.transfer.export_runs import Side

    study = archive.json("study.json")
    runs, models = archive.lines("runs.jsonl"), archive.lines("models.jsonl")
    registered, looks = archive.json("registered.json"), archive.lines("openings.jsonl")
    try:
        study = {**study, "trials": archive.lines("trials.jsonl")}
        record = moving.check(study)
        _check_runs(runs)
        _check_models(models)
        if registered is not None:
            _check_registered(registered, record.name)
        openings = [Opening(**look) for look in looks]
        if any((one.study, one.created) != (record.title, record.created) for one in openings):
            raise ValueError("an opening is of another study")
    except _WRONG as error:
        raise damaged(archive.file, f"{type(error).__name__}: {error}") from None
    return study, record, Side(runs, models, registered, openings)


def _check_runs(runs: Iterable[Mapping[str, Any]]) -> None:
    for run in runs:
        _check_names(run["id"], run["tags"], run["params"])
        _check_points(run["metrics"])
        if run["status"] not in ("RUNNING", "FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"a run cannot be {run['status']!r}")
        if not isinstance(run["name"], str) or not all(
            type(run[key]) in (int, type(None)) for key in ("started", "ended")
        ):
            raise TypeError("a run is of other types")
        for dataset in run["datasets"]:
            _check_texts({key: value for key, value in dataset.items() if key != "tags" and value is not None})
            _check_texts(dataset["tags"])
        for model, step in run["outputs"]:
            _check_names(model, {}, {})
            int(step)


def _check_models(models: Iterable[Mapping[str, Any]]) -> None:
    for model in models:
        _check_names(model["id"], model["tags"], model["params"])
        _check_points(model["metrics"])
        _check_texts({"name": model["name"], "run": model["run"], "kind": model["kind"] or ""})


def _check_registered(registered: Mapping[str, Any], name: str) -> None:
    if registered["name"] != name:
        raise ValueError(f"the registered model is not named {name}")
    _check_texts({**registered["tags"], "": registered["description"]})
    for version in registered["versions"]:
        _check_texts({**version["tags"], "": version["description"] + version["model"] + version["run"]})
        if not (0 < version["number"] <= _MOST_VERSIONS) or type(version["created"]) is not int:
            raise ValueError(f"a version cannot have the number {version['number']!r}")
    if not {*registered["aliases"].values()} <= {version["number"] for version in registered["versions"]}:
        raise ValueError("an alias names no version")


def _check_names(born: str, tags: Mapping[str, Any], params: Mapping[str, Any]) -> None:
    if not _ID.fullmatch(born):
        raise ValueError(f"{born!r} is not the id of a run or a model")
    _check_texts(tags)
    _check_texts(params)


def _check_texts(texts: Mapping[str, Any]) -> None:
    if not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise TypeError("a tag or a parameter is not a text")


def _check_points(points: Iterable[tuple[Any, ...]]) -> None:
    for name, value, when, step in points:
        if not isinstance(name, str) or not isinstance(value, int | float) or {type(when), type(step)} != {int}:
            raise TypeError("a point of a metric is of other types")
