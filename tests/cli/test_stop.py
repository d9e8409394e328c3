"""hpo stop and hpo status beside real runs of hpo."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.home import Home
from hpo.records import TrialState
from hpo.storage.reader import StudySnapshot, read_snapshots

HPO = [sys.executable, "-m", "hpo"]
LONG = ["--set", "training.epochs=100000", "--set", "training.patience=null", "--set", "search.pruner=none"]


@pytest.fixture
def place(project, digits_cache, monkeypatch):
    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return project


def hpo(*arguments: str, code: int = 0) -> str:
    """A command in this process, which has its imports behind it."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    return done.output


def begin(*options: str) -> subprocess.Popen[str]:
    command = [*HPO, "run", "digits-mlp", "--workers", "1", *LONG, *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def end(run: subprocess.Popen[str]) -> None:
    """Kill it and all that it started, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


def seen(place: Path, ready) -> StudySnapshot:
    """Wait until the study is as it should be."""
    ends = time.monotonic() + 120
    while time.monotonic() < ends:
        found = read_snapshots(Home.find(place), results=False)
        if found and ready(found[0]):
            return found[0]
        time.sleep(0.2)
    raise AssertionError(read_snapshots(Home.find(place), results=False))


@pytest.mark.slow
def test_stop_ends_every_run_of_a_study_cleanly(place):
    runs = [begin(), begin()]
    try:
        seen(place, lambda one: len(one.running) == 2 and len(one.holders) == 2)
        (facts,) = json.loads(hpo("status", "--json"))
        assert len(facts["supervisors"]) == 2
        assert {holder["pid"] for holder in facts["supervisors"]} == {run.pid for run in runs}
        assert sorted(trial["trial"] for trial in facts["running"]) == [0, 1]
        assert facts["workers"] == 2
        shown = hpo("status", "digits-mlp")
        assert f"process {runs[0].pid} on" in shown
        assert hpo("doctor").startswith("digits-mlp is running")

        began = time.monotonic()
        stop = subprocess.run([*HPO, "stop", "digits-mlp"], capture_output=True, text=True, check=True)
        said = stop.stdout
        assert time.monotonic() - began < 60
        assert "2 trials stopped, will be retried" in said
        assert re.search(r"Resume with: .*hpo run digits-mlp$", said, re.MULTILINE)  # as it is called in that terminal
        for run in runs:
            told, _ = run.communicate(timeout=60)
            assert run.returncode == 130, told
            assert "stopped" in told
            assert "resume" in told
    finally:
        for run in runs:
            end(run)
    (one,) = read_snapshots(Home.find(place))
    assert [trial.state for trial in one.study.trials] == [TrialState.STOPPED] * 2 + [TrialState.WAITING] * 2
    assert {trial.result.reason for trial in one.study.trials if trial.result} == {"stopped"}
    assert "All is well." in hpo("doctor")

    assert "it is not running" in hpo("stop", "digits-mlp")


@pytest.mark.slow
def test_stop_says_that_only_a_dead_supervisor_is_left_and_doctor_mends_it(place):
    run = begin()
    seen(place, lambda one: len(one.running) == 1)
    end(run)
    said = hpo("stop", "digits-mlp")
    assert "it is not running" in said
    assert "1 trial of a dead process" in said
    assert "nobody runs it" in hpo("doctor", code=1)
    assert "All is well now." in hpo("doctor", "--fix")
    assert "All is well." in hpo("doctor")
    (facts,) = json.loads(hpo("status", "--json"))
    assert not facts["supervisors"]
    assert not facts["abandoned"]


def test_a_study_that_never_ran_cannot_be_stopped(place):
    assert "no study 'digits-mlp' has run here" in hpo("stop", "digits-mlp", code=2)
    assert "No study has run" in hpo("status")
    assert "All is well." in hpo("doctor")
    assert not (place / "mlruns").exists()
