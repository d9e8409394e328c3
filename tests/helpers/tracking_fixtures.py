from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tiny_study
from hpo.home import Home
from hpo.tracking.tracker import Tracker
from ports import free_port, wait_for


@pytest.fixture(scope="session")
def template(empty_stores: Path) -> Path:
    """An empty MLflow database: copying it takes a tenth of the time of making one."""
    return empty_stores / "mlruns" / "mlflow.db"


@pytest.fixture
def home(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home.find(tmp_path).create()
    shutil.copyfile(template, home.root / "mlflow.db")
    return home


@pytest.fixture
def tracker(home: Home) -> Tracker:
    """A tracker with an open study."""
    tracker = Tracker(home)
    tracker.open_study(tiny_study.study(), tiny_study.spec(), tiny_study.data(), tiny_study.split())
    return tracker


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_study.export_net(tmp_path_factory.mktemp("net"))


@pytest.fixture(scope="session")
def registered(template: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose home has one registered model, tiny/1@challenger of trial 0; for tests that only read."""
    folder = tmp_path_factory.mktemp("registered")
    home = Home.at(folder).create()
    shutil.copyfile(template, home.root / "mlflow.db")
    tracker = Tracker(home)
    tracker.open_study(tiny_study.study(), tiny_study.spec(), tiny_study.data(), tiny_study.split())
    candidate = tiny_study.candidate(0)
    tracker.start_trial(candidate, tiny_study.spec().with_values(candidate.parameters), worker="w0")
    tracker.end_trial(tiny_study.result(0))
    tracker.keep_model(0, exported)
    tracker.register(tiny_study.study(), 0)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """What a worker leaves: the exported network, a picture and a report."""
    folder = Path(shutil.copytree(exported, tmp_path / "left"))
    (folder / "curves.png").write_bytes(b"png")
    (folder / "report.txt").write_text("report")
    return folder


@contextmanager
def tracking_server(template: Path, folder: Path) -> Iterator[str]:
    """An MLflow server with its database and its artifacts in a folder; its address."""
    folder.mkdir()
    shutil.copyfile(template, folder / "mlflow.db")
    uri = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True) as process:
        try:
            wait_for(f"{uri}/health", seconds=200)
            yield uri
        finally:
            os.killpg(process.pid, 15)


@pytest.fixture
def server(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home whose tracking store is a server that keeps the artifacts too."""
    with tracking_server(template, tmp_path / "server") as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield Home.find(tmp_path)
