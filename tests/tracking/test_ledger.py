from __future__ import annotations

import json

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
