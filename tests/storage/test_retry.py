"""A study storage that is busy, away or full."""

from __future__ import annotations

import json
import sqlite3
import threading
import time

import pytest
from sqlalchemy.exc import OperationalError

from formula import objective
from hpo.errors import StoreError
from hpo.records import Epoch, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.storage import optuna_storage, outbox, retry


@pytest.fixture
def study(home, make_spec, monkeypatch):
    monkeypatch.setattr(optuna_storage, "_BUSY_SECONDS", 0.05)
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.5)
    opened = open_study(home, make_spec(), data_digest="d")
    yield opened
    opened.close()


def _complete(candidate):
    epochs = (Epoch(1, {"valid_accuracy": 0.5, "train_loss": float("nan")}, 0.1, 0.1),)
    value = objective(candidate.parameters)
    return TrialResult(candidate.number, TrialState.COMPLETE, value, 1, epochs, {"valid_accuracy": 0.5}, ended=1.7e9)


def _hold(home) -> sqlite3.Connection:
    """Keep every other writer out."""
    connection = sqlite3.connect(home.root / "optuna.db", check_same_thread=False)
    connection.execute("BEGIN IMMEDIATE")
    return connection


def test_a_locked_database_is_waited_for(home, study, monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 30.0)
    candidate = study.ask(budget=5, worker="w")
    connection = _hold(home)
    threading.Timer(1.0, connection.rollback).start()
    started = time.monotonic()
    study.tell(_complete(candidate))
    assert time.monotonic() - started > 0.5
    assert study.result().trials[0].state is TrialState.COMPLETE


def test_a_result_that_cannot_be_told_is_told_by_the_next_run(home, study, make_spec):
    first, second = study.ask(budget=5, worker="w"), study.ask(budget=5, worker="w")
    connection = _hold(home)
    result = _complete(first)
    with pytest.raises(StoreError, match="locked"):
        study.tell(result)
    study.leave(TrialResult(second.number, TrialState.STOPPED, reason="the run ended"))
    connection.rollback()
    study.close()
    again = open_study(home, make_spec(), data_digest="d")
    assert sorted(again.reap()) == [0, 1]
    told, stopped, retry = again.result().trials
    assert told.state is TrialState.COMPLETE
    assert json.dumps(told.result.to_json()) == json.dumps(result.to_json())
    assert stopped.state is TrialState.STOPPED
    assert (retry.candidate.ordinal, retry.state) == (1, TrialState.WAITING)
    assert outbox.pending(home, "study") == {}
    assert again.reap() == []
    again.close()


def test_a_run_that_ended_for_want_of_storage_counts_as_no_death(home, make_spec):
    for _ in range(4):
        opened = open_study(home, make_spec(), data_digest="d")
        opened.reap()
        candidate = opened.ask(budget=1, worker="w")
        opened.leave(TrialResult(candidate.number, TrialState.STOPPED, reason="the run ended"))
        opened.close()
    opened = open_study(home, make_spec(), data_digest="d")
    opened.reap()
    states = [trial.state for trial in opened.result().trials]
    assert states == [TrialState.STOPPED] * 4 + [TrialState.WAITING]
    opened.close()


def test_half_a_result_is_none(home, study):
    folder = home.work / "study" / "3"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text('{"number": 3, "sta')
    assert outbox.pending(home, "study") == {}


class _Server:
    """A storage behind a server that restarts: the first calls find nobody."""

    def __init__(self, fault: Exception, times: int) -> None:
        self.fault, self.times, self.calls = fault, times, 0

    def read(self) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise OperationalError("SELECT 1", {}, self.fault)
        return 7


def test_a_server_that_restarts_is_waited_for(monkeypatch):
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.01)
    server = _Server(ConnectionError("server closed the connection unexpectedly"), times=3)
    assert retry.Retrying(server).read() == 7
    assert server.calls == 4


@pytest.mark.parametrize("text", ["database or disk is full", "attempt to write a readonly database"])
def test_a_fault_that_stays_is_told_at_once(text):
    server = _Server(sqlite3.OperationalError(text), times=9)
    with pytest.raises(OperationalError, match=text):
        retry.Retrying(server).read()
    assert server.calls == 1
