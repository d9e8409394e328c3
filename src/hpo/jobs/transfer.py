"""Export a study to one file, with all that Optuna, MLflow and the test ledger hold of it, and import such a file."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictFloat, StrictInt, StrictStr, ValidationError, model_validator

from hpo.errors import StoreError, shown_address
from hpo.home import Home
from hpo.jobs.shared.archive import Archive, damaged, reading, writing
from hpo.locks import locked
from hpo.records import StudyResult, TrialState
from hpo.report.text import counted
from hpo.storage.reader import read_study
from hpo.tracking.ledger import parse_opening
from hpo.tracking.store import check_reachable

if TYPE_CHECKING:
    from hpo.tracking.transfer.export_runs import TrackedStudy

_MOST_VERSIONS = 10_000  # of a registered model
_WRONG = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # raised by reading JSON of another shape


@dataclass(frozen=True)
class Exported:
    """The content of a file, as counts. notes name what was not exported, and why."""

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
    """Counts of what was new to the stores; openings counts those of the file.

    relation is the state of the study storage before: absent, behind, same, or ahead, in which case nothing is written.
    """

    title: str
    store: str
    relation: str
    trials: int
    runs: int
    models: int
    versions: int
    openings: int
    notes: tuple[str, ...] = ()


Id = Annotated[str, Field(pattern=r"^(m-)?[0-9a-f]{32}$")]
Texts = dict[StrictStr, StrictStr]
Time = Annotated[StrictInt, Field(ge=0, lt=253_370_764_800_000)]  # ms since 1970, before the year 9999
# Name, value, time in ms since 1970, step.
Point = tuple[StrictStr, StrictInt | StrictFloat, StrictInt, StrictInt]


class _Dataset(BaseModel, extra="allow"):
    __pydantic_extra__: dict[str, StrictStr | None]
    tags: Texts


class _Run(BaseModel):
    id: Id
    name: StrictStr
    status: Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
    started: Time | None
    ended: Time | None
    tags: Texts
    params: Texts
    metrics: list[Point]
    datasets: list[_Dataset]
    outputs: list[tuple[Id, int]]


class _Model(BaseModel):
    id: Id
    name: StrictStr
    kind: StrictStr | None
    run: StrictStr
    tags: Texts
    params: Texts
    metrics: list[Point]


class _Version(BaseModel):
    number: Annotated[StrictInt, Field(ge=1, le=_MOST_VERSIONS)]
    model: StrictStr
    run: StrictStr
    description: StrictStr
    created: Time
    tags: Texts


class _Registered(BaseModel):
    name: StrictStr
    description: StrictStr
    tags: Texts
    aliases: dict[StrictStr, StrictInt]
    versions: list[_Version]

    @model_validator(mode="after")
    def _aliases_name_versions(self) -> _Registered:
        if not {*self.aliases.values()} <= {version.number for version in self.versions}:
            raise ValueError("an alias names no version")
        return self


def export_study(study: str, *, home: str | Path | None = None, file: str | Path | None = None) -> Exported:
    """Write a study, its runs with every point of their metrics, their files, its models and versions to one file.

    study is a name (its newest generation) or a title such as name~2. file is TITLE.zip by default and is replaced if
    it exists. The stores are not changed, except that trials of dead supervisors are recorded as stopped. Raises
    StoreError where there is no such study, while it is running, and where a store or the disk fails.
    """
    from hpo.search.lifecycle import reap
    from hpo.storage import transfer as storage
    from hpo.storage.reader import list_trials
    from hpo.tracking.transfer.export_runs import export_runs

    place = Home.find(home)
    found = list_trials(place, study)
    storage.refuse_running(place, found.title)
    if found.count(TrialState.RUNNING):
        reap(place, found.title)
        storage.refuse_running(place, found.title)
    if paused := found.count(TrialState.PAUSED):
        raise StoreError(
            f"{found.title}: {counted(paused, 'trial')} paused, and checkpoints do not move.",
            f"Finish the search first: hpo run {found.name}",
        )
    stored = storage.export_study(place, found.exact)
    try:
        record = storage.check(stored)
    except _WRONG as error:
        raise StoreError(f"{found.title}: cannot be exported: {error}.", "See what is wrong: hpo doctor") from None
    target = Path(file) if file is not None else Path(f"{record.title}.zip")
    head = {"title": record.title, "created": record.created, "exported": time.time()}
    with writing(target, head) as archive:
        side = export_runs(place, record, archive.add_file)
        trials = archive.add_lines("trials.jsonl", iter(stored.pop("trials")))
        archive.add_json("study.json", stored)
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
        notes=tuple(_not_exported(place, record.title, side)),
    )


def import_study(file: str | Path, *, home: str | Path | None = None, move_aliases: bool = False) -> Imported:
    """Import a file of export_study into the stores of home. It is safe to repeat, also after a kill.

    The whole file, and its relation to what is there, are checked before anything is written. A study of the same
    origin is completed; where it has more trials than the file, nothing is written. No gate looks at the file's models,
    so existing aliases stay, and no imported version gets one if there are versions of another origin, unless
    move_aliases.
    Raises StoreError for a file that is damaged or of a later format, where the stores hold another study of this name
    or one that has diverged, while it is running, and where a store or the disk fails.
    """
    from hpo.storage import transfer as storage
    from hpo.tracking.transfer import import_runs

    place = Home.find(home)
    disk = next(folder for folder in place.root.parents if folder.is_dir())
    with reading(Path(file), scratch=disk) as archive:
        study, record, side = _read(archive)
        storage.refuse_running(place, record.title)
        storage.relation(place, study)  # before there is anything to write to; another import may change it
        check_reachable(place.create())
        with locked(place.locks / "import.lock"):
            storage.refuse_running(place, record.title)
            relation = storage.relation(place, study)
            added, trials = import_runs.Imports(), 0
            if relation is not storage.Relation.AHEAD:
                # The trials last: a study that can be run is complete.
                added = import_runs.import_runs(place, record, side, archive.extract, move_aliases=move_aliases)
                trials = storage.import_study(place, study)
    return Imported(
        title=record.title,
        store=shown_address(place.tracking_uri),
        relation=relation.value,
        trials=trials,
        runs=added.runs,
        models=added.models,
        versions=added.versions,
        openings=len(side.openings),
        notes=tuple(added.notes),
    )


def _not_exported(home: Home, title: str, side: TrackedStudy) -> Iterable[str]:
    for version in (side.registered or {"versions": ()})["versions"]:
        if not version["model"]:
            yield f"not exported: registered version {version['number']}, which has no logged model"
    waiting = [
        trial.number
        for trial in read_study(home, title).trials
        if trial.result is not None and trial.result.folder and (home.work / title / str(trial.number)).is_dir()
    ]
    if waiting:
        numbers = ", ".join(map(str, waiting))
        yield f"not exported: work of trials {numbers} on the disk, from which the next hpo run logs models"


def _read(archive: Archive) -> tuple[dict[str, Any], StudyResult, TrackedStudy]:
    """The study, its record and its side of MLflow, with the types that export_study writes."""
    from hpo.storage import transfer as storage
    from hpo.tracking.transfer.export_runs import TrackedStudy

    study = archive.json("study.json")
    runs, models = archive.lines("runs.jsonl"), archive.lines("models.jsonl")
    registered, looks = archive.json("registered.json"), archive.lines("openings.jsonl")
    try:
        study = {**study, "trials": archive.lines("trials.jsonl")}
        record = storage.check(study)
        for kind, values in ((_Run, runs), (_Model, models), (_Registered, [registered] if registered else [])):
            for value in values:
                kind.model_validate(value)
        if registered and registered["name"] != record.name:
            raise ValueError(f"the registered model is not named {record.name}")
        openings = [parse_opening(look) for look in looks]
        if any((one.study, one.created) != (record.title, record.created) for one in openings):
            raise ValueError("an opening is of another study")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise damaged(archive.file, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except _WRONG as error:
        raise damaged(archive.file, f"{type(error).__name__}: {error}") from None
    return study, record, TrackedStudy(runs, models, registered, openings)
