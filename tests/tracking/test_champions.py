from __future__ import annotations

from pathlib import Path

import pytest

import tiny_study as tiny
from hpo.home import Home
from hpo.tracking.registry import champions, record_champion
from hpo.tracking.tracker import Tracker


@pytest.fixture
def registered(home: Home, tracker: Tracker, folder: Path) -> Home:
    tracker.start_trial(tiny.candidate(0), tiny.spec().with_values(tiny.candidate(0).parameters), worker="w0")
    tracker.end_trial(tiny.result(0))
    tracker.keep_model(0, folder)
    tracker.register(tiny.study(), 0)
    return home


def test_champions_are_told_with_their_time_their_reason_and_who_chose_them(registered: Home) -> None:
    record_champion(registered, "tiny", 1, why="there was no champion before")
    record_champion(registered, "tiny", 4, why="slower, but needed", forced=True)
    record_champion(registered, "tiny", 4, why="again after a kill")
    first, second = champions(registered, "tiny")
    assert (first.version, first.why, first.forced) == (1, "there was no champion before", False)
    assert first.until == second.since > first.since
    assert (second.version, second.why, second.forced, second.until) == (4, "slower, but needed", True, None)
    assert first.who


def test_a_model_without_champions_has_no_history(registered: Home) -> None:
    assert champions(registered, "tiny") == champions(registered, "unknown") == []
