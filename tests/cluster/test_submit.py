"""Studies on an array of workers: real jobs of submitit's local executor, on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.cluster.shared_study import Submitted, run_array
from hpo.errors import HpoError
from hpo.events import StudyEnded, TrialStarted
from hpo.home import Home
from hpo.options import RunOptions
from hpo.records import FailureKind, TrialState
from hpo.spec.load import load_study
from hpo.storage.reader import read_snapshots
from hpo.tracking.registry import versions

ONE = RunOptions(workers=1, stack=1)


@pytest.fixture
def project(tmp_path, database, monkeypatch) -> Iterator[Path]:
    """An empty folder whose studies are on a server."""
    monkeypatch.setenv("HPO_STORAGE", database)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("HPO_HOME", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield tmp_path
    for process in _workers(tmp_path):
        os.kill(process, signal.SIGKILL)


def _run(project, *overrides, watch=None, worker=ONE, trials=6, **options):
    spec = load_study("digits-mlp", overrides=overrides)
    options = RunOptions(engine="slurm", workers=2, home=project, trials=trials, **options)
    return run_array(spec, options, worker=worker, cluster="local", watch=watch)


def _workers(project) -> list[int]:
    """Process ids of the array's workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"worker" in words and str(project).encode() in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_array_spends_the_budget_exactly_registers_once_and_then_has_nothing_to_do(project):
    events = []
    study = _run(project, "training.epochs=2", watch=events.append)
    assert [trial.state.finished for trial in study.trials] == [True] * 6
    assert sorted(trial.candidate.ordinal for trial in study.trials) == list(range(6))
    ended = events[-1]
    assert isinstance(ended, StudyEnded)
    assert (ended.reason, ended.model.trial) == ("budget", study.best.number)
    assert [version.version for version in versions(Home.find(project))] == [1]
    (seen,) = read_snapshots(Home.find(project))
    assert len({row["lease"] for row in _starts(project)}) == 2 >= len(seen.holders) == 0
    # A second time there is nothing to do, and no job is submitted.
    before = sorted((project / "mlruns" / "jobs").rglob("*"))
    again = _run(project, "training.epochs=2")
    assert [trial.value for trial in again.trials] == [trial.value for trial in study.trials]
    assert sorted((project / "mlruns" / "jobs").rglob("*")) == before
    # Passwords are in no file of it.
    word = os.environ["HPO_STORAGE"].partition("//hpo:")[2].partition("@")[0].encode()
    assert not [path for path in project.rglob("*") if path.is_file() and word in path.read_bytes()]


def _starts(project) -> list[dict]:
    from hpo.database import reading

    query = "SELECT value_json FROM trial_user_attributes WHERE key = 'hpo.start'"
    with reading(Home.find(project).storage_url) as reader:
        return [json.loads(text) for (text,) in reader.rows(query)]


@pytest.mark.slow
def test_trials_of_a_killed_job_are_tried_again_by_the_others(project):
    killed = []

    def kill_one(event) -> None:
        if isinstance(event, TrialStarted) and event.candidate.number >= 1 and not killed:
            killed.append(_workers(project)[0])
            os.kill(killed[0], signal.SIGKILL)

    study = _run(project, "training.epochs=8", "training.patience=null", watch=kill_one, trials=4)
    assert killed
    lost = [trial for trial in study.trials if trial.state is TrialState.STOPPED]
    assert {trial.result.failure for trial in lost} == {FailureKind.INTERRUPTED}
    finished = Counter(trial.candidate.ordinal for trial in study.trials if trial.state.finished)
    assert finished == Counter(range(4))
    assert {trial.candidate.ordinal for trial in lost} <= finished.keys()


@pytest.mark.long
def test_ctrl_c_ends_the_study_and_its_jobs(project):
    command = "import sys; from hpo.cluster.shared_study import run_array; from hpo.spec.load import load_study\n"
    command += "spec = load_study('digits-mlp', overrides=['training.epochs=100000', 'training.patience=null'])\n"
    command += "said = lambda event: print(type(event).__name__, getattr(event, 'reason', ''), flush=True)\n"
    command += "from hpo.options import RunOptions\n"
    command += f"options = RunOptions(engine='slurm', workers=2, home={str(project)!r})\n"
    command += "worker = RunOptions(workers=1, stack=1)\n"
    command += "run_array(spec, options, worker=worker, cluster='local', watch=said)"
    with subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, text=True) as run:
        for _ in range(2):
            while not run.stdout.readline().startswith("TrialStarted"):
                assert run.poll() is None
        run.send_signal(signal.SIGINT)
        said = run.stdout.read()
    assert "StudyEnded interrupted" in said
    (seen,) = read_snapshots(Home.find(project))
    assert seen.holders == () == seen.abandoned
    assert {trial.state for trial in seen.study.trials} == {TrialState.STOPPED, TrialState.WAITING}
    ends = time.monotonic() + 10
    while _workers(project) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not _workers(project)


@pytest.mark.slow
def test_jobs_that_all_fail_are_told_with_the_last_words_of_one(project):
    with pytest.raises(
        HpoError, match=r"all jobs have ended, with 0 of 6 trials done\..*there is no data set"
    ) as error:
        _run(project, worker=replace(ONE, settings=("data.name=mnist",)))
    assert "Logs: " in error.value.hint


@pytest.mark.long
def test_detached_array_goes_on_alone(project):
    done = _run(project, "training.epochs=2", detach=True, trials=2)
    assert isinstance(done, Submitted)
    assert len(done.jobs) == 2
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        (seen,) = read_snapshots(Home.find(project))
        if seen.best and len(seen.study.trials) == 2 and not _workers(project):
            break
        time.sleep(0.5)
    assert [trial.state.finished for trial in seen.study.trials] == [True] * 2
    assert (done.folder / f"{done.jobs[0]}_0_log.out").is_file()
