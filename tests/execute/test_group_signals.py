"""Signals that reach a run and all its processes at once, as those of terminals and schedulers do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpo.home import Home
from hpo.records import TrialState
from hpo.storage.reader import read_snapshots


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc who belongs to the run")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_all_processes_of_a_run_ends_it_cleanly(number, tmp_path, monkeypatch):
    for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    endless = ["--set", "training.epochs=100000", "--set", "training.patience=null"]
    command = ["-m", "hpo", "run", "digits-mlp", "--workers", "2", *endless, "--home", str(tmp_path), "--json"]
    environment = {**os.environ, "HPO_DATA": str(tmp_path / "data")}
    with subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        while '"epoch_ended"' not in run.stdout.readline():
            assert run.poll() is None
        others = [int(path.name) for path in Path("/proc").glob("[0-9]*") if path.name != str(run.pid)]
        for process in others:
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(process) == run.pid:
                    os.kill(process, number)
        time.sleep(1.0)  # they come first, and long before: nothing then hides what they did
        for _ in range(2 if number == signal.SIGTERM else 1):  # batch systems send it to the job, then to its steps
            os.kill(run.pid, number)
            time.sleep(0.05)
        told = run.stdout.read()
    assert run.returncode == 130, told
    (seen,) = read_snapshots(Home.find(tmp_path))
    assert seen.abandoned == () == seen.holders
    first = [trial for trial in seen.study.trials if trial.candidate.attempt == 1]
    assert {trial.state for trial in first} == {TrialState.STOPPED}
    assert {trial.candidate.deaths for trial in seen.study.trials} == {0}
