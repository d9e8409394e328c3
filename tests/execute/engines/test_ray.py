"""A real Ray on this machine: what nodes must have, what is refused, who dies and who is replaced."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hpo.data.prepare import at_hand, prepare
from hpo.errors import DataError, HpoError
from hpo.events import EpochEnded, TrialEnded
from hpo.execute.engines.base import WorkerLost
from hpo.execute.engines.ray import RayActors
from hpo.execute.engines.ray_cluster import Cluster, RayOptions, worker_count
from hpo.execute.run_study import run_study
from hpo.execute.workers.ray_actor import RayWorker, WorkerSetup, read_files, write_files
from hpo.execute.workers.task import Task
from hpo.records import TrialState
from hpo.spec.load import load_study

pytestmark = pytest.mark.slow  # a real Ray of several nodes

SPEC = load_study("digits-mlp", overrides=["training.epochs=3", "training.precision=float32"])


def _own_digits(folder: Path, *, count: int):
    """A study of the first digits, in a file, and its card, prepared in the supervisor's own cache."""
    digits = load_digits()
    images, labels = digits.images[:count].astype(np.uint8), digits.target[:count].astype(np.int64)
    file = folder / "digits.npz"
    np.savez(file, train_images=images, train_labels=labels)
    spec = SPEC.model_copy(update={"data": SPEC.data.model_copy(update={"name": "npz", "path": str(file)})})
    return spec, prepare(spec.data, spec.split, cache=folder / "cache")


def _until(engine, kind, *, seconds=120):
    deadline = time.monotonic() + seconds
    messages = []
    while time.monotonic() < deadline:
        messages += [message for _, message in engine.poll(0.5)]
        if any(isinstance(message, kind) for message in messages):
            return messages
    raise AssertionError(f"no {kind} after {seconds} s: {messages}")


def _ready(engine):
    while not engine.accepts(0):
        engine.poll(0.5)


def test_nothing_of_the_working_folder_is_sent(cluster):
    from ray._private.ray_constants import RAY_ENABLE_UV_RUN_RUNTIME_ENV

    assert not RAY_ENABLE_UV_RUN_RUNTIME_ENV


def test_a_node_without_the_prepared_data_prepares_them_and_its_workers_die_and_are_replaced(cluster, tmp_path):
    spec, card = _own_digits(tmp_path, count=1000)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")  # as on a node of another machine
    engine = RayActors(WorkerSetup(spec.data, spec.split, card), slots=1, cpus=0.5)
    try:
        _ready(engine)
        long = spec.with_values({"training.epochs": 10000, "training.patience": None})
        engine.submit(0, Task(0, long, 7, card, str(tmp_path / "0")))
        told = _until(engine, EpochEnded)
        assert not any(isinstance(message, TrialEnded) for message in told)  # epochs come while the trial goes on
        os.kill(_worker(), signal.SIGKILL)
        lost = _until(engine, WorkerLost)[-1]
        assert lost.cause.startswith("Ray node ")
        assert lost.cause.endswith(": its worker process has died")
        assert not engine.accepts(0)  # the next one is on its way
        _ready(engine)
        engine.submit(0, Task(1, spec.setup, 7, card, str(tmp_path / "1")))
        result = _until(engine, TrialEnded)[-1].result
        assert result.state is TrialState.COMPLETE
        assert result.settings["node"]
        assert (tmp_path / "1" / "weights.safetensors").is_file()
    finally:
        engine.close()


def _worker() -> int:
    """The process of the only worker."""
    import psutil

    children = psutil.Process().children(recursive=True)
    living = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]  # others may have just ended
    return next(child.pid for child in living if any("ray::RayWorker" in word for word in child.cmdline()))


def test_a_node_that_is_lost_while_its_workers_start_ends_no_run(cluster, tmp_path):
    spec, card = _own_digits(tmp_path, count=950)
    engine = RayActors(WorkerSetup(spec.data, spec.split, card), slots=6, cpus=0.1)
    try:
        for slot in engine._slots:
            cluster._ray.kill(slot.actor)
        engine.poll(5)  # all six deaths
        assert not any(map(engine.accepts, range(6)))
        _ready(engine)
    finally:
        engine.close()


def test_a_node_that_has_other_data_is_refused(cluster, tmp_path):
    spec, card = _own_digits(tmp_path, count=900)
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    _own_digits(tmp_path, count=901)  # what the node has at that path
    engine = RayActors(WorkerSetup(spec.data, spec.split, card), slots=1, cpus=0.5)
    try:
        with pytest.raises(DataError, match=r"Ray node .*: .*digits.npz: has other images or labels") as raised:
            _until(engine, TrialEnded)
        assert "same path" in raised.value.hint
    finally:
        engine.close()


