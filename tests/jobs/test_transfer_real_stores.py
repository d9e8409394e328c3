"""A study that really trained, moved to PostgreSQL and an MLflow server, continued there, and moved back."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpo.home import Home
from hpo.predict import load_model
from hpo.storage.reader import read_study
from whole_study import whole

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
QUICK = ["--workers", "1", "--set", "training.epochs=3", "--set", "search.sampler=tpe", "--precision", "float32"]

# What a user of MLflow alone does.
PLAIN = """
import sys
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/digits-mlp@champion")
print(np.asarray(model.predict(np.zeros((2, 8, 8, 1), np.uint8))).tolist())
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of an MLflow server that keeps the artifacts, too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = tmp_path / "server"
    place.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{place / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(place / "artifacts"), "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (
        (place / "log").open("wb") as log,
        subprocess.Popen(
            command, env=environment, cwd=place, start_new_session=True, stdout=log, stderr=log
        ) as process,
    ):
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", seconds=200)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, 15)


def _wait_for(url: str, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - our own
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        else:
            return


def _hpo(*arguments: str, home: Path) -> str:
    command = [sys.executable, "-m", "hpo", *arguments, "--home", str(home)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_trained_study_goes_on_on_servers_and_comes_back_whole(
    server: str, database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    here, shared, back, unbroken = (tmp_path / name for name in ("here", "shared", "back", "unbroken"))
    shared.mkdir()
    (shared / "hpo.toml").write_text(f'storage = "{database}"\ntracking = "{server}"\n', encoding="utf-8")
    _hpo("run", "digits-mlp", "--trials", "3", *QUICK, home=here)
    assert "champion" in _hpo("promote", "digits-mlp", home=here)
    file = str(tmp_path / "study.zip")

    said = _hpo("export", "digits-mlp", "-o", file, home=here)
    assert "3 trials, 4 runs, 3 models, 1 registered version" in said
    for _ in range(2):
        _hpo("import", file, home=shared)
    home = Home.find(shared)
    study = read_study(Home.find(here), "digits-mlp")
    assert whole(home, study) == whole(Home.find(here), study)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    answers = [load_model("models:/digits-mlp@champion", home=place).predict_proba(images) for place in (here, shared)]
    np.testing.assert_array_equal(*answers)
    plain = [sys.executable, "-c", PLAIN, server]
    told = subprocess.run(plain, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert np.shape(json.loads(told.stdout.splitlines()[-1])) == (2, 10)
    assert _hpo("compare", "digits-mlp#0", "digits-mlp#1", home=shared)
    for command in ("trials", "report", "models"):
        assert _hpo(command, "digits-mlp", home=shared)
    assert json.loads(_hpo("evaluate", "digits-mlp", "--json", home=shared))[0]["opened"] is False

    _hpo("run", "digits-mlp", "--trials", "5", *QUICK, home=shared)
    _hpo("run", "digits-mlp", "--trials", "5", *QUICK, home=unbroken)
    found = [read_study(place, "digits-mlp").trials for place in (home, Home.find(unbroken))]
    candidates = [[trial.candidate for trial in trials] for trials in found]
    assert len(candidates[0]) == 5
    assert candidates[0] == candidates[1]

    # A run that left nothing, as a pruned one does: what a server has nothing of it does not know.
    shutil.rmtree(next((tmp_path / "server" / "artifacts").glob(f"*/{'[0-9a-f]' * 32}/artifacts")))
    _hpo("export", "digits-mlp", "-o", file, home=shared)
    _hpo("import", file, home=back)
    study = read_study(home, "digits-mlp")
    assert whole(Home.find(back), study) == whole(home, study)
    assert _hpo("import", file, home=here)
    searched = [whole(Home.find(place), study)["optuna"] for place in (here, back)]
    assert searched[0] == searched[1]
