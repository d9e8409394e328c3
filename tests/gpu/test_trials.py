"""Trials and studies on a GPU: workers share it, memory that is short is made do with, and what ends leaves nothing."""

import gc
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from device_cases import CNN, FAMILIES, setup
from hpo.cli.app import app
from hpo.errors import HpoError
from hpo.events import EpochEnded
from hpo.execute.engines.local import LocalProcesses
from hpo.execute.run_study import run_study
from hpo.execute.workers.task import Task, train_task
from hpo.home import Home
from hpo.jobs.rerun import Agreement, rerun
from hpo.models import export_program, load_trained
from hpo.models.safe_loader import load_program
from hpo.models.saliency import explain_images
from hpo.records import FailureKind, TrialState
from hpo.spec.load import load_study
from hpo.tracking.store import connect
from hpo.training.device import resolve_devices
from small_nets import TINY, weights_file

pytestmark = pytest.mark.gpu
QUICK = {
    "training.epochs": 2,
    "training.precision": "float32",
    "search.pruner": "none",
    "search.sampler": "random",
    "keep.figures": "none",
}


@pytest.fixture(autouse=True)
def cache(digits_cache, monkeypatch):
    monkeypatch.setenv("HPO_DATA", str(digits_cache))


def _train(task, device, *, epochs=None):
    """The epochs of a task and its result; with epochs, it is left after so many."""
    training, seen = train_task(task, device), []
    message = next(training)
    while isinstance(message, EpochEnded):
        seen.append(message.epoch)
        if len(seen) == epochs:
            training.close()
            return seen, None
        message = training.send(True)
    return seen, message.result


def _task(card, folder, model, **training):
    return Task(0, setup(model, **training), 7, card, str(folder / "left"))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_study_of_each_family_trains_two_trials(device, tmp_path, kind):
    model = {"kind": kind, **FAMILIES[kind]}
    space = {"training.optimizer.lr": {"float": [1e-4, 1e-3]}}
    spec = load_study("digits-mlp", overrides={**QUICK, "model": model, "search.space": space, "keep.models": "none"})
    study = run_study(spec, trials=2, workers=0, device=device, home=tmp_path)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
    assert {trial.result.settings["device"] for trial in study.trials} == {device}


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_one_gpu_and_a_trial_trained_again_is_the_same(device, tmp_path, workers):
    spec = load_study("digits-mlp", overrides={**QUICK, "model.hidden": 16, "keep.models": "best:1"})
    study = run_study(spec, trials=2 * workers, workers=workers, stack=1, device=device, home=tmp_path)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2 * workers
    assert len({trial.worker for trial in study.trials}) == workers
    assert rerun("digits-mlp#0", home=tmp_path).agreement is not Agreement.DIFFERS
    if device.startswith("cuda"):
        for run in connect(Home.find(tmp_path)).search_runs(["1"], "tags.`hpo.kind` = 'trial'"):
            assert run.data.metrics["system/gpu_0_memory_usage_megabytes"] > 0


@pytest.mark.parametrize("way", [{}, {"ema": 0.9}], ids=["captured", "eager"])
def test_a_training_that_was_cut_short_ends_as_one_that_was_not(device, card, tmp_path, way):
    training = {"epochs": 6, "checkpoint": 1, "optimizer": {"name": "adamw"}, **way}
    model = {"kind": "mlp", "hidden": 16, "dropout": 0.3}
    whole, _ = _train(_task(card, tmp_path / "whole", model, **training), device)
    task = _task(card, tmp_path, model, **training)
    task = Task(task.number, task.setup, task.seed, card, task.folder, checkpoint=str(tmp_path / "kept"))
    _train(task, device, epochs=3)
    assert (tmp_path / "kept").is_file()
    resumed, result = _train(task, device)
    assert result.state is TrialState.COMPLETE
    assert device == "cpu" or (result.settings["graph"] == "whole steps") == (not way)
    for one, other in zip(whole, resumed, strict=True):
        assert dict(other.scores) == pytest.approx(dict(one.scores), rel=1e-5)


def _glutton(share):
    return {"kind": "gpu_nets:glutton", "options": {"share": share}}


def test_a_candidate_that_is_too_large_is_halved_and_poisons_nothing(cuda, card, tmp_path):
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(cuda)  # what earlier tests of this process still hold, such as graphs
    assert torch.cuda.mem_get_info(cuda)[0] > 0.9 * torch.cuda.mem_get_info(cuda)[1], "another process holds memory"
    _, result = _train(_task(card, tmp_path, _glutton(0.04)), cuda)  # 32 images need more than there is
    assert (result.state, result.settings["micro_batch"]) == (TrialState.COMPLETE, "16")
    _, result = _train(_task(card, tmp_path, _glutton(0.5)), cuda)
    assert (result.state, result.feasible) == (TrialState.PRUNED, False)
    assert result.failure is FailureKind.OUT_OF_MEMORY
    assert torch.cuda.memory_reserved(cuda) < before + 2**30
    _, result = _train(_task(card, tmp_path, CNN), cuda)
    assert result.state is TrialState.COMPLETE
    assert "micro_batch" not in result.settings


