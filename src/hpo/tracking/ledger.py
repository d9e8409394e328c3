"""The ledger of the sealed test part: an opening is on disk, and on the study's run, before the first byte is read.

An opening names the set of test images by a digest of their pixel digests, so that it is found again under every study,
split and name. The ledger of a home is mlruns/openings.jsonl; a second one lies in the data cache (`cache`, a folder),
where other homes on the same data find it. The pixel digests of each set are in test_images/ of both, and of the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpo.errors import StoreError
from hpo.home import Home
from hpo.locks import lock, locked
from hpo.records import ModelVersion, StudyResult
from hpo.tracking.reader import Run, parent_runs, run_file, study_run
from hpo.tracking.runs import find_parent, user
from hpo.tracking.store import connect, translate_errors

LEDGER = "openings.jsonl"
SET_ASIDE = "openings.damaged.jsonl"
# A tag for each opening. MLflow's pages show no tags that begin with mlflow.; earlier versions wrote the second form.
TAG, _OLD_TAG = "mlflow.hpo.test_opening.", "hpo.test_opening."
_FOLDER = "test_images"
_DIGEST_BYTES = 16  # of one image


@dataclass(frozen=True)
class Opening:
    """One look at the test part: when (ISO 8601, UTC), who, for which version (0: not registered) and trial, what for.

    purpose is the command: promote, compare, evaluate. scores are what it showed; empty if the
    process was stopped before it could write the result, which counts all the same. data is the digest of the data set,
    images that of the set of test images, and trained that of the images that the model was trained and chosen on; all
    are "" in a ledger of an earlier version, the latter two also where the process was stopped before it had read them.
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
    data: str = ""
    images: str = ""
    trained: str = ""

    @property
    def key(self) -> tuple[str, float, str, str, int]:
        """The same for the announcement, the images and the result of one opening, in all ledgers."""
        return self.study, self.created, self.when, self.who, self.trial


@translate_errors
def announce_opening(
    home: Home, study: StudyResult, *, model: ModelVersion, trial: int, purpose: str, cache: Path | None = None
) -> Opening:
    """Write down that the test part is about to be opened; complete_opening adds the result.

    Raises StoreError, also for a ledger with a damaged line: then nothing is written, and nothing may be opened.
    """
    every_opening(home, cache=cache)
    opening = Opening(
        when=datetime.now(UTC).isoformat(timespec="microseconds"),
        who=user(),
        study=study.title,
        created=study.created,
        model=model.name,
        version=model.version,
        trial=trial,
        purpose=purpose,
        data=study.data_digest,
    )
    _write(home, study, opening, cache)
    return opening


@translate_errors
def name_images(
    home: Home,
    study: StudyResult,
    opening: Opening,
    digests: Collection[bytes],
    *,
    trained: Collection[bytes] = (),
    cache: Path | None = None,
) -> Opening:
    """Add the test images to an announced opening, and those that the model was trained and chosen on.

    They are pixel digests of 16 bytes, whose order is forgotten.
    """
    sets = {set_digest(digests): digests, **({set_digest(trained): trained} if trained else {})}
    for folder in filter(None, (home.root, _writable(cache))):
        for name, found in sets.items():
            file = _digest_file(folder, name)
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_name(f"{file.name}.{os.getpid()}.part")
                part.write_bytes(b"".join(sorted(found)))
                part.replace(file)
    named = replace(opening, images=set_digest(digests), trained=set_digest(trained) if trained else "")
    _write(home, study, named, cache)
    client = connect(home)
    parent = find_parent(client, study)
    if parent is not None:
        for name in sets:
            client.log_artifact(parent.info.run_id, str(_digest_file(home.root, name)), _FOLDER)
    return named


@translate_errors
def complete_opening(
    home: Home, study: StudyResult, opening: Opening, scores: Mapping[str, float], *, cache: Path | None = None
) -> Opening:
    """Write down what an announced opening showed. Raises StoreError."""
    complete = replace(opening, scores=dict(scores))
    _write(home, study, complete, cache)
    return complete


@translate_errors
def openings(home: Home, study: StudyResult) -> list[Opening]:
    """The openings of a study's generation, oldest first, from this folder and, with a server, from elsewhere.

    Raises StoreError, also for a damaged line, as all that read the ledger do.
    """
    found = [opening for _, opening in _read(home.root / LEDGER)]
    run = study_run(home, study)
    found += _tagged(run) if run is not None else []
    return [each for each in _merged(found) if (each.study, each.created) == (study.title, study.created)]


