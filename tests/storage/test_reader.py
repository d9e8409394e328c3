"""Looking says what Optuna says, and leaves no trace."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from formula import run_all, train
from hpo.errors import StoreError
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import ask_to_stop, open_study, reap
from hpo.storage import reader
from hpo.storage.liveness import holders
from hpo.storage.reader import read_snapshots, read_study


def test_looking_says_what_optuna_says(home, make_spec):
    study = open_study(home, make_spec(pruner="median", trials=12), data_digest="d")
    run_all(study, budget=6, epochs=4)
    first = study.ask(budget=12, worker="w")
    study.tell(TrialResult(first.number, TrialState.STOPPED, reason="interrupted"))
    train(study, study.ask(budget=12, worker="w"))
    study.ask(budget=12, worker="w")
    other = open_study(home, make_spec(name="other", final={"seeds": 2}), data_digest="d")
    run_all(other, budget=3)
    other.enqueue_finals([(other.result().best.candidate.parameters, 1)])
    train(other, other.ask_final(worker="w"), worth=lambda _: 99.0)
    known = [study.result(), other.result()]
    assert [one.study for one in read_snapshots(home)] == known
    assert [one.best for one in read_snapshots(home)] == [result.best for result in known]
    brief = read_snapshots(home, results=False)
    assert [one.best for one in brief] == [result.best for result in known]
    assert [[t.state for t in one.study.trials] for one in brief] == [[t.state for t in r.trials] for r in known]
    study.close()
    other.close()


def test_a_trial_that_ends_while_it_is_read_is_not_complete_without_its_result(home, make_spec, monkeypatch):
    study = open_study(home, make_spec(), data_digest="d")
    running, read = [study.ask(budget=9, worker="w")], reader._attributes

    def read_and_end(*arguments, **options):
        found = read(*arguments, **options)
        if running:
            train(study, running.pop())
        return found

    monkeypatch.setattr(reader, "_attributes", read_and_end)
    (during,), (after,) = (read_study(home, "study").trials for _ in range(2))
    assert (during.state, after.state) == (TrialState.RUNNING, TrialState.COMPLETE)
    assert after.result is not None
    study.close()


def test_the_living_and_the_dead_are_told_apart(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    candidate = study.ask(budget=9, worker="w")
    (one,) = read_snapshots(home)
    assert [holder.title for holder in one.holders] == ["study"]
    assert [trial.number for trial in one.running] == [candidate.number]
    assert not one.abandoned
    study.close()
    (one,) = read_snapshots(home)
    assert not one.holders
    assert one.abandoned == (candidate.number,)
    assert reap(home, "study") == [candidate.number]
    (one,) = read_snapshots(home)
    assert not one.abandoned
    assert not holders(home.locks)


def test_a_stop_reaches_who_has_the_study_open_and_nobody_later(home, make_spec):
    first = open_study(home, make_spec(), data_digest="d")
    second = open_study(home, make_spec(), data_digest="d")
    assert not first.stop_asked()
    ask_to_stop(home, "study", "token")
    assert first.stop_asked()
    assert second.stop_asked()
    later = open_study(home, make_spec(), data_digest="d")
    assert not later.stop_asked()
    for study in (first, second, later):
        study.close()


def test_looking_where_nothing_is_makes_nothing(bare_home):
    assert read_snapshots(bare_home) == []
    assert not bare_home.root.exists()


def test_looking_waits_for_no_writer_and_no_lock(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    run_all(study, budget=2)
    study.close()
    with closing(sqlite3.connect(home.root / "optuna.db", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE trials SET number = number + 100")
        assert [trial.number for trial in read_snapshots(home)[0].study.trials] == [0, 1]
        writer.execute("ROLLBACK")


def test_a_file_that_is_no_database_is_told(home):
    home.create()
    (home.root / "optuna.db").write_text("a text that is no database " * 50)
    with pytest.raises(StoreError, match=r"optuna\.db: the database cannot be read"):
        read_snapshots(home)


def test_looking_loads_neither_optuna_nor_mlflow():
    code = "import sys, hpo.storage.reader, hpo.tracking.reader, hpo.jobs.doctor, hpo.jobs.clean, hpo.jobs.stop\n"
    code += "print([name for name in ('optuna', 'mlflow', 'torch', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
