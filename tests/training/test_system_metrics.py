"""System metrics: named as MLflow names them, a few for each trial, and never in the way of one."""

import re
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from hpo.execute.workers.task import Task, train_task
from hpo.home import Home
from hpo.records import TrialResult, TrialState
from hpo.spec.models import MlpSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import TrainingSpec
from hpo.tracking.store import connect
from hpo.training import system_metrics
from hpo.training.system_metrics import OFF, Sample, SystemMetrics, gpus_of, read_levels

OWN = {"worker_cpu_utilization_percentage", "worker_memory_usage_megabytes", "time"}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GB with 20 GB in use, as torch tells of one."""
    monkeypatch.setattr(torch.cuda, "utilization", lambda index: 40 + index)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda index: 20_000_000_000)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    whole = type("Properties", (), {"total_memory": 80_000_000_000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: whole)


def _spend(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_short_trial_has_one_value_of_each_under_the_names_of_mlflow():
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

    monitor = CPUMonitor()
    monitor.collect_metrics()
    with SystemMetrics() as system:
        _spend(0.1)
    columns = system.columns()
    assert set(columns) - OWN == set(monitor.metrics)
    assert {len(column) for column in columns.values()} == {1}
    assert columns["worker_cpu_utilization_percentage"][0] > 0
    assert columns["cpu_utilization_percentage"][0] <= 100
    resident = psutil.Process().memory_info().rss / 1e6
    assert columns["worker_memory_usage_megabytes"][0] == pytest.approx(resident, rel=0.2)


def test_a_gpu_has_the_names_of_mlflow_and_the_number_of_its_device(gpu):
    from mlflow.system_metrics.metrics import gpu_monitor

    with SystemMetrics(gpus_of("cuda:1")) as system:
        pass
    columns = {name: column[0] for name, column in system.columns().items() if name.startswith("gpu")}
    assert columns == {
        "gpu_1_utilization_percentage": 41.0,
        "gpu_1_memory_usage_megabytes": 20000.0,
        "gpu_1_memory_usage_percentage": 25.0,
    }
    source = Path(gpu_monitor.__file__).read_text(encoding="utf-8")
    assert {name.replace("gpu_1", "gpu_{i}") for name in columns} <= set(re.findall(r'f"(gpu_\{i\}_\w+)"', source))


def test_the_gpus_of_a_trial_are_those_of_its_ranks():
    assert gpus_of("cpu") == gpus_of("cpu", 2) == ()
    assert gpus_of("cuda") == (0,)
    assert gpus_of("cuda:2", 2) == (2, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_cannot_be_read_is_left_out(monkeypatch):
    def refuse(*_):
        raise PermissionError("/proc/stat")

    monkeypatch.setattr(psutil, "cpu_times", refuse)
    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    assert read_levels((0,)) == {}
    with SystemMetrics((0,)) as system:
        _spend(0.01)
    assert set(system.columns()) == {"time", "worker_cpu_utilization_percentage"}


def test_processes_that_train_for_a_worker_are_not_taken_for_it():
    with SystemMetrics(worker=False) as system:
        pass
    assert not any("worker" in name for name in system.columns())


def test_nothing_is_sampled_where_mlflow_is_told_not_to(monkeypatch):
    monkeypatch.setenv(OFF, "false")
    with SystemMetrics() as system:
        pass
    assert system.columns() == {}


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000])
def test_a_long_trial_keeps_a_few_values_each_a_mean(count):
    system = SystemMetrics()
    with system:
        for second in range(count):
            system.take(Sample(float(second), {"load": (second / 4, float(second))}, {"memory": float(second)}))
    columns = system.columns()
    times, memory = columns["time"], columns["memory"]
    assert len(times) == len(memory) == min(count, 15) if count < 16 else 8 <= len(times) <= 16
    assert times[-1] == count - 1
    assert list(times) == sorted(set(times))
    # Each value is the mean of the seconds since the one before.
    begins = [-1.0, *times]
    assert memory == tuple(round((before + 1 + last) / 2, 1) for before, last in zip(begins, times, strict=False))


def test_the_thread_samples_while_trials_run_and_ends_without_any(monkeypatch):
    monkeypatch.setattr(system_metrics, "_SHORTEST", 0.02)
    monkeypatch.setattr(system_metrics, "_FRESH", 0.0)
    monkeypatch.setattr(system_metrics, "_IDLE", 0.05)
    monkeypatch.setattr(system_metrics, "_sampler", system_metrics._Sampler())

    def threads():
        return [thread for thread in threading.enumerate() if thread.name == "hpo-system-metrics"]

    elsewhere = len(threads())  # of earlier tests
    for _ in range(2):  # it starts again
        with SystemMetrics() as one, SystemMetrics() as other:
            while len(one._values) < 3 or len(other._values) < 3:
                time.sleep(0.01)
            assert len(threads()) == elsewhere + 1
        assert len(one.columns()["time"]) >= 3
        while len(threads()) > elsewhere:
            time.sleep(0.01)


def test_a_trial_has_them_and_its_record_keeps_them(card, tmp_path):
    setup = Setup(
        data=DataSpec(name="digits"),
        split=SplitSpec(kind="holdout"),
        model=MlpSpec(kind="mlp", hidden=8),
        training=TrainingSpec(epochs=1, precision="float32"),
    )
    started = time.time()
    *_, ended = train_task(Task(0, setup, 7, card, str(tmp_path)), "cpu")
    result = ended.result
    assert result.state is TrialState.COMPLETE
    assert "cpu_utilization_percentage" in result.system
    assert started <= result.system["time"][-1] <= time.time() + 0.001
    assert TrialResult.from_json(result.to_json()).system == result.system


def test_the_runs_of_a_study_have_them(finished):
    found = connect(Home.find(finished)).search_runs(["1"], "tags.`hpo.kind` = 'trial'")
    assert len(found) == 2
    for run in found:
        assert {"system/cpu_utilization_percentage", "system/worker_memory_usage_megabytes"} <= set(run.data.metrics)
