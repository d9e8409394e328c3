from __future__ import annotations

import json

import pytest

import tiny_study as tiny
from hpo.home import Home
from hpo.records import ModelVersion, StudyResult
from hpo.tracking.ledger import Opening, announce_opening, complete_opening, openings
from hpo.tracking.tracker import Tracker

MODEL = ModelVersion("tiny", 2, ("challenger",), "run", "models:/tiny/2", "tiny", 5)


def announce(home: Home, study: StudyResult | None = None) -> Opening:
    return announce_opening(home, study or tiny.study(), model=MODEL, trial=5, purpose="promote")


def look(home: Home) -> Opening:
    return complete_opening(home, tiny.study(), announce(home), {"test_accuracy": 0.9})


def test_every_opening_is_written_down_in_order_before_and_after(home: Home, tracker: Tracker) -> None:
    assert openings(home, tiny.study()) == []
    first, second = look(home), look(home)
    assert openings(home, tiny.study()) == [first, second]
    lines = (home.root / "openings.jsonl").read_text().splitlines()
    assert [json.loads(line)["scores"] for line in lines] == [{}, {"test_accuracy": 0.9}] * 2
    assert (first.who != "", first.purpose) == (True, "promote")
    assert first.when < second.when


def test_an_opening_that_was_killed_before_its_result_counts(home: Home, tracker: Tracker) -> None:
    killed = announce(home)
    assert openings(home, tiny.study()) == [killed]
    assert not killed.scores


@pytest.mark.parametrize("lost", ["the file", "the run"])
def test_an_opening_is_not_forgotten_when_one_record_of_it_is_lost(home: Home, tracker: Tracker, lost: str) -> None:
    opening = look(home)
    if lost == "the file":
        (home.root / "openings.jsonl").unlink()
    else:
        tracker._client.delete_run(tracker._parent.info.run_id)
    assert openings(home, tiny.study()) == [opening]


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