@translate_errors
def every_opening(home: Home, *, cache: Path | None = None) -> tuple[list[Opening], list[Opening]]:
    """The openings by all studies of the home and its store, oldest first, and those that only the cache knows."""
    found = [opening for _, opening in _read(home.root / LEDGER)]
    for run in parent_runs(home):
        found += _tagged(run)
    own = _merged(found)
    keys = {opening.key for opening in own}
    others = [opening for _, opening in _read(cache / LEDGER)] if cache else []
    return own, [opening for opening in _merged(others) if opening.key not in keys]


def openings_of_lost(home: Home, known: Collection[StudyResult]) -> list[Opening]:
    """The openings in the home's ledger by studies that are none of these: the study storage has lost them."""
    there = {(study.title, study.created) for study in known}
    found = _merged(what for _, what in _lines(home.root / LEDGER) if not isinstance(what, str))
    return [opening for opening in found if (opening.study, opening.created) not in there]


def add_openings(home: Home, known: Sequence[Opening]) -> None:
    """Write down openings of another store that this folder's ledger has not."""
    path = home.root / LEDGER
    with lock(home.create(), "openings"):
        there = [opening for _, opening in _read(path)]
        for opening in known:
            if opening not in there:
                _append(path, json.dumps(asdict(opening)))


def parse_opening(stored: Any) -> Opening:
    """The opening that a JSON value holds; fields of later versions are left out. Raises ValueError."""
    if not isinstance(stored, dict):
        raise ValueError("is not a JSON object")
    kinds = {"created": (int, float), "version": (int,), "trial": (int,), "scores": (dict,)}
    given: dict[str, Any] = {}
    for each in fields(Opening):
        if each.name not in stored:
            if each.name not in ("scores", "purpose", "data", "images", "trained"):
                raise ValueError(f"lacks {each.name}")
            continue
        value = stored[each.name]
        if not isinstance(value, kinds.get(each.name, (str,))) or isinstance(value, bool):
            raise ValueError(f"has another {each.name} than is ever written")
        given[each.name] = value
    if not all(isinstance(value, int | float) for value in given.get("scores", {}).values()):
        raise ValueError("has scores that are no numbers")
    try:
        datetime.fromisoformat(given["when"])
    except ValueError:
        raise ValueError("has no time") from None
    return Opening(**given)


def set_digest(digests: Iterable[bytes]) -> str:
    """sha256:... over the pixel digests of a set of images, whatever their order."""
    return f"sha256:{hashlib.sha256(b''.join(sorted(digests))).hexdigest()}"


@translate_errors
def image_digests(home: Home, images: str, *, cache: Path | None = None) -> frozenset[bytes] | None:
    """The pixel digests of a set of images that an opening names, from home, cache or store; None where none has it."""
    for folder in filter(None, (home.root, cache)):
        with contextlib.suppress(OSError):
            if (found := _pieces(_digest_file(folder, images).read_bytes(), images)) is not None:
                return found
    for run in parent_runs(home):
        if any(images in (opening.images, opening.trained) for opening in _tagged(run)):
            with tempfile.TemporaryDirectory() as scratch:
                name = f"{_FOLDER}/{_digest_file(home.root, images).name}"
                file = run_file(home, run, name, scratch)
                if file is not None and (found := _pieces(file.read_bytes(), images)) is not None:
                    return found
    return None


def damaged_lines(path: Path) -> dict[int, str]:
    """The lines of a ledger's file that are no opening, by number from 1, with the reason."""
    return {number: what for number, what in _lines(path) if isinstance(what, str)}


def set_damaged_aside(path: Path, *, lock_file: Path) -> Path:
    """Move the damaged lines of a ledger's file to openings.damaged.jsonl next to it, each with a note; returns it.

    The lines are in the note byte for byte, as Latin-1 text, before they leave the ledger.
    """
    aside = path.with_name(SET_ASIDE)
    with locked(lock_file):
        damaged = damaged_lines(path)
        lines = path.read_bytes().split(b"\n")
        for number, reason in damaged.items():
            note = {"moved": datetime.now(UTC).isoformat(timespec="seconds"), "line": number, "reason": reason}
            _append(aside, json.dumps({**note, "text": lines[number - 1].decode("latin-1")}))
        kept = [line for number, line in enumerate(lines, 1) if number not in damaged]
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(b"\n".join(kept))
        part.replace(path)
    return aside


def count_set_aside(folder: Path) -> int:
    """The number of damaged lines that were moved out of a folder's ledger: openings whose images nobody knows."""
    with contextlib.suppress(OSError):
        return (folder / SET_ASIDE).read_bytes().count(b"\n")
    return 0


def _tagged(run: Run) -> list[Opening]:
    found = []
    for name, what in _tag_openings(run.tags):
        if isinstance(what, str):
            raise StoreError(
                f"run {run.id} in MLflow: its tag {name} {what}, so an opening would go uncounted.",
                "Have it replaced from the ledger: hpo doctor --fix",
            )
        found.append(what)
    return found


