"""Helpers, workers and other runs that die beside a run that lives on."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hpo.execute.supervisor
from deadly_jobs import (
    await_end,
    die_always,
    die_once,
    die_once_with_child,
    hang,
    is_alive,
    leave_child,
    prints_to_stderr,
)
from formula_study import CARD, formula, formula_spec
from hpo.errors import HpoError
from hpo.events import TrialEnded
from hpo.execute.engines.base import WorkerLost
from hpo.execute.engines.local import LocalProcesses
from hpo.execute.process import begin, process_context
from hpo.execute.workdir import pictures_folder, sweep
from hpo.execute.workers.job_process import JobProcess
from hpo.execute.workers.task import Task
from hpo.home import Home
from hpo.jobs.doctor import doctor
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.tracking.store import connect

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def helper():
    helper = JobProcess(process_context())
    yield helper
    helper.close()


def _hold_a_trial(home: Home, told) -> None:
    """Another supervisor: one trial complete, one running."""
    study = open_study(home, formula_spec(), data_digest=CARD.digest)
    done = study.ask(budget=6, worker="other")
    study.tell(TrialResult(done.number, TrialState.COMPLETE, 0.5, folder=str(done.number)))
    told.send(study.ask(budget=6, worker="other").number)
    time.sleep(600)


@pytest.fixture
def other(tmp_path):
    """(process, its running trial) of a supervisor beside ours."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_hold_a_trial, args=(Home.find(tmp_path).create(), theirs))
    process.start()
    yield process, ours.recv()
    process.kill()
    process.join()


def test_a_job_whose_process_dies_is_begun_anew(helper, tmp_path):
    waiting = [helper.submit(die_once, tmp_path / str(number)) for number in range(2)]
    assert [job.result(60) for job in waiting] == ["done", "done"]


def test_a_job_that_always_kills_its_process_is_given_up_and_the_next_is_done(helper, tmp_path):
    with pytest.raises(HpoError, match="died 3 times"):
        helper.submit(die_always).result(60)
    (tmp_path / "mark").touch()
    assert helper.submit(die_once, tmp_path / "mark").result(60) == "done"


def test_what_a_process_of_a_run_prints_goes_to_standard_error(helper):
    assert helper.submit(prints_to_stderr).result(60)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc who is alive")
def test_a_job_whose_process_dies_while_a_child_of_it_lives_is_begun_anew_and_the_child_ended(helper, tmp_path):
    assert helper.submit(die_once_with_child, tmp_path / "child").result(60) == "done"
    assert await_end(int((tmp_path / "child").read_text()))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc who is alive")
def test_closing_ends_a_job_that_hangs_with_all_that_the_process_has_started(tmp_path):
    helper = JobProcess(process_context())
    helper.submit(leave_child, tmp_path / "child").result(60)
    leader = helper.submit(os.getpid).result(60)
    helper.submit(hang)
    child = int((tmp_path / "child").read_text())
    assert is_alive(child)
    helper.close()
    assert await_end(leader)
    assert await_end(child)


def test_a_fork_server_that_dies_once_is_begun_again_and_twice_is_told(monkeypatch):
    monkeypatch.setattr("hpo.execute.process._fork_server", lambda: None)
    tries = []

    def start():
        tries.append(1)
        if len(tries) < 2:
            raise EOFError
        return "started"

    assert begin(start) == "started"

    def never():
        raise EOFError

    with pytest.raises(HpoError, match="no process can be started"):
        begin(never)


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="limits the address space with prlimit")
def test_an_address_space_that_is_too_small_is_named_with_what_to_set():
    code = (
        "import time; from hpo.execute.process import begin, process_context; "
        "from hpo.execute.workers.job_process import JobProcess; "
        "JobProcess(process_context()).submit(time.process_time)"
    )
    limited = ["prlimit", "--as=3000000000", sys.executable, "-c", code]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert "no process can be started" in done.stderr
    assert "The address space of a process is limited to 3.0 GB" in done.stderr
    assert "ulimit -v" in done.stderr


def test_a_task_for_a_worker_that_dies_just_then_is_lost_and_no_error(tmp_path):
    engine = LocalProcesses(["cpu"], threads=1)
    try:
        worker = engine._workers[0]
        worker.process.kill()
        worker.process.join()
        worker.process.is_alive = lambda: True  # it died after it was asked
        engine.submit(0, Task(0, formula_spec().with_values({}), 0, CARD, str(tmp_path)))
        ((_, message),) = engine.poll(10)
        assert isinstance(message, WorkerLost)
    finally:
        engine.close()


