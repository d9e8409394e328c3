"""One trial in several processes: gloo on two CPU processes stands for NCCL on two GPUs."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpo.data.prepare import prepare
from hpo.errors import HpoError
from hpo.events import EpochEnded
from hpo.execute.engines.base import WorkerLost, group_devices
from hpo.execute.engines.local import LocalProcesses, ProcessesFactory
from hpo.execute.run_study import run_study
from hpo.execute.workers.task import Task, train_task
from hpo.jobs.rerun import Agreement, rerun
from hpo.models import WEIGHTS
from hpo.options import RunOptions
from hpo.records import FailureKind, TrialState
from hpo.spec.load import load_study
from hpo.spec.models import CnnSpec, MlpSpec, OwnModelSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import OptimizerSpec, TrainingSpec
from hpo.training.data_parallel import BACKENDS, Ranks, device_of
from no_pictures import draw_nothing

SGD = OptimizerSpec(name="sgd", lr=0.05, momentum=0.9)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def card(cache):
    return prepare(DataSpec(name="digits"), SplitSpec(kind="holdout"), cache=cache)


@pytest.fixture
def task(card, tmp_path):
    """task(model, training settings) of the digits, in two ranks."""

    def make(model=None, *, ranks=2, folder="left", file="", **training):
        setup = Setup(
            data=DataSpec(name="digits"),
            split=SplitSpec(kind="holdout"),
            model=model or MlpSpec(kind="mlp", hidden=[16]),
            training=TrainingSpec(**{"epochs": 2, "optimizer": SGD, "precision": "float32", **training}),
        )
        return Task(0, setup, 7, card, str(tmp_path / folder), ranks=ranks, checkpoint=str(file))

    return make


def _own(name, **options):
    return OwnModelSpec(kind=f"troubled_nets:{name}", options=options)


def _run(task, *, epochs=99):
    """The epochs and the result of a task; after so many epochs it is pruned."""
    training = train_task(task, "cpu")
    message, seen = next(training), []
    while isinstance(message, EpochEnded):
        seen.append(replace(message.epoch, seconds=0.0))
        message = training.send(len(seen) < epochs)
    assert multiprocessing.active_children() == []
    return seen, message.result


# 1,150 images in batches of 37 leave three, which are too few to be divided.
RICH = {
    "batch_size": 37,
    "micro_batch": 5,
    "class_weights": "balanced",
    "clip_norm": 1.0,
    "ema": 0.9,
    "augment": {"rotate": 10, "crop": 1, "mixup": 0.4},
    "data_growth": 0.5,
}


CNN = CnnSpec(kind="cnn", filters=4, kernel=3)
LIKE_ONE = {
    "plain": (CNN, {"batch_size": 37, "epochs": 1}, 1e-6),
    "rich": (CNN, RICH, 1e-5),
    "thawing": (OwnModelSpec(kind="troubled_nets:thawing"), {"batch_size": 128}, 1e-6),
}


@pytest.mark.parametrize("case", LIKE_ONE)
def test_two_processes_learn_what_one_learns(task, tmp_path, case):
    model, training, tolerance = LIKE_ONE[case]
    (alone, one), (together, two) = (_run(task(model, ranks=ranks, folder=str(ranks), **training)) for ranks in (1, 2))
    assert (one.state, two.state) == (TrialState.COMPLETE,) * 2
    assert (two.settings["ranks"], two.settings["device"]) == ("2", "cpu")
    for before, after in zip(alone, together, strict=True):
        assert after.scores == pytest.approx(before.scores, abs=100 * tolerance)
        assert (after.learning_rate, after.last) == (before.learning_rate, before.last)
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in "12")
    for name, weights in first.items():
        torch.testing.assert_close(second[name], weights, atol=tolerance, rtol=0)


def test_a_training_that_was_cut_off_goes_on_exactly_with_dropout_and_batch_norm(task, tmp_path):
    model = MlpSpec(kind="mlp", hidden=[16], dropout=0.3, batch_norm=True)
    given = {"epochs": 4, "batch_size": 37, "checkpoint": 1, "optimizer": OptimizerSpec(name="adamw", lr=0.01)}
    whole, _ = _run(task(model, **given))
    given |= {"file": tmp_path / "checkpoint"}
    cut = train_task(task(model, **given), "cpu")
    assert [next(cut).epoch.number, cut.send(True).epoch.number] == [1, 2]
    cut.close()
    assert multiprocessing.active_children() == []
    resumed, result = _run(task(model, **given))
    assert result.state is TrialState.COMPLETE
    assert resumed == whole
    # A training alone is another one: it does not continue from this file.
    alone, _ = _run(task(model, ranks=1, **given), epochs=1)
    assert alone[0].scores != whole[0].scores


def test_a_pruned_trial_ends_in_all_processes_which_drop_out_different_neurons(task, tmp_path):
    note = tmp_path / "note"
    seen, result = _run(task(_own("noting", note=str(note)), epochs=50), epochs=1)
    assert (len(seen), result.state) == (1, TrialState.PRUNED)
    lines = [line.split() for line in note.read_text().splitlines()]
    pids = {pid for pid, _ in lines}
    assert len(pids) == 2
    assert not any(_lives(int(pid)) for pid in pids)
    assert str(os.getpid()) not in pids
    first, second = ({mask for pid, mask in lines if pid == each} for each in pids)
    assert first.isdisjoint(second)


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.parametrize(
    ("how", "failure", "reason"),
    [
        ("kill the second", FailureKind.WORKER_DIED, "process 2 of 2 of the trial died (signal 9, SIGKILL"),
        ("exit", FailureKind.WORKER_DIED, "of the trial died (exit code 3)"),
        ("fail in the second", FailureKind.EXCEPTION, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_process_that_fails_is_the_reason_of_its_trial(task, how, failure, reason):
    seen, result = _run(task(_own("crashing", how=how)))
    assert seen == []
    assert (result.state, result.failure) == (TrialState.FAILED, failure)
    assert reason in result.reason
    assert _run(task(_own("crashing", how="never")))[1].state is TrialState.COMPLETE


def test_a_loss_that_is_not_finite_and_a_lack_of_memory_are_those_of_the_whole_trial(task, tmp_path):
    diverging = OptimizerSpec(name="sgd", lr=100.0, momentum=0.99)
    _, result = _run(task(MlpSpec(kind="mlp", hidden=[64, 64, 64]), optimizer=diverging))
    assert result.failure is FailureKind.NOT_FINITE
    note = tmp_path / "seen"
    _, result = _run(task(_own("hungry", room=8, note=str(note)), batch_size=32))
    assert (result.state, result.settings["micro_batch"]) == (TrialState.COMPLETE, "8")
    counts = note.read_text().split()
    assert counts[0] == "16"
    assert counts[-1] in {"7", "8"}


@pytest.fixture
def study(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("HPO_DATA", str(cache))
    monkeypatch.setattr("hpo.execute.subscribers.tracking.draw_study", draw_nothing)

    def run(text, **options):
        path = tmp_path / "both.yaml"
        path.write_text(
            "data: {name: digits}\nsplit: {kind: holdout}\n"
            f"training: {{epochs: 3, batch_size: 64, precision: float32}}\nkeep: {{models: none}}\n{text}"
        )
        spec = load_study(path, trust=True)
        return run_study(spec, home=tmp_path, device="cpu", gpus_per_trial=2, **options)

    return run


@pytest.mark.slow
def test_a_study_goes_on_after_a_process_was_killed_and_trains_a_trial_again(study, tmp_path):
    done = study(
        "model: {kind: 'troubled_nets:crashing', options: {how: never}}\n"
        "search: {trials: 2, sampler: grid, space: {model.options.how: {choice: [kill the second, never]}}}\n",
        workers=0,
    )
    killed, good = done.trials
    assert (killed.state, good.state) == (TrialState.FAILED, TrialState.COMPLETE)
    assert "process 2 of 2 of the trial died (signal 9" in killed.result.reason
    assert good.result.settings["ranks"] == "2"
    again = rerun(f"both#{good.number}", home=tmp_path, trust=True)
    assert again.agreement is Agreement.EQUAL


PRUNED = (
    "model: {kind: mlp, hidden: [16]}\n"
    "search: {trials: 2, sampler: grid, pruner: {name: median, startup_trials: 1, warmup_epochs: 1}, "
    "space: {training.optimizer.lr: {choice: [1.0e-2, 1.0e-6]}}}\n"
)


@pytest.mark.slow
def test_a_study_of_worker_processes_prunes(study):
    done = study(PRUNED, workers=1)
    assert {trial.state for trial in done.trials} == {TrialState.COMPLETE, TrialState.PRUNED}
    assert all(trial.result.settings["ranks"] == "2" for trial in done.trials)


@pytest.mark.slow
def test_no_process_of_a_trial_outlives_its_worker(task, tmp_path):
    note = tmp_path / "note"
    engine = LocalProcesses(["cpu"], threads=1)
    try:
        engine.submit(0, task(_own("noting", note=str(note)), epochs=10_000))
        while not engine.poll(0.5):
            pass
        pids = {int(line.split()[0]) for line in note.read_text().splitlines()}
        assert len(pids) == 2
        assert all(map(_lives, pids))
        os.kill(engine._workers[0].process.pid, signal.SIGKILL)
        while not (messages := [each for _, each in engine.poll(0.5) if isinstance(each, WorkerLost)]):
            pass
        assert messages == [WorkerLost(-signal.SIGKILL)]
        deadline = time.monotonic() + 30
        while any(map(_lives, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        engine.close()


GPUS = [f"cuda:{index}" for index in range(5)]


def test_gpus_are_dealt_in_groups_and_never_shared():
    assert group_devices(GPUS, RunOptions(gpus_per_trial=2)) == ["cuda:0", "cuda:2"]
    assert group_devices(GPUS, RunOptions()) == GPUS
    plan = ProcessesFactory(RunOptions(gpus_per_trial=2)).plan(GPUS, most=9)
    assert (plan.devices, plan.ranks) == (("cuda:0", "cuda:2"), 2)
    assert plan.description == "cuda:0, cuda:2, each trial in 2 processes"
    assert [device_of("cuda:2", rank) for rank in range(2)] == ["cuda:2", "cuda:3"]
    assert device_of("cpu", 1) == "cpu"
    assert "nccl" in BACKENDS["cuda"]


@pytest.mark.parametrize(
    ("devices", "options", "words"),
    [
        (["cpu"], {"gpus_per_trial": 2}, "--gpus-per-trial 2: needs 2 GPUs, and there are 0 here"),
        (["mps"], {"gpus_per_trial": 2}, "there are 0 here"),
        (["cuda:1"], {"gpus_per_trial": 2, "device": "cuda:1"}, "there are 1 here"),
        (GPUS, {"gpus_per_trial": 2, "workers": 3}, "--workers 3 --gpus-per-trial 2: needs 6 GPUs, and there are 5"),
    ],
)
def test_too_few_gpus_are_refused(devices, options, words):
    with pytest.raises(HpoError, match=words):
        ProcessesFactory(RunOptions(**options)).plan(devices, most=9)


@pytest.mark.parametrize("given", [{"gpus_per_trial": 0.5}, {"gpus_per_trial": 0}, {"gpus_per_trial": 2, "stack": 4}])
def test_options_that_make_no_sense_are_refused(given):
    with pytest.raises(HpoError, match="--gpus-per-trial"):
        RunOptions(**given)


@pytest.mark.parametrize("images", [1, 3, 4, 5, 37])
def test_every_image_of_a_batch_counts_once(images):
    counts = torch.zeros(images)
    for rank in range(2):
        part, weight = Ranks(rank, 2).part(images)
        counts[part] += weight
    assert counts.tolist() == [1.0] * images
