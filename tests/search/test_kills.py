"""Supervisors that are killed for real, at any moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from formula import FINITE, FINITE_CELLS, run_all, sequence, train
from hpo.database import server_address
from hpo.records import FINAL, TrialResult, TrialState
from hpo.search import results
from hpo.search.lifecycle import open_study
from hpo.storage.reader import read_study
from hpo.storage.trial_attrs import key_of
from staged import STAGES, worth

FORK = multiprocessing.get_context("fork")


def _supervise(home, spec, seed) -> None:
    """One supervisor: most trainings end, some fail, some are stopped; at the end the finals."""
    chance = random.Random(seed)  # noqa: S311
    study = open_study(home, spec, data_digest="d")
    study.reap()
    while True:
        if candidate := study.ask(budget=1000, worker="w"):
            time.sleep(chance.uniform(0, 0.02))
            state = chance.choice([TrialState.COMPLETE] * 6 + [TrialState.FAILED, TrialState.STOPPED])
            study.tell(TrialResult(candidate.number, state, 0.5 if state is TrialState.COMPLETE else None))
        elif study.blocked:
            time.sleep(0.02)
            study.reap()
        else:
            os._exit(0)


def _search(home, spec) -> None:
    """A staged search by one supervisor, and its finals."""
    study = open_study(home, spec, data_digest="d")
    study.reap()
    run_all(study, worth=worth)
    study.enqueue_finals([(study.result().best.candidate.parameters, seed) for seed in (1, 2, 3)])
    while candidate := study.ask_final(worker="w"):
        train(study, candidate, epochs=2, worth=worth)
    os._exit(0)


def _kill_often(target, home, spec, *, crowd, rounds, longest):
    chance = random.Random(0)  # noqa: S311
    for turn in range(rounds):
        victims = [FORK.Process(target=target, args=(home, spec, *extra)) for extra in _extras(crowd, turn)]
        for victim in victims:
            victim.start()
        for victim in victims:
            time.sleep(chance.uniform(0.1, longest))
            os.kill(victim.pid, signal.SIGKILL)
        for victim in victims:
            victim.join()
    last = [FORK.Process(target=target, args=(home, spec, *extra)) for extra in _extras(crowd, rounds)]
    for process in last:
        process.start()
    for process in last:
        process.join()
    assert [process.exitcode for process in last] == [0] * len(last)


def _extras(crowd, turn):
    return [(100 * turn + place,) for place in range(crowd)] if crowd > 1 else [()]


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, home):
    """A home whose studies are in a file, or on a server."""
    if request.param == "sqlite":
        return home
    return replace(home, storage_url=server_address(request.getfixturevalue("database")))


@pytest.mark.slow
@pytest.mark.parametrize("staged", [False, True])
def test_grid_under_kills_stops_and_failures_covers_every_cell_exactly_once(place, make_spec, staged, monkeypatch):
    # On a slow machine one candidate may meet three kills before it is drawn; that it is then failed has its own test.
    monkeypatch.setattr(results, "_MOST_DEATHS", 100)
    drops = {"model.dropout": {"float": [0, 0.4], "step": 0.1}}
    stages = [{"name": "first", "space": FINITE, "carry": 2}, {"name": "second", "space": drops}]
    spec = make_spec(space={}, stages=stages) if staged else make_spec("grid", space=FINITE)
    _kill_often(_supervise, place, spec, crowd=2, rounds=4, longest=0.5)
    result = read_study(place, "study")
    assert result.count(TrialState.RUNNING, TrialState.WAITING) == 0
    done = [trial for trial in result.trials if trial.state.finished]
    cells = [(trial.candidate.stage, key_of(trial.candidate.parameters)) for trial in done]
    assert len(cells) == len(set(cells)) == FINITE_CELLS + (2 * 5 if staged else 0)
    assert sorted(trial.candidate.ordinal for trial in done) == list(range(len(cells)))
    # The failed ones are run again on request, and nothing else is.
    failed = {trial.candidate.ordinal for trial in done if trial.state is TrialState.FAILED}
    study = open_study(place, spec, data_digest="d")
    assert study.retry_failed() == len(failed)
    again = set()
    while candidate := study.ask(budget=1000, worker="w"):
        again.add(candidate.ordinal)
        study.tell(TrialResult(candidate.number, TrialState.COMPLETE, 0.5))
    assert again == failed
    assert len(study.result().counted) == len(cells)
    study.close()


@pytest.mark.slow
def test_staged_search_killed_anywhere_ends_as_an_unbroken_one(home, make_spec, monkeypatch):
    # On a slow machine one trial may see three kills or more; who is given up for that is another test's.
    monkeypatch.setattr(results, "_MOST_DEATHS", 100)
    spec = make_spec("tpe", space={}, stages=STAGES)
    whole = open_study(home, spec, data_digest="d")
    run_all(whole, worth=worth)
    expected = whole.result()
    whole.close()
    other = replace(home, root=home.root / "b", storage_url=f"sqlite:///{home.root / 'b' / 'optuna.db'}")
    _kill_often(_search, other, spec, crowd=1, rounds=7, longest=0.6)
    result = read_study(other, "study")
    assert sequence(result) == sequence(expected)
    for stage in STAGES:
        winners = [found.ranked(stage["name"])[0].candidate.parameters for found in (result, expected)]
        assert winners[0] == winners[1]
    finals = [trial.candidate for trial in result.trials if trial.candidate.stage == FINAL and trial.state.finished]
    # One that was killed is tried again after the others.
    assert [one.seed for one in sorted(finals, key=lambda one: one.ordinal)] == [1, 2, 3]
    assert {key_of(one.parameters) for one in finals} == {key_of(expected.best.candidate.parameters)}


def _search_and_note(home, spec, budget, log: Path) -> None:
    study = open_study(home, spec, data_digest="d")
    study.reap()
    with log.open("a") as told:
        while candidate := study.ask(budget=budget, worker="w"):
            result = train(study, candidate, epochs=3)
            told.write(f"{result.number} {result.value!r}\n")
            told.flush()
    os._exit(0)


@pytest.mark.slow
def test_kills_at_any_moment_lose_no_finished_trial_and_leave_none_running(home, make_spec, tmp_path):
    spec, log, budget = make_spec("tpe"), tmp_path / "log", 40
    chance = random.Random(0)  # noqa: S311
    for _ in range(6):
        victim = FORK.Process(target=_search_and_note, args=(home, spec, budget, log))
        victim.start()
        time.sleep(chance.uniform(0.2, 0.8))
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        study = open_study(home, spec, data_digest="d")
        study.reap()
        result, counted = study.result(), study.counted()
        study.close()
        told = dict(line.split() for line in log.read_text().splitlines()) if log.exists() else {}
        kept = {str(trial.number): repr(trial.value) for trial in result.trials if trial.state.finished}
        assert told.items() <= kept.items()
        assert result.count(TrialState.RUNNING) == 0
        assert counted == len({trial.candidate.ordinal for trial in result.trials}) <= budget
    last = FORK.Process(target=_search_and_note, args=(home, spec, budget, log))
    last.start()
    last.join()
    finished = [trial for trial in read_study(home, "study").trials if trial.state.finished]
    assert sorted(trial.candidate.ordinal for trial in finished) == list(range(budget))