def test_a_worker_that_stands_still_is_waited_for(tmp_path):
    engine = LocalProcesses(["cpu"], threads=1)
    try:
        pid = engine._workers[0].process.pid
        os.kill(pid, signal.SIGSTOP)
        engine.submit(0, Task(0, formula_spec().with_values({}), 0, CARD, str(tmp_path)))
        assert engine.poll(1.0) == []
        os.kill(pid, signal.SIGCONT)
        ((_, message),) = engine.poll(60)
        assert isinstance(message, TrialEnded)  # there is no such data: it fails, but it is not lost
    finally:
        engine.close()


def test_trials_of_a_run_that_dies_are_taken_over_and_told_to_the_tracker(run_formula, other, monkeypatch):
    monkeypatch.setattr(hpo.execute.supervisor, "_REAP", 0.05)
    process, held = other

    def slow(task: Task, device: str):
        time.sleep(0.1)
        if task.number > held + 1:
            process.kill()
        yield from formula(task, device)

    run = run_formula(trainer=slow)
    assert run.reason == "budget"
    assert run.trials[held].state is TrialState.STOPPED
    assert len(run.study.result().counted) == 6
    assert [trial.candidate.attempt for trial in run.trials if trial.candidate.ordinal == held] == [1, 2]
    assert ("reconcile", held) in run.tracker.calls


def test_a_run_that_stands_still_keeps_its_trials(other, tmp_path):
    process, held = other
    os.kill(process.pid, signal.SIGSTOP)
    study = open_study(Home.find(tmp_path), formula_spec(), data_digest=CARD.digest)
    assert study.reap() == []
    assert held in study.trials_of_others()
    os.kill(process.pid, signal.SIGCONT)
    study.close()


def test_sweeping_leaves_what_living_runs_and_models_to_come_need(other, tmp_path):
    process, held = other
    study = open_study(Home.find(tmp_path), formula_spec(), data_digest=CARD.digest)
    work = Home.find(tmp_path).work / study.title
    mine = study.ask(budget=6, worker="w")
    names = ["0", str(held), str(mine.number), "99", "lease-dead", "checkpoints"]
    for folder in [*(work / name for name in names), pictures_folder(work, study)]:
        folder.mkdir(parents=True)
        (folder / "file").touch()
    sweep(work, study)
    left = {"0", str(held), str(mine.number), "checkpoints", pictures_folder(work, study).name}
    assert {path.name for path in work.iterdir()} == left
    process.kill()
    process.join()
    assert study.reap() == [held]
    study.tell(TrialResult(mine.number, TrialState.PRUNED, 0.1, 1))
    sweep(work, study)
    assert {path.name for path in work.iterdir()} == {"0", "checkpoints", pictures_folder(work, study).name}
    study.close()
    assert not list(Path(tmp_path / "mlruns" / "locks").glob("lease-*"))


def _tracking_process(main: int) -> int:
    """Waits for it: after a death another one begins."""
    while True:
        with contextlib.suppress(OSError):  # one of them has just ended
            for tasks in Path(f"/proc/{main}/task").iterdir():  # the thread that began it is its parent
                for pid in (tasks / "children").read_text().split():
                    if b"multiprocessing.spawn" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        return int(pid)
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for the process in /proc")
def test_the_process_that_writes_to_mlflow_dies_and_nothing_is_lost_or_outlives_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    words = [sys.executable, "-m", "hpo", "run", "digits-mlp", "--trials", "4", "--json", "--home", str(tmp_path)]
    killed = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        for event in map(json.loads, run.stdout):
            ended = event["event"] == "trial_ended" and event["result"]["number"] == 1
            if ended or event["event"] == "study_opened":
                killed.append(_tracking_process(run.pid))
                os.kill(killed[-1], signal.SIGKILL)
        left = event
    assert run.returncode == 0
    assert len(set(killed)) == 2
    assert left["model"]["version"] == 1
    assert doctor(home=tmp_path).well
    home = Home.find(tmp_path)
    runs = connect(home).search_runs([connect(home).get_experiment_by_name("digits-mlp").experiment_id])
    assert [one.info.status for one in runs] == ["FINISHED"] * 5
    with subprocess.Popen([*words, "--fresh"], stdout=subprocess.PIPE, text=True) as run:
        next(line for line in run.stdout if "study_opened" in line)
        writer = _tracking_process(run.pid)
        run.kill()
    await_end(writer)
