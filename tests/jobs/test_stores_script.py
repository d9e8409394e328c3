"""The recipe of docs/deploy: PostgreSQL and MLflow, started by the script, used by a run and a worker."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from hpo.home import Home
from hpo.records import TrialState
from hpo.storage.reader import list_trials
from hpo.tracking.registry import versions

DEPLOY = Path(__file__).parents[2] / "docs" / "deploy"


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_script_starts_stores_that_a_run_and_a_worker_share(tmp_path, monkeypatch):
    # PostgreSQL runs as another user where the tests run as root, and must reach its folder: not so in pytest's.
    stores = Path(tempfile.mkdtemp())
    ports = {"HPO_PGPORT": _free_port(), "HPO_MLFLOW_PORT": _free_port()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {**os.environ, **ports, "PATH": path}
    script = [str(DEPLOY / "stores.sh")]

    def control(action: str) -> str:
        command = ["bash", *script, action, str(stores)]
        return subprocess.run(command, env=settings, check=True, capture_output=True, text=True).stdout

    try:
        told = control("start")
        assert (stores / "password").read_text().strip() not in told
        assert (stores / "password").stat().st_mode & 0o077 == 0
        assert control("status").count(" runs") == 2
        lines = [line.strip() for line in told.splitlines() if line.startswith("    ")]
        for machine in ("one", "two"):
            (tmp_path / machine).mkdir()
            (tmp_path / machine / "hpo.toml").write_text("\n".join(lines[:2]))
        word = (stores / "password").read_text().strip()
        (tmp_path / "pgpass").write_text(lines[2].replace("PASSWORD", word) + "\n")
        (tmp_path / "pgpass").chmod(0o600)
        monkeypatch.setenv("PGPASSFILE", str(tmp_path / "pgpass"))
        for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI"):
            monkeypatch.delenv(name, raising=False)
        hpo = [sys.executable, "-m", "hpo"]
        quick = ["--trials", "8", "--workers", "1", "--set", "training.epochs=3", "--home", str(tmp_path / "one")]
        run = subprocess.Popen([*hpo, "run", "digits-mlp", *quick], stdout=subprocess.DEVNULL)
        place = Home.find(tmp_path / "two")
        while run.poll() is None:
            joined = subprocess.run(
                [*hpo, "worker", "digits-mlp", "--workers", "1", "--home", str(tmp_path / "two")], capture_output=True
            )
            if joined.returncode == 0:
                break
        assert run.wait() == 0
        trials = list_trials(place, "digits-mlp").trials
        assert len(trials) == 8
        assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
        assert len(versions(place, "digits-mlp")) == 1
        assert b"True" in subprocess.run(
            [*hpo, "store", "status", "--json", "--home", str(tmp_path / "two")], capture_output=True, check=True
        ).stdout.replace(b'"ok"', b"True")
    finally:
        control("stop")
    ended = subprocess.run(["bash", *script, "status", str(stores)], env=settings, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.count("does not run")) == (1, 2)
    shutil.rmtree(stores)


def test_compose_file_gives_each_store_a_database_and_no_password():
    text = (DEPLOY / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"postgres", "mlflow"}
    assert services["postgres"]["environment"]["POSTGRES_DB"] == "hpo"
    assert any("hpo@postgres:5432/mlflow" in word for word in services["mlflow"]["command"])
    assert services["mlflow"]["environment"]["PGPASSWORD"] == "${HPO_PASSWORD}"


def test_compose_file_has_the_versions_that_are_tested():
    pinned = (DEPLOY.parents[1] / "constraints.txt").read_text().splitlines()
    text = (DEPLOY / "compose.yaml").read_text()
    assert next(line for line in pinned if line.startswith("mlflow==")) in text
    version = next(line for line in pinned if line.startswith("psycopg==")).partition("==")[2]
    assert f"psycopg[binary]=={version}" in text
