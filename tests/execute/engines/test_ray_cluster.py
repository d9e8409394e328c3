"""Studies on Ray clusters of several nodes on this machine: nodes that die, supervisors that die, the same search."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest

from hpo.execute.engines.ray import RayActors
from hpo.execute.run_study import run_study
from hpo.execute.workers.ray_actor import WorkerSetup
from hpo.home import Home
from hpo.records import FailureKind, TrialState
from hpo.spec.load import load_study
from hpo.storage.reader import list_trials


@pytest.fixture
def nodes():
    """A cluster whose head has no room for workers."""
    from ray.cluster_utils import Cluster as Nodes

    started = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield started
    started.shutdown()


@pytest.fixture
def hpo_run(tmp_path):
    """hpo_run(option, ...): `hpo run digits-mlp` of long trials with --json, as a process."""
    runs = []

    def begin(*options, trials=6):
        settings = ["training.epochs=60", "training.patience=null", "search.pruner=none", "model.hidden=256"]
        words = [part for setting in settings for part in ("--set", setting)]
        command = [sys.executable, "-m", "hpo", "run", "digits-mlp", "--engine", "ray", "--json", *words, *options]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with (tmp_path / "words.txt").open("w") as stderr:
            run = subprocess.Popen(
                [*command, "--trials", str(trials), "--home", str(tmp_path), "--keep-models", "best:1"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        runs.append(run)
        return run

    yield begin
    for run in runs:
        if run.poll() is None:
            run.kill()
        run.communicate()


def _events(run, kind, *, trials=1):
    """Read on until so many trials have told an event of the kind."""
    heard = set()
    for line in run.stdout:
        event = json.loads(line)  # nothing of Ray's gets in between
        if event["event"] == kind:
            heard.add(event.get("number", 0))
        if len(heard) >= trials:
            return


@pytest.mark.slow
def test_all_trials_are_done_once_when_a_node_is_killed_and_another_joins(nodes, hpo_run, tmp_path):
    first, _ = nodes.add_node(num_cpus=1), nodes.add_node(num_cpus=1)
    run = hpo_run("--address", nodes.address)
    _events(run, "epoch_ended", trials=2)
    nodes.remove_node(first, allow_graceful=False)
    nodes.add_node(num_cpus=1)
    rest = run.communicate(timeout=240)[0]
    assert run.returncode == 0, (tmp_path / "words.txt").read_text()
    assert (tmp_path / "words.txt").read_text() == ""
    assert json.loads(rest.splitlines()[-1])["event"] == "study_ended"
    study = list_trials(Home.find(tmp_path), "digits-mlp")
    ends = Counter(trial.candidate.ordinal for trial in study.trials if trial.state is TrialState.COMPLETE)
    assert len(ends) == 6
    assert set(ends.values()) == {1}
    [lost] = [trial for trial in study.trials if trial.state is TrialState.STOPPED]
    assert len(study.trials) == 7
    assert lost.result.failure is FailureKind.WORKER_DIED
    assert "Ray node" in lost.result.reason
    assert "its node is gone" in lost.result.reason
    again = next(t for t in study.trials if t.candidate.ordinal == lost.candidate.ordinal and t.candidate.attempt == 2)
    assert again.candidate.parameters == lost.candidate.parameters


@pytest.mark.slow
def test_actors_beyond_the_room_of_the_cluster_wait_and_shares_of_a_core_are_kept(cluster, tmp_path):
    from hpo.data.prepare import prepare

    spec = load_study("digits-mlp")
    ground = WorkerSetup(spec.data, spec.split, prepare(spec.data, spec.split, cache=tmp_path))
    engine = RayActors(ground, slots=4, cpus=1.5)  # of 4: two fit
    try:
        deadline = time.monotonic() + 60
        while sum(map(engine.accepts, range(4))) < 2 and time.monotonic() < deadline:
            engine.poll(0.5)
        for _ in range(4):
            engine.poll(0.5)
        assert sum(map(engine.accepts, range(4))) == 2
    finally:
        engine.close()


@pytest.mark.slow
def test_the_same_seed_and_one_worker_give_the_same_trials_on_every_engine_and_storage(
    cluster, database, tmp_path, monkeypatch
):
    settings = ["training.epochs=2", "search.sampler=tpe", "search.pruner=median", "training.precision=float32"]
    spec = load_study("digits-mlp", overrides=settings)
    places = [
        ({}, None, tmp_path / "processes"),
        ({"engine": "ray", "cpus_per_trial": 1.0}, None, tmp_path / "ray"),
        ({"engine": "ray", "cpus_per_trial": 1.0}, database, tmp_path / "ray-postgres"),
    ]
    monkeypatch.setattr("hpo.execute.engines.local.cores", lambda: 1)  # threads of the worker process
    found = []
    for engine, storage, home in places:
        if storage:
            monkeypatch.setenv("HPO_STORAGE", storage)
        study = run_study(spec, trials=14, workers=1, home=home, keep_models="none", **engine)
        found.append([(t.number, t.candidate.parameters, t.candidate.seed, t.state, t.value) for t in study.trials])
    assert len(found[0]) == 14
    assert found[0] == found[1] == found[2]


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_of_ray_outlives_its_supervisor(how, hpo_run, tmp_path):
    run = hpo_run()
    _events(run, "epoch_ended")
    beside = psutil.Process(run.pid).children(recursive=True)
    # Ray's own agents look for their raylet for a minute before they end.
    beside = [process for process in beside if "Agent" not in process.name()]
    assert any("raylet" in process.name() for process in beside)
    run.send_signal(how)
    run.wait(120)
    _, alive = psutil.wait_procs(beside, timeout=60)
    assert not alive
    if how is not signal.SIGKILL:
        states = {trial.state for trial in list_trials(Home.find(tmp_path), "digits-mlp").trials}
        assert states <= {TrialState.COMPLETE, TrialState.STOPPED, TrialState.WAITING}
