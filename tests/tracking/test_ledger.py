from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_study as tiny
from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import ModelVersion, StudyResult
from hpo.tracking.ledger import (
    Opening,
    announce_opening,
    complete_opening,
    count_set_aside,
    every_opening,
    image_digests,
    name_images,
    openings,
    set_damaged_aside,
    set_digest,
)
from hpo.tracking.tracker import Tracker

MODEL = ModelVersion("tiny", 2, ("challenger",), "run", "models:/tiny/2", "tiny", 5)


def announce(home: Home, study: StudyResult | None = None) -> Opening:
    return announce_opening(home, study or tiny.study(), model=MODEL, trial=5, purpose="promote")


def look(home: Home) -> Opening:
    return complete_opening(home, tiny.study(), announce(home), {"test_accuracy": 0.9})


def test_half_a_line_of_a_killed_writer_hides_no_other_opening(home: Home, tracker: Tracker) -> None:
    file = home.root / "openings.jsonl"
    first = look(home)
    with file.open("a") as ledger:
        ledger.write('{"when": "2026-')
    tracker._client.delete_run(tracker._parent.info.run_id)
    second = look(home)
    assert openings(home, tiny.study()) == [first, second]


def test_lines_of_an_earlier_version_are_read(home: Home) -> None:
    old = {"when": "2026-01-01T00:00:00", "who": "a", "study": "tiny", "created": 1.7e9, "model": "tiny", "version": 1}
    (home.root / "openings.jsonl").write_text(json.dumps({**old, "trial": 3, "scores": {"test_accuracy": 0.8}}) + "\n")
    (opening,) = openings(home, tiny.study())
    assert (opening.trial, opening.purpose, opening.scores) == (3, "", {"test_accuracy": 0.8})


def test_generations_have_openings_of_their_own(home: Home, tracker: Tracker) -> None:
    announce(home)
    assert openings(home, tiny.study(generation=2)) == []


DIGESTS = [bytes([number]) * 16 for number in (3, 1, 2)]


def test_another_home_finds_an_opening_in_the_cache(home: Home, tracker: Tracker, tmp_path: Path) -> None:
    cache, study = tmp_path / "cache", tiny.study()
    opening = announce_opening(home, study, model=MODEL, trial=5, purpose="promote", cache=cache)
    named = name_images(home, study, opening, DIGESTS, cache=cache)
    complete = complete_opening(home, study, named, {"test_accuracy": 0.9}, cache=cache)
    assert complete.images == set_digest(reversed(DIGESTS))
    assert every_opening(home, cache=cache) == ([complete], [])
    other = Home.at(tmp_path / "other")
    assert every_opening(other, cache=cache) == ([], [complete])
    assert image_digests(other, complete.images, cache=cache) == set(DIGESTS)


def test_the_store_has_the_images_of_an_opening_where_the_files_are_lost(home: Home, tracker: Tracker) -> None:
    named = name_images(home, tiny.study(), announce(home), DIGESTS)
    for file in (home.root / "test_images").iterdir():
        file.unlink()
    assert image_digests(home, named.images) == set(DIGESTS)
    assert image_digests(home, set_digest([])) is None


DAMAGED = {
    "keys": (b'{"when": "2026-01-01T00:00:00"}', "lacks who"),
    "types": (b'{"when": 1, "who": "a", "study": "tiny", "created": 1.0, "model": "m"}', "has another when"),
    "no object": (b"[]", "is not a JSON object"),
    "no JSON": (b'{"when": "2026", nothing}', "is not JSON in UTF-8"),
    "bytes": (b"\xff\xfe\x00", "is not JSON in UTF-8"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_is_one_error_and_is_moved_aside_only_on_demand(home: Home, tracker: Tracker, kind: str) -> None:
    line, reason = DAMAGED[kind]
    first, file = look(home), home.root / "openings.jsonl"
    with file.open("ab") as ledger:
        ledger.write(line + b"\n")
    before = file.read_bytes()
    for read in (lambda: openings(home, tiny.study()), lambda: announce(home)):
        with pytest.raises(StoreError, match=f"openings.jsonl: line 3 is damaged: it {reason}") as raised:
            read()
        assert "hpo doctor --fix" in str(raised.value.hint)
    assert file.read_bytes() == before
    aside = set_damaged_aside(file, lock_file=home.locks / "openings.lock")
    (note,) = map(json.loads, aside.read_text().splitlines())
    assert (note["line"], note["text"].encode("latin-1")) == (3, line)
    assert (openings(home, tiny.study()), count_set_aside(home.root)) == ([first], 1)


def test_an_opening_is_named_after_its_announcement(home: Home, tracker: Tracker) -> None:
    announced = announce(home)
    named = name_images(home, tiny.study(), announced, DIGESTS)
    assert (announced.images, replace(named, images="")) == ("", announced)
    assert openings(home, tiny.study()) == [named]
