"""A study as plain data, out of one storage and into another: trials with all that Optuna knows of them."""

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

from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import StudyResult
from hpo.storage.errors import shown_url, store_errors
from hpo.storage.optuna_storage import Storage, generations, open_storage, to_trial
from hpo.storage.reader import RESULT, STUDY, look, no_study, to_result

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # as of spec.study.StudySpec
_ASIDE = "hpo import of "  # how Optuna's study is named while it is written; no study of ours has a blank in its name


class Standing(StrEnum):
    """How a storage stands to a study that is to come into it."""

    ABSENT = "absent"
    BEHIND = "behind"
    SAME = "same"
    AHEAD = "ahead"


def take(home: Home, name: str) -> dict[str, Any]:
    """A study, by name or title, as JSON types; see put. Trials are in the order of their numbers.

    Where a trial left files on its machine's disk is left out. Raises StoreError.
    """
    storage = open_storage(home)
    try:
        with store_errors(home):
            studies, known = storage.studies(), generations(storage, name)
            title = known[max(known)] if known else name.removesuffix("~1")
            if title not in studies:
                raise no_study(name, shown_url(home), studies)
            number = studies[title][0]
            return {
                "title": title,
                "directions": [way.name for way in storage.get_study_directions(number)],
                "user_attrs": storage.get_study_user_attrs(number),
                "system_attrs": storage.get_study_system_attrs(number),
                "trials": _trials(storage, number),
            }
    finally:
        storage.close()


def check(study: Mapping[str, Any]) -> StudyResult:
    """The record of a study as take gives it, without its trials, once all of it can be read.

    Raises ValueError, KeyError, TypeError or AttributeError where it cannot.
    """
    record = study["user_attrs"][STUDY]
    found = to_result(record, ())
    if not _NAME.fullmatch(found.name) or found.title != study["title"] or type(found.generation) is not int:
        raise ValueError(f"a study cannot be named {study['title']!r}")
    if not isinstance(found.created, float) or not all(isinstance(record[key], dict) for key in ("spec", "identity")):
        raise TypeError("the record of the study is of other types")
    directions = _directions(study)
    for number, trial in enumerate(study["trials"]):
        frozen = _frozen(trial)
        to_trial(frozen)  # reads our records on it
        ended = frozen.state.is_finished()
        if trial["number"] != number or (frozen.values is not None and len(frozen.values) != len(directions)):
            raise ValueError(f"trial {number} is not whole")
        if frozen.state is TrialState.RUNNING or ended != (frozen.datetime_complete is not None):
            raise ValueError(f"trial {number} has not ended")
    return found


def refuse_running(home: Home, title: str) -> None:
    """Raise StoreError while a living supervisor has the study of this title."""
    if any(one.study.title == title and one.holders for one in look(home, results=False)):
        raise StoreError(f"{title}: it is running, and cannot be moved now.", f"Stop it first: hpo stop {title}")


def standing(home: Home, study: Mapping[str, Any]) -> Standing:
    """How the storage stands to a study. Raises StoreError where it has another one of this title."""
    storage = open_storage(home)
    try:
        with store_errors(home):
            return _standing(home, storage, study)
    finally:
        storage.close()


def put(home: Home, study: Mapping[str, Any]) -> int:
    """Have the storage hold the study as it is here; returns how many trials are new in it.

    A copy is written beside what there is and takes its place in one transaction: whoever looks, and whoever comes
    after a kill, finds the study as before or the whole of this one. One that is the same already, or further on, is
    left alone. Raises StoreError where there is another study of this title, and where somebody runs it.
    """
    storage = open_storage(home)
    try:
        with store_errors(home):
            _sweep(storage, study["title"])
            if _standing(home, storage, study) in (Standing.SAME, Standing.AHEAD):
                return 0
            copy = _write(storage, study)
            with storage.locked("studies"):
                # Another import may have been faster.
                refuse_running(home, study["title"])
                late = _standing(home, storage, study) in (Standing.SAME, Standing.AHEAD)
                before = copy if late else _swap(storage, study, copy)
            known = len(storage.every_trial(before)) if before is not None else 0
            if before is not None:
                storage.delete_study(before)
            return len(study["trials"]) - known
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
    """A result without the folder of its files: a run deletes that folder, and this may be another machine's path."""
    result = attributes.get(RESULT)
    return {**attributes, **({RESULT: {**result, "folder": ""}} if result is not None else {})}


