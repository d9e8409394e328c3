"""Where studies and runs are kept: embedded files, PostgreSQL, a server; of this version, older, newer, away."""

from __future__ import annotations

import sqlite3

import pytest
from alembic import command
from sqlalchemy import text

from hpo.errors import StoreError
from hpo.home import Home
from hpo.jobs.stores import store_status, upgrade_stores
from hpo.storage.optuna_storage import open_storage
from hpo.tracking.store import connect, load_mlflow


@pytest.fixture(autouse=True)
def _no_addresses(monkeypatch):
    for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI", "HPO_HOME"):
        monkeypatch.delenv(name, raising=False)


def _age_studies(home: Home) -> None:
    """The tables as the Optuna before the last change of its schema made them: without an index of trials."""
    storage = open_storage(home)
    with storage.database.engine.begin() as connection:
        connection.execute(text("DROP INDEX ix_trials_study_id"))
        connection.execute(text("UPDATE alembic_version SET version_num = 'v3.0.0.d'"))
    storage.close()


def _age_runs(home: Home) -> None:
    """The tables as the MLflow before the last change of its schema made them."""
    load_mlflow()
    from mlflow.store.db.utils import _get_alembic_config, create_sqlalchemy_engine
    from mlflow.store.tracking.dbmodels.initial_models import Base

    engine = create_sqlalchemy_engine(home.tracking_uri)
    Base.metadata.create_all(engine)
    config = _get_alembic_config(home.tracking_uri)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "heads-1")
    engine.dispose()


def _states(place) -> list[str]:
    return [state.state for state in store_status(place)]


def test_looking_at_empty_stores_makes_none(tmp_path):
    assert _states(tmp_path) == ["new", "new"]
    assert list(tmp_path.iterdir()) == []


def test_stores_that_were_used_are_ok(tmp_path):
    home = Home.at(tmp_path).create()
    open_storage(home).close()
    connect(home)
    states = store_status(tmp_path)
    assert [(state.state, state.next) for state in states] == [("ok", ""), ("ok", "")]
    assert states[0].detail == "0 studies, 0 trials"
    assert all(state.well for state in states)


def test_old_files_are_copied_and_upgraded(tmp_path):
    home = Home.at(tmp_path).create()
    _age_studies(home)
    _age_runs(home)
    states = store_status(tmp_path)
    assert [(state.state, state.next) for state in states] == [("older", "hpo store upgrade")] * 2
    assert not all(state.well for state in states)
    with pytest.raises(StoreError) as error:
        open_storage(home)
    assert "hpo store upgrade" in error.value.hint
    assert len(upgrade_stores(tmp_path)) == 2
    assert _states(tmp_path) == ["ok", "ok"]
    assert len(list(home.root.glob("*.db.*"))) == 2
    assert upgrade_stores(tmp_path) == []


def test_old_database_of_a_server_is_upgraded_only_where_there_is_a_copy(tmp_path, database, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", database)
    _age_studies(Home.find(tmp_path))
    assert _states(tmp_path) == ["older", "new"]
    with pytest.raises(StoreError, match="cannot be undone"):
        upgrade_stores(tmp_path)
    (told,) = upgrade_stores(tmp_path, backed_up=True)
    assert "a-word-of-tests" not in told
    assert _states(tmp_path) == ["ok", "new"]


def test_store_of_a_newer_version_is_named_and_left_alone(tmp_path):
    home = Home.at(tmp_path).create()
    open_storage(home).close()
    with sqlite3.connect(home.root / "optuna.db") as found:
        found.execute("UPDATE alembic_version SET version_num = 'v99'")
    (state, _) = store_status(tmp_path)
    assert (state.state, state.next) == ("newer", "Install a newer optuna.")
    with pytest.raises(StoreError, match="newer than"):
        upgrade_stores(tmp_path)


def test_nothing_is_upgraded_under_a_living_run(tmp_path):
    from hpo.search.lifecycle import new_lease

    home = Home.at(tmp_path).create()
    lease = new_lease(home, "study")
    with pytest.raises(StoreError, match="has it open"):
        upgrade_stores(tmp_path)
    lease.close()
    assert upgrade_stores(tmp_path) == []


def test_stores_that_are_away_are_told_without_password(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", "postgresql://hpo:opensesame@127.0.0.1:1/hpo")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:opensesame@127.0.0.1:1")
    states = store_status(tmp_path)
    assert [state.state for state in states] == ["away", "away"]
    assert "opensesame" not in str(states)


def test_one_small_file_names_the_stores(tmp_path):
    (tmp_path / "hpo.toml").write_text('storage = "postgresql://hpo@db/hpo"\ntracking = "http://mlflow:5000"\n')
    home = Home.find(tmp_path)
    assert home.storage_url == "postgresql+psycopg://hpo@db/hpo"
    assert home.tracking_uri == "http://mlflow:5000"
    assert home.shared


def test_environment_goes_before_the_file(tmp_path, monkeypatch):
    (tmp_path / "hpo.toml").write_text('storage = "postgresql://hpo@db/hpo"\n')
    monkeypatch.setenv("HPO_STORAGE", "postgresql://hpo@other/hpo")
    assert Home.find(tmp_path).storage_url == "postgresql+psycopg://hpo@other/hpo"


@pytest.mark.parametrize("said", ["storage = ", 'stroage = "postgresql://hpo:opensesame@db/hpo"', "storage = 5"])
def test_file_that_says_something_else_is_refused_without_its_password(tmp_path, said):
    (tmp_path / "hpo.toml").write_text(said)
    with pytest.raises(StoreError, match=r"hpo\.toml") as error:
        Home.find(tmp_path)
    assert "opensesame" not in f"{error.value} {error.value.hint}"