def _tag_openings(tags: Mapping[str, str]) -> Iterator[tuple[str, Opening | str]]:
    """The name of each tag with an opening, and the opening, or the reason why it is none."""
    for name, value in tags.items():
        if name.startswith((TAG, _OLD_TAG)):
            try:
                yield name, parse_opening(json.loads(value))
            except (ValueError, RecursionError) as error:
                yield name, _reason(error)


def damaged_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags of a run that should be openings and are none, by name, with the reason."""
    return {name: what for name, what in _tag_openings(tags) if isinstance(what, str)}


@translate_errors
def mend_tags(home: Home, run_id: str, tags: Mapping[str, str]) -> None:
    """Move damaged tags of a run to openings.damaged.jsonl, and write those again that the home's ledger has."""
    client = connect(home)
    ledger = _merged(each for _, each in _read(home.root / LEDGER))
    known = {f"{start}{_digits(opening)}": opening for opening in ledger for start in (TAG, _OLD_TAG)}
    for name, reason in damaged_tags(tags).items():
        note = {"moved": datetime.now(UTC).isoformat(timespec="seconds"), "run": run_id, "tag": name, "reason": reason}
        if name in known:
            client.set_tag(run_id, name, json.dumps(asdict(known[name])))
            continue
        with lock(home, "openings"):
            _append(home.root / SET_ASIDE, json.dumps({**note, "text": tags[name]}))
        client.delete_tag(run_id, name)


def _digits(opening: Opening) -> str:
    return "".join(filter(str.isdigit, opening.when[:26]))


def _merged(found: Iterable[Opening]) -> list[Opening]:
    """One of each opening, the most complete, oldest first."""
    merged: dict[tuple[str, float, str, str, int], Opening] = {}
    for opening in found:
        known = merged.get(opening.key)
        if known is None or (bool(opening.scores), bool(opening.images)) > (bool(known.scores), bool(known.images)):
            merged[opening.key] = opening
    return sorted(merged.values(), key=lambda opening: opening.when)


def _read(path: Path) -> Iterator[tuple[int, Opening]]:
    for number, what in _lines(path):
        if isinstance(what, str):
            raise StoreError(
                f"{path}: line {number} {what}, so an opening of the test part would go uncounted.",
                "Repair the line, or have it moved to a file next to it: hpo doctor --fix",
            )
        yield number, what


def _lines(path: Path) -> Iterator[tuple[int, Opening | str]]:
    """The number of each line, with its opening, or with the reason why it is none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}.", "Make the file readable.") from None
    for number, line in enumerate(lines, 1):
        # The start of a line: its writer died over it, an announcement, before anything was read, or a result, whose
        # announcement is a line of its own.
        if line and not (line[:9] == b'{"when": '[: len(line)] and not line.rstrip().endswith(b"}")):
            try:
                yield number, parse_opening(json.loads(line.decode("utf-8")))
            except (ValueError, RecursionError) as error:
                yield number, _reason(error)


def _reason(error: Exception) -> str:
    known = type(error) is ValueError
    return f"is damaged: it {error}" if known else "is damaged: it is not JSON in UTF-8"


def _write(home: Home, study: StudyResult, opening: Opening, cache: Path | None) -> None:
    line = json.dumps(asdict(opening))
    with lock(home.create(), "openings"):
        _append(home.root / LEDGER, line)
    if (folder := _writable(cache)) is not None:
        with locked(folder / "openings.lock"):
            _append(folder / LEDGER, line)
    client = connect(home)
    parent = find_parent(client, study)
    if parent is not None:
        # One tag an opening, so that two supervisors cannot overwrite each other's.
        client.set_tag(parent.info.run_id, f"{TAG}{_digits(opening)}", line)


def _writable(cache: Path | None) -> Path | None:
    """The cache's folder, created; None where it cannot be written, as a cache that an administrator shares."""
    if cache is None:
        return None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError:
        return None
    return cache


def _digest_file(folder: Path, images: str) -> Path:
    return folder / _FOLDER / f"{Path(images.removeprefix('sha256:')).name}.digests"


def _pieces(content: bytes, images: str) -> frozenset[bytes] | None:
    """The digests in a file; None where it is damaged."""
    found = [content[start : start + _DIGEST_BYTES] for start in range(0, len(content), _DIGEST_BYTES)]
    return frozenset(found) if set_digest(found) == images else None


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{'' if _whole(path) else chr(10)}{line}\n")
        file.flush()
        os.fsync(file.fileno())


def _whole(path: Path) -> bool:
    """Whether the last line has its end; a writer that was killed may have left half of one."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
