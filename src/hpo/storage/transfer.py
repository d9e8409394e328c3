"""Copy a study from one storage to another, as plain data with everything that Optuna stores."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text

from hpo.database import sqlite_file
from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import StudyResult
from hpo.storage.optuna_storage import Storage, generations, open_storage
from hpo.storage.reader import no_study, read_snapshots, to_result
from hpo.storage.retry import shown_url, store_errors
from hpo.storage.trial_attrs import RESULT, STUDY, to_trial

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # as of spec.study.StudySpec
_LATEST = 253_370_764_800.0  # seconds since 1970 at the end of the year 9998
_LAST_STEP = (1 << 31) - 1  # that a server stores
_TEMPORARY = "hpo import of "  # + title and a number: the name of a study while it is written; titles have no blanks


class Relation(StrEnum):
    """The relation of a storage to a study that is to be imported: its copy there is absent, behind, same or ahead."""

    ABSENT = "absent"
    BEHIND = "behind"
    SAME = "same"
    AHEAD = "ahead"


def export_study(home: Home, name: str) -> dict[str, Any]:
    """A study, by name or title, as JSON types; see import_study. Trials are in the order of their numbers.

    The folders of the trials' files are left out. Raises StoreError.
    """
    storage = open_storage(home)
    try:
        with store_errors(home):
            studies, titles = storage.studies(), generations(storage, name)
            title = titles[max(titles)] if titles else name.removesuffix("~1")
            if title not in studies:
                raise no_study(name, shown_url(home), studies)
            number = studies[title][0]
            return {
                "title": title,
                "generations": _begun(storage, studies[title][1]["name"]),
                "directions": [way.name for way in storage.directions(number)],
                "user_attrs": storage.database.get_study_user_attrs(number),
                "system_attrs": storage.database.get_study_system_attrs(number),
                "trials": _trials(storage, number),
            }
    finally:
        storage.close()


def check(study: Mapping[str, Any]) -> StudyResult:
    """Check a study from export_study, and return its record without trials.

    Raises ValueError, KeyError, TypeError or AttributeError where it cannot be read.
    """
    record = study["user_attrs"][STUDY]
    result = to_result(record, ())
    if not _NAME.fullmatch(result.name) or result.title != study["title"] or type(result.generation) is not int:
        raise ValueError(f"a study cannot be named {study['title']!r}")
    known = study.get("generations", {})
    if (
        not isinstance(result.created, float)
        or not 0 <= result.created < _LATEST
        or not all(isinstance(each, dict) for each in (record["spec"], record["identity"], known))
    ):
        raise TypeError("the record of the study is of other types")
    directions = _directions(study)
    for number, trial in enumerate(study["trials"]):
        frozen = _frozen(trial)
        to_trial(frozen)  # reads our records on it
        ended = frozen.state.is_finished()
        many = frozen.values is not None and len(frozen.values) != len(directions)
        if trial["number"] != number or many or any(abs(step) > _LAST_STEP for step in frozen.intermediate_values):
            raise ValueError(f"trial {number} is not whole")
        if frozen.state is TrialState.RUNNING or ended != (frozen.datetime_complete is not None):
            raise ValueError(f"trial {number} has not ended")
    return result


def refuse_running(home: Home, title: str) -> None:
    """Raise StoreError if a living supervisor runs the study of this title."""
    if any(each.study.title == title and each.holders for each in read_snapshots(home, results=False)):
        raise StoreError(f"{title}: it is running, and cannot be moved now.", f"Stop it first: hpo stop {title}")


def relation(home: Home, study: Mapping[str, Any]) -> Relation:
    """The relation of the storage to a study; no file is made. Raises StoreError where it has another of this name."""
    file = sqlite_file(home.storage_url)
    if file is not None and not file.exists():
        return Relation.ABSENT
    storage = open_storage(home)
    try:
        with store_errors(home):
            return _relation(home, storage, study)
    finally:
        storage.close()


def import_study(home: Home, study: Mapping[str, Any]) -> int:
    """Write the study into the storage; returns the number of its trials that are new there.

    The copy is written next to the existing one and replaces it in one transaction: readers, also after a kill, see
    the old study or the whole new one. A study that is the same already, or further, is left as it is. Raises
    StoreError where there is another study of this title, and where it is running.
    """
    storage = open_storage(home)
    try:
        with store_errors(home):
            _sweep(storage, study["title"])
            if _relation(home, storage, study) in (Relation.SAME, Relation.AHEAD):
                return 0
            copy = _write(storage, study)
            with storage.locked("studies"):
                # Another import may have been faster.
                refuse_running(home, study["title"])
                late = _relation(home, storage, study) in (Relation.SAME, Relation.AHEAD)
                before = copy if late else _swap(storage, study, copy)
            existing = len(storage.every_trial(before)) if before is not None else 0
            if before is not None:
                storage.database.delete_study(before)
            return len(study["trials"]) - existing
    finally:
        storage.close()


def _trials(storage: Storage, number: int) -> list[dict[str, Any]]:
    return [_plain(trial) for trial in storage.every_trial(number)]


def _plain(trial: FrozenTrial) -> dict[str, Any]:
    """A trial as JSON types: times in UTC, parameters as [number in Optuna's table, distribution]."""
    return {
        "number": trial.number,
        "state": trial.state.name,
        "values": trial.values,
        "started": _time(trial.datetime_start),
        "ended": _time(trial.datetime_complete),
        "params": {
            name: [way.to_internal_repr(trial.params[name]), distribution_to_json(way)]
            for name, way in trial.distributions.items()
        },
        "steps": sorted(trial.intermediate_values.items()),
        "user_attrs": _without_folder(trial.user_attrs),
        "system_attrs": trial.system_attrs,
    }


def _frozen(trial: Mapping[str, Any]) -> FrozenTrial:
    ways = {name: json_to_distribution(way) for name, (_, way) in trial["params"].items()}
    return FrozenTrial(
        number=trial["number"],
        state=TrialState[trial["state"]],
        value=None,
        values=None if trial["values"] is None else [float(value) for value in trial["values"]],
        datetime_start=_local(trial["started"]),
        datetime_complete=_local(trial["ended"]),
        params={name: ways[name].to_external_repr(inner) for name, (inner, _) in trial["params"].items()},
        distributions=ways,
        user_attrs=_without_folder(trial["user_attrs"]),
        system_attrs=dict(trial["system_attrs"]),
        intermediate_values={int(step): float(value) for step, value in trial["steps"]},
        trial_id=0,
    )


def _without_folder(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes, with a result that lacks the folder of its files: it is a temporary path on one machine."""
    result = attributes.get(RESULT)
    return {**attributes, **({RESULT: {**result, "folder": ""}} if result is not None else {})}


def _time(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat() if moment else None  # Optuna's are local


def _local(moment: str | None) -> datetime | None:
    return datetime.fromisoformat(moment).astimezone().replace(tzinfo=None) if moment else None


def _directions(study: Mapping[str, Any]) -> list[StudyDirection]:
    return [StudyDirection[way] for way in study["directions"]]


def _relation(home: Home, storage: Storage, study: Mapping[str, Any]) -> Relation:
    title, record = study["title"], study["user_attrs"][STUDY]
    number, existing = storage.studies().get(title, (None, None))
    elsewhere = "Import it into a folder, or stores, of its own: --home DIR."
    if existing is not None and (existing["created"], existing["identity"]) != (record["created"], record["identity"]):
        raise StoreError(f"{shown_url(home)}: it has another study that is named {title}.", elsewhere)
    # Generations of another study would be taken for its own: by hpo run, which resumes the newest, and by promote.
    begun, known = _begun(storage, record["name"]), {**study.get("generations", {}), title: record["created"]}
    if (begun and not {*begun} & {*known}) or any(known.get(each, when) != when for each, when in begun.items()):
        raise StoreError(
            f"{shown_url(home)}: {', '.join(begun)} there and {title} in the file are not generations of one study.",
            elsewhere,
        )
    if number is None or existing is None:
        return Relation.ABSENT
    here, there = _trials(storage, number), study["trials"]
    differing = [
        old["number"]
        for old, new in zip(here, there, strict=False)
        if _ended(old) and _ended(new) and not _same(old, new)
    ]
    ours, theirs = ({trial["number"] for trial in trials if _ended(trial)} for trials in (here, there))
    if differing or (ours - theirs and theirs - ours):
        number = min([*differing, *(ours ^ theirs)])
        raise StoreError(
            f"{shown_url(home)}: {title} was continued both here and in its source, differently: see trial {number}.",
            elsewhere,
        )
    if _same(here, there):
        return Relation.SAME
    return Relation.AHEAD if ours > theirs or (ours == theirs and len(here) > len(there)) else Relation.BEHIND


def _begun(storage: Storage, name: str) -> dict[str, float]:
    """Title -> time of its beginning, of each generation of a study."""
    studies = storage.studies()
    return {title: studies[title][1]["created"] for title in generations(storage, name).values()}


def _same(here: object, there: object) -> bool:
    # Through JSON, which has no tuples and no numbers as keys; NaN is not itself.
    return json.dumps(here, sort_keys=True) == json.dumps(there, sort_keys=True)


def _ended(trial: Mapping[str, Any]) -> bool:
    return bool(TrialState[trial["state"]].is_finished())


def _sweep(storage: Storage, title: str) -> None:
    """Delete the remains of killed imports of this study."""
    for name, number in storage.study_ids().items():
        if name.startswith(f"{_TEMPORARY}{title} "):
            with suppress(KeyError):  # another import does the same
                storage.database.delete_study(number)


def _write(storage: Storage, study: Mapping[str, Any]) -> int:
    """Write the study under a temporary name and without its record, so that it is no study of hpo yet."""
    name = f"{_TEMPORARY}{study['title']} {uuid.uuid4().hex}"
    number: int = storage.database.create_new_study(_directions(study), name)
    for key, value in study["user_attrs"].items():
        if key != STUDY:
            storage.database.set_study_user_attr(number, key, value)
    for key, value in study["system_attrs"].items():
        storage.database.set_study_system_attr(number, key, value)
    for trial in study["trials"]:
        storage.create_trial(number, _frozen(trial))
    return number


def _swap(storage: Storage, study: Mapping[str, Any], copy: int) -> int | None:
    """Move title and record from the old study, if there is one, to the copy; returns Optuna's id of the old."""
    title, record = study["title"], json.dumps(study["user_attrs"][STUDY])
    with storage.database.engine.begin() as connection:
        before = connection.execute(
            text("SELECT study_id FROM studies WHERE study_name = :title"), {"title": title}
        ).scalar()
        if before is not None:
            temporary = f"{_TEMPORARY}{title} {uuid.uuid4().hex}"
            connection.execute(
                text("UPDATE studies SET study_name = :name WHERE study_id = :id"), {"name": temporary, "id": before}
            )
            connection.execute(
                text("DELETE FROM study_user_attributes WHERE study_id = :id AND key = :key"),
                {"id": before, "key": STUDY},
            )
        connection.execute(
            text("UPDATE studies SET study_name = :title WHERE study_id = :id"), {"title": title, "id": copy}
        )
        connection.execute(
            text("INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (:id, :key, :record)"),
            {"id": copy, "key": STUDY, "record": record},
        )
    return int(before) if before is not None else None
