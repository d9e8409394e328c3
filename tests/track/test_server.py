from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_study as tiny
from test_ui import free_port, wait_for

from hpo.home import Home
from hpo.predict import load_model
from hpo.records import TrialState
from hpo.track.ledger import openings, record_opening
from hpo.track.look import look
from hpo.track.registry import resolve
from hpo.track.tracker import Tracker


@pytest.fixture
def server(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A home whose tracking store is a server that keeps the artifacts too."""
    place = tmp_path / "server"
    place.mkdir()
    shutil.copyfile(template, place / "mlflow.db")
    uri = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{place / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(place / "artifacts"), "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with subprocess.Popen(command, env=environment, cwd=place, start_new_session=True) as process:
        try:
            wait_for(f"{uri}/health", seconds=200)
            yield Home.find(tmp_path)
        finally:
            os.killpg(process.pid, 15)


@pytest.mark.slow
def test_a_study_on_a_server_needs_no_local_artifacts(server: Home, folder: Path, tmp_path: Path) -> None:
    tracker = Tracker(server)
    tracker.open_study(tiny.study(), tiny.spec(), tiny.data(), tiny.split())
    for number in range(2):
        candidate = tiny.candidate(number)
        tracker.start_trial(candidate, tiny.spec().with_values(candidate.parameters), worker="w0")
        tracker.log_epochs(number, tiny.epochs(3))
        tracker.end_trial(tiny.result(number))
        tracker.keep_model(number, folder)
    tracker.drop_model(0)
    version = tracker.register(tiny.study(), 1)
    assert tracker.register(tiny.study(), 1) == version == resolve(server, "tiny")
    study = tiny.study(tiny.trial(0), tiny.trial(1), tiny.trial(2, TrialState.PRUNED))
    tracker.reconcile(study, tiny.spec())
    tracker.close_study(study, status="FINISHED", summary="# study")
    assert list(tracker.kept_models(study)) == [1]
    assert len(list((tmp_path / "server").rglob("net.pt2"))) == 1
    assert not [path for path in server.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    database = look(replace(server, tracking_uri=f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}"))
    asked = look(server)
    assert database is not None
    assert asked is not None
    assert sorted(database.runs, key=lambda run: run.key) == sorted(asked.runs, key=lambda run: run.key)
    assert database.versions == asked.versions
    assert [model for model in database.models if not model.deleted] == list(asked.models)
    model = load_model("tiny", home=server)
    assert model.predict_proba(np.zeros((2, *tiny.SHAPE), np.uint8)).shape == (2, 3)
    opening = record_opening(server, study, model=version, scores={"test_accuracy": 0.9})
    (server.root / "openings.jsonl").unlink()
    assert openings(server, study) == [opening]
