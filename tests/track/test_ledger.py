from __future__ import annotations

import json

import pytest
import tiny_study as tiny

from hpo.home import Home
from hpo.records import ModelVersion
from hpo.track.ledger import openings, record_opening
from hpo.track.tracker import Tracker

MODEL = ModelVersion("tiny", 2, ("challenger",), "run", "models:/tiny/2", "tiny", 5)


def test_every_opening_is_written_down_in_order(home: Home, tracker: Tracker) -> None:
    assert openings(home, tiny.study()) == []
    first = record_opening(home, tiny.study(), model=MODEL, scores={"test_accuracy": 0.9})
    second = record_opening(home, tiny.study(), model=MODEL, scores={"test_accuracy": 0.9})
    assert openings(home, tiny.study()) == [first, second]
    lines = (home.root / "openings.jsonl").read_text().splitlines()
    assert [json.loads(line)["scores"] for line in lines] == [{"test_accuracy": 0.9}] * 2
    assert first.who
    assert first.when < second.when


@pytest.mark.parametrize("lost", ["the file", "the run"])
def test_an_opening_is_not_forgotten_when_one_record_of_it_is_lost(home: Home, tracker: Tracker, lost: str) -> None:
    opening = record_opening(home, tiny.study(), model=MODEL, scores={})
    if lost == "the file":
        (home.root / "openings.jsonl").unlink()
    else:
        tracker._client.delete_run(tracker._parent.info.run_id)
    assert openings(home, tiny.study()) == [opening]


def test_generations_have_openings_of_their_own(home: Home, tracker: Tracker) -> None:
    record_opening(home, tiny.study(), model=MODEL, scores={})
    assert openings(home, tiny.study(generation=2)) == []