def _hold(share):
    """A process that holds a share of the GPU's memory."""
    code = f"import torch; whole = torch.cuda.get_device_properties(0).total_memory; held = torch.empty(int({share} * whole), dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"  # noqa: E501
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_memory_that_another_process_holds_is_made_do_without(cuda, card, tmp_path):
    with _hold(0.7) as other:
        try:
            _, result = _train(_task(card, tmp_path, _glutton(0.018)), cuda)  # 32 images: 0.58 of the memory; 8: 0.14
        finally:
            other.kill()
    assert result.state is TrialState.COMPLETE
    assert result.settings["micro_batch"] in ("16", "8")


def test_a_worker_killed_on_the_gpu_leaves_no_memory_behind(cuda, card, tmp_path):
    free = torch.cuda.mem_get_info(cuda)[0]
    engine = LocalProcesses([cuda], threads=1)
    try:
        engine.submit(0, _task(card, tmp_path, CNN, epochs=100_000))
        while not engine.poll(0.5):
            pass
        assert torch.cuda.mem_get_info(cuda)[0] < free - 100e6  # its context alone takes that
        os.kill(engine._workers[0].process.pid, signal.SIGKILL)
        while not any(not isinstance(message, EpochEnded) for _, message in engine.poll(0.5)):
            pass
    finally:
        engine.close()
    until = time.monotonic() + 20
    while torch.cuda.mem_get_info(cuda)[0] < free - 50e6:
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_model_trained_on_the_gpu_is_one_of_the_cpu_and_back(device, card, tmp_path):
    _train(_task(card, tmp_path, CNN), device)
    folder = tmp_path / "left"
    images = np.random.default_rng(0).integers(256, size=(20, 8, 8, 1)).astype(np.uint8)
    np.save(tmp_path / "images.npy", images)
    program = export_program(folder)
    code = "import sys, numpy, torch; from pathlib import Path; from hpo.models.safe_loader import load_program; assert not torch.cuda.is_available(); numpy.save(sys.argv[3], load_program(Path(sys.argv[1]))(torch.from_numpy(numpy.load(sys.argv[2]))).detach().numpy())"  # noqa: E501
    answer = tmp_path / "answer.npy"
    command = [sys.executable, "-c", code, str(program), str(tmp_path / "images.npy"), str(answer)]
    subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    net, config = load_trained(folder)
    there = torch.device(device)
    mean, std = (torch.tensor(config[name], device=there).view(-1, 1, 1) for name in ("mean", "std"))
    inputs = (torch.from_numpy(images).to(there).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        probabilities = net.to(there).eval()(inputs).softmax(1).cpu()
    np.testing.assert_allclose(np.load(answer), probabilities, atol=2e-3)
    assert load_program(program)
    assert len(explain_images(folder, images[:2])) == 2


def test_features_are_computed_on_the_gpu_once_and_are_those_of_the_cpu(device, card, tmp_path, monkeypatch):
    weights = str(weights_file(TINY, tmp_path))
    head = {**TINY, "weights": weights, "freeze": "all", "input_size": 32}
    found = {}
    for name in (device, "cpu"):
        monkeypatch.setenv("HPO_DATA", str(tmp_path / f"cache-{name.replace(':', '')}"))
        for _ in range(2):
            _, result = _train(_task(card, tmp_path, head), name)
            assert result.state is TrialState.COMPLETE, result.traceback
        (file,) = (tmp_path / f"cache-{name.replace(':', '')}").rglob("features.npy")
        found[name] = np.load(file)
    np.testing.assert_allclose(found[device], found["cpu"], atol=0.02 * abs(found["cpu"]).max())


def test_devices_are_found_by_name_and_a_missing_one_is_an_error(cuda, tmp_path, monkeypatch):
    assert resolve_devices("cuda:0") == ["cuda:0"]
    assert resolve_devices("auto") == resolve_devices("cuda") == [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    with pytest.raises(HpoError, match="cuda:97: is not a device of this machine"):
        resolve_devices("cuda:97")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", "digits-mlp", "--trials", "1", "--device", "cuda:97"])
    assert done.exit_code
    assert "cuda:0" in done.output  # what there is
