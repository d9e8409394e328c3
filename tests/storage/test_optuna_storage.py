from __future__ import annotations

import os
import sqlite3
from dataclasses import replace

import optuna
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from formula import train
from hpo.errors import StoreError
from hpo.search.lifecycle import open_study
from hpo.storage import optuna_storage, retry
from hpo.storage.reader import read_snapshots, read_study


def test_reading_asks_as_many_queries_for_many_trials_as_for_few(home, make_spec):
    def queries():
        seen = []
        event.listen(Engine, "before_cursor_execute", listener := lambda *args: seen.append(args[2]))
        read_study(home, "study")
        event.remove(Engine, "before_cursor_execute", listener)
        return len(seen)

    study = open_study(home, make_spec(), data_digest="d")
    train(study, study.ask(budget=20, worker="w"), epochs=1)
    few = queries()
    while candidate := study.ask(budget=20, worker="w"):
        train(study, candidate, epochs=1)
    assert queries() == few
    study.close()


def test_trial_added_through_optuna_itself_is_run_and_read(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    plain = optuna.load_study(study_name="study", storage=home.storage_url)
    plain.enqueue_trial({"training.optimizer.lr": 0.05})
    candidate = study.ask(budget=5, worker="w")
    train(study, candidate)
    assert candidate.parameters["training.optimizer.lr"] == 0.05
    assert study.ask(budget=5, worker="w").ordinal == 1
    study.close()


def test_reading_where_nothing_ran_makes_no_files_and_says_what_to_run(bare_home):
    with pytest.raises(StoreError, match="no study 'digits-mlp'") as caught:
        read_study(bare_home, "digits-mlp")
    assert "hpo run digits-mlp" in caught.value.hint
    assert read_snapshots(bare_home) == []
    assert not bare_home.root.exists()


def test_absent_study_error_names_those_there_are(home, make_spec):
    open_study(home, make_spec(), data_digest="d").close()
    with pytest.raises(StoreError, match=r"known: study\)"):
        read_study(home, "studi")
    assert [found.study.title for found in read_snapshots(home)] == ["study"]


def test_file_that_is_no_database_is_one_clear_error(home, make_spec):
    home.create()
    (home.root / "optuna.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match=r"optuna\.db.*not a database") as caught:
        open_study(home, make_spec(), data_digest="d")
    assert "move it away" in caught.value.hint


def test_storage_of_another_optuna_is_one_clear_error(home, make_spec):
    open_study(home, make_spec(), data_digest="d").close()
    with sqlite3.connect(home.root / "optuna.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'v0.9.0.a'")
    with pytest.raises(StoreError, match="no longer compatible") as caught:
        open_study(home, make_spec(), data_digest="d")
    assert "hpo store upgrade" in caught.value.hint


def test_database_kept_busy_by_another_program_is_one_clear_error(home, make_spec, monkeypatch):
    monkeypatch.setattr(optuna_storage, "_BUSY_SECONDS", 0.05)
    monkeypatch.setattr(retry, "RETRY_SECONDS", 1.0)
    study = open_study(home, make_spec(), data_digest="d")
    candidate = study.ask(budget=2, worker="w")
    other = sqlite3.connect(home.root / "optuna.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked") as caught:
        study.report(candidate.number, 1, 0.5)
    other.execute("ROLLBACK")
    assert "keeps the database busy" in caught.value.hint
    assert study.report(candidate.number, 1, 0.5) is False
    study.close()
    other.close()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder_is_one_clear_error(home, make_spec):
    open_study(home, make_spec(), data_digest="d").close()
    (home.root / "optuna.db").chmod(0o400)
    with pytest.raises(StoreError, match="readonly"):
        open_study(home, make_spec(), data_digest="d")


def test_password_of_a_storage_address_is_not_shown(home, make_spec):
    server = replace(home, storage_url="postgresql+nodriver://me:secret@127.0.0.1:1/studies")
    with pytest.raises(StoreError) as caught:
        open_study(server, make_spec(), data_digest="d")
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" in str(caught.value)


def test_optuna_and_mlflow_on_one_database_are_refused(home, make_spec):
    with pytest.raises(StoreError, match="one database"):
        open_study(replace(home, tracking_uri=home.storage_url), make_spec(), data_digest="d")