def _time(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat() if moment else None  # Optuna's are local


def _local(moment: str | None) -> datetime | None:
    return datetime.fromisoformat(moment).astimezone().replace(tzinfo=None) if moment else None


def _directions(study: Mapping[str, Any]) -> list[StudyDirection]:
    return [StudyDirection[way] for way in study["directions"]]


def _standing(home: Home, storage: Storage, study: Mapping[str, Any]) -> Standing:
    title, record = study["title"], study["user_attrs"][STUDY]
    number, known = storage.studies().get(title, (None, None))
    if number is None or known is None:
        return Standing.ABSENT
    elsewhere = "Import it into a folder, or stores, of its own: --home DIR."
    if (known["created"], known["identity"]) != (record["created"], record["identity"]):
        raise StoreError(f"{shown_url(home)}: it has another study that is named {title}.", elsewhere)
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
            f"{shown_url(home)}: {title} has gone on here and where it comes from, each time otherwise: see trial "
            f"{number}.",
            elsewhere,
        )
    if _same(here, there):
        return Standing.SAME
    return Standing.AHEAD if ours > theirs or (ours == theirs and len(here) > len(there)) else Standing.BEHIND


def _same(here: object, there: object) -> bool:
    # Through JSON, which has no tuples and no numbers as keys; NaN is not itself.
    return json.dumps(here, sort_keys=True) == json.dumps(there, sort_keys=True)


def _ended(trial: Mapping[str, Any]) -> bool:
    return bool(TrialState[trial["state"]].is_finished())


def _sweep(storage: Storage, title: str) -> None:
    """Delete what killed imports of this study left."""
    for each in storage.get_all_studies():
        if each.study_name.startswith(f"{_ASIDE}{title} "):
            with suppress(KeyError):  # another import does the same
                storage.delete_study(each._study_id)


def _write(storage: Storage, study: Mapping[str, Any]) -> int:
    """Write the study under a name of its own and without our record, so that nobody takes it for one of ours."""
    name = f"{_ASIDE}{study['title']} {uuid.uuid4().hex}"
    number: int = storage.create_new_study(_directions(study), name)
    for key, value in study["user_attrs"].items():
        if key != STUDY:
            storage.set_study_user_attr(number, key, value)
    for key, value in study["system_attrs"].items():
        storage.set_study_system_attr(number, key, value)
    for trial in study["trials"]:
        storage.create_new_trial(number, _frozen(trial))
    return number


def _swap(storage: Storage, study: Mapping[str, Any], copy: int) -> int | None:
    """Give the copy its name and our record, and take both from what had them; returns Optuna's id of that."""
    title, record = study["title"], json.dumps(study["user_attrs"][STUDY])
    with storage._backend.engine.begin() as connection:
        found = connection.execute(
            text("SELECT study_id FROM studies WHERE study_name = :title"), {"title": title}
        ).scalar()
        if found is not None:
            aside = f"{_ASIDE}{title} {uuid.uuid4().hex}"
            connection.execute(
                text("UPDATE studies SET study_name = :aside WHERE study_id = :id"), {"aside": aside, "id": found}
            )
            connection.execute(
                text("DELETE FROM study_user_attributes WHERE study_id = :id AND key = :key"),
                {"id": found, "key": STUDY},
            )
        connection.execute(
            text("UPDATE studies SET study_name = :title WHERE study_id = :id"), {"title": title, "id": copy}
        )
        connection.execute(
            text("INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (:id, :key, :record)"),
            {"id": copy, "key": STUDY, "record": record},
        )
    return int(found) if found is not None else None
