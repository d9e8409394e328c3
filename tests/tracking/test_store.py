from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpo.errors import StoreError
from hpo.home import Home
from hpo.tracking.store import connect, exists

_OPEN = """
import sys
from hpo.home import Home
from hpo.tracking.store import connect
print(connect(Home.find(sys.argv[1])).search_experiments()[0].name)
"""


def test_importing_the_room_imports_no_mlflow() -> None:
    rooms = "hpo.tracking.tracker, hpo.tracking.registry, hpo.tracking.ledger, hpo.tracking.ui, hpo.predict"
    code = f"import sys, {rooms}; sys.exit(not {{'mlflow', 'torch', 'optuna'}}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_processes_may_open_a_fresh_store_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = [sys.executable, "-c", _OPEN, str(tmp_path)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        for _ in range(3)
    ]
    answers = [process.communicate() for process in started]
    assert [output for output, _ in answers] == ["Default\n"] * 3, answers[0][1]
    assert not any(errors for _, errors in answers)  # migrations are not the user's business
    assert [path.name for path in tmp_path.iterdir()] == ["mlruns"]


def test_a_server_that_is_not_there_is_one_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:9: nothing answers there") as error:
        connect(Home.find(tmp_path))
    assert time.monotonic() - start < 15
    assert "unset MLFLOW_TRACKING_URI" in error.value.hint


def test_a_damaged_database_is_one_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home.find(tmp_path).create()
    (home.root / "mlflow.db").write_bytes(b"this is not a database, whatever its name says" * 50)
    with pytest.raises(StoreError, match=r"mlflow\.db: not a database"):
        connect(home)


def test_looking_makes_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpo.tracking.registry import versions

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home.find(tmp_path)
    assert versions(home) == []
    assert not exists(home)
    assert not list(tmp_path.iterdir())


def test_a_database_that_was_being_made_when_its_process_died_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home.find(tmp_path).create()
    (home.root / "mlflow.db.part").write_text("half")
    assert connect(home).search_experiments()
    assert not list(home.root.glob("*.part*"))


SIGNS = ["p%20q", "what?", *(pytest.param(name, marks=pytest.mark.slow) for name in ("a#b", "100%", "x&y=z?w"))]


@pytest.mark.parametrize("name", SIGNS)
def test_a_home_may_have_any_sign_in_its_name_and_nothing_is_written_beside_it(tmp_path: Path, name: str) -> None:
    from hpo.storage.optuna_storage import open_storage

    home = Home.at(tmp_path / name).create()
    client = connect(home)
    client.create_experiment("mine")
    open_storage(home).close()
    assert [one.name for one in client.search_experiments() if one.name == "mine"] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {"mlflow.db", "optuna.db"} <= {path.name for path in home.root.iterdir()}
