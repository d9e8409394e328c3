"""The ledger of the sealed test part: an opening is on disk, and on the study's run, before the first byte is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from hpo.home import Home
from hpo.locks import lock
from hpo.records import ModelVersion, StudyResult
from hpo.tracking.runs import find_parent, user
from hpo.tracking.store import connect, exists, translate_errors

_TAG = "hpo.test_opening."


@dataclass(frozen=True)
class Opening:
    """One opening of the test part: time (ISO 8601, UTC), user, version (0: not registered), trial, purpose.

    purpose is the command: promote, compare, evaluate. scores are what it showed; empty where the command was
    stopped before the result could be written, which counts all the same.
    """

    when: str
    who: str
    study: str
    created: float
    model: str
    version: int
    trial: int
    scores: Mapping[str, float] = field(default_factory=dict)
    purpose: str = ""


@translate_errors
def announce_opening(home: Home, study: StudyResult, *, model: ModelVersion, trial: int, purpose: str) -> Opening:
    """Record that the test part is about to be opened; complete_opening adds the result. Raises StoreError."""
    opening = Opening(
        when=datetime.now(UTC).isoformat(timespec="microseconds"),
        who=user(),
        study=study.title,
        created=study.created,
        model=model.name,
        version=model.version,
        trial=trial,
        purpose=purpose,
    )
    _write(home, study, opening)
    return opening


@translate_errors
def complete_opening(home: Home, study: StudyResult, opening: Opening, scores: Mapping[str, float]) -> Opening:
    """Record the scores of an announced opening. Raises StoreError."""
    complete = replace(opening, scores=dict(scores))
    _write(home, study, complete)
    return complete


@translate_errors
def openings(home: Home, study: StudyResult) -> list[Opening]:
    """The openings of a study's generation, oldest first, from this folder and, with a server, from elsewhere."""
    path = home.root / "openings.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if exists(home):
        parent = find_parent(connect(home), study)
        lines += [value for name, value in parent.data.tags.items() if name.startswith(_TAG)] if parent else []
    found: dict[tuple[str, str, int], Opening] = {}
    for opening in _parse(lines):
        if (opening.study, opening.created) == (study.title, study.created):
            key = opening.when, opening.who, opening.trial
            # The announcement and the result are one opening, written twice.
            if key not in found or opening.scores:
                found[key] = opening
    return sorted(found.values(), key=lambda opening: opening.when)


def add_openings(home: Home, known: Sequence[Opening]) -> None:
    """Record openings of another store that this folder's ledger lacks."""
    path = home.root / "openings.jsonl"
    with lock(home.create(), "openings"):
        there = list(_parse(path.read_text(encoding="utf-8").splitlines())) if path.is_file() else []
        for opening in known:
            if opening not in there:
                _append(path, json.dumps(asdict(opening)))


def _parse(lines: list[str]) -> Iterator[Opening]:
    known = {each.name for each in fields(Opening)}
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:
            # The writer died: of an announcement nothing was read yet, and a result was announced before.
            continue
        yield Opening(**{key: value for key, value in content.items() if key in known})


def _write(home: Home, study: StudyResult, opening: Opening) -> None:
    line = json.dumps(asdict(opening))
    path = home.root / "openings.jsonl"
    with lock(home.create(), "openings"):
        _append(path, line)
    client = connect(home)
    parent = find_parent(client, study)
    if parent is not None:
        # One tag an opening, so that two supervisors cannot overwrite each other's.
        client.set_tag(parent.info.run_id, _TAG + "".join(filter(str.isdigit, opening.when[:26])), line)


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{'' if _whole(path) else chr(10)}{line}\n")
        file.flush()
        os.fsync(file.fileno())


def _whole(path: Path) -> bool:
    """True if the last line is complete; a writer that was killed may have left half of one."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