def test_gpus_that_no_node_has_are_refused_at_once(cluster):
    with pytest.raises(HpoError, match=r"--gpus-per-trial 0\.25: no node of the Ray cluster has so much"):
        Cluster(RayOptions(gpus_per_trial=0.25)).fit(None, most=4)
    with pytest.raises(HpoError, match="--cpus-per-trial 64"):
        Cluster(RayOptions(cpus_per_trial=64)).fit(2, most=4)
    with pytest.raises(HpoError, match="--device cuda: no node of the Ray cluster has a GPU"):
        Cluster(RayOptions(), device="cuda")
    for device, gpus in (("cuda", 0), ("cpu", 1)):
        with pytest.raises(HpoError, match=f"--device {device}: and --gpus-per-trial {gpus}"):
            Cluster(RayOptions(gpus_per_trial=gpus), device=device)
    with pytest.raises(HpoError, match="--device mps"):
        Cluster(RayOptions(), device="mps")


def test_as_many_workers_as_there_is_room_for_and_no_more_than_trials(cluster):
    assert cluster.fit(None, most=100) == 8
    assert cluster.fit(None, most=3) == 3
    assert cluster.fit(9, most=100) == 9
    assert str(cluster) == "cpu on 1 Ray node"


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "room"),
    [
        ({"CPU": 8.0}, 1.0, 0.0, 8),
        ({"CPU": 8.0}, 3.0, 0.0, 2),
        ({"CPU": 8.0, "GPU": 1.0}, 1.0, 0.25, 4),
        ({"CPU": 8.0, "GPU": 2.0}, 1.0, 0.4, 4),  # two on each, not five on both
        ({"CPU": 8.0, "GPU": 4.0}, 1.0, 2.0, 2),
        ({"CPU": 1.0, "GPU": 4.0}, 1.0, 0.5, 1),
        ({"CPU": 0.9}, 0.3, 0.0, 3),
        ({"CPU": 8.0}, 1.0, 0.5, 0),
        ({}, 1.0, 0.0, 0),
    ],
)
def test_room_of_a_node(node, cpus, gpus, room):
    assert worker_count(node, cpus=cpus, gpus=gpus) == room


@pytest.mark.parametrize(
    "given", [{"cpus_per_trial": 0}, {"gpus_per_trial": -1}, {"gpus_per_trial": 1.5}, {"gpus_per_trial": float("nan")}]
)
def test_shares_that_ray_does_not_know_are_refused(given):
    with pytest.raises(HpoError, match="per-trial"):
        RayOptions(**given)


def test_options_for_other_engines_are_refused(tmp_path):
    for given in ({"workers": 0}, {"stack": 2}):
        with pytest.raises(HpoError, match="not for Ray"):
            run_study(SPEC, engine="ray", home=tmp_path, **given)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nowhere", "ray://127.0.0.1:10001", "auto"])
def test_an_address_without_a_cluster_is_told_at_once(address, monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    if address == "auto":  # there is one while these tests run
        monkeypatch.setattr(ray, "init", _no_ray)
    started = time.monotonic()
    with pytest.raises(HpoError, match=f"--address {address}:") as raised:
        Cluster(RayOptions(address))
    assert raised.value.hint
    assert time.monotonic() - started < 6


def _no_ray(**_options):
    raise ConnectionError("Could not find any running Ray instance.")


def test_a_missing_ray_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(HpoError) as raised:
        Cluster(RayOptions())
    assert raised.value.hint == 'Install it: pip install "hpo-studies[ray]"'


def test_files_arrive_as_they_were(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"\0\1")
    (tmp_path / "a" / "d").write_bytes(b"")
    write_files(read_files(tmp_path / "a"), tmp_path / "e")
    assert read_files(tmp_path / "e") == {"b/c": b"\0\1", "d": b""}
    assert read_files(tmp_path / "none") == {}


def test_a_worker_brings_the_models_that_networks_stand_on_and_refuses_another_hpo(tmp_path, monkeypatch):
    spec, card = _own_digits(tmp_path, count=900)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "node"))
    models = {"m-1": {"weights/net.pt2": b"1"}}
    for _ in range(2):  # the second worker of a node finds them
        RayWorker(threads=1, gpu=False).open(WorkerSetup(spec.data, spec.split, card, models))
    assert [path.name for path in (tmp_path / "node" / "models").iterdir()] == ["m-1"]
    assert read_files(tmp_path / "node" / "models" / "m-1") == models["m-1"]
    with pytest.raises(HpoError, match=r"Ray node .*: hpo .* is installed, and the run is of hpo 0"):
        RayWorker(threads=1, gpu=False).open(WorkerSetup(spec.data, spec.split, card, version="0"))


def test_a_worker_is_never_told_where_the_test_part_lies(tmp_path):
    spec, card = _own_digits(tmp_path, count=900)
    ground = WorkerSetup(spec.data, spec.split, card)
    assert card.test_folder
    assert ground.card.test_folder == ""
    assert at_hand(card, spec.data, spec.split) == card.sealed
