"""Real worker processes: they train, answer verdicts, die, and are replaced."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.events import EpochEnded, TrialEnded
from hpo.execute.engines.base import WorkerLost
from hpo.execute.engines.local import LocalProcesses
from hpo.execute.process import process_context
from hpo.execute.workers.job_process import JobProcess
from hpo.execute.workers.job_process import prepare as prepare_in_helper
from hpo.execute.workers.task import Task, train_task
from hpo.records import TrialState
from hpo.spec.load import load_study

SPEC = load_study("digits-mlp", overrides=["training.epochs=3", "training.precision=float32"])


@pytest.fixture(scope="module")
def processes():
    engine = LocalProcesses(["cpu", "cpu"], threads=1)
    yield engine
    engine.close()


def _task(card, tmp_path, number=0, *, wait=False, setup=None):
    return Task(number, setup or SPEC.setup, 7, card, str(tmp_path / str(number)), wait=wait)


def test_processes_see_the_environment_of_now_not_of_the_fork_server(processes, tmp_path, monkeypatch):
    """A notebook that says where data lies after its first study must not have it prepared somewhere else."""
    monkeypatch.setenv("HPO_DATA", str(tmp_path))
    helper = JobProcess(process_context())
    try:
        prepared = helper.submit(prepare_in_helper, SPEC, "cpu").result(60)
    finally:
        helper.close()
    assert Path(prepared.data.folder).is_relative_to(tmp_path)


def _until_end(engine, *, verdict=None, seconds=60):
    messages, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        for slot, message in engine.poll(0.5):
            messages.append((slot, message))
            if isinstance(message, EpochEnded) and verdict is not None:
                engine.verdict(slot, go_on=verdict(message))
            if isinstance(message, TrialEnded | WorkerLost):
                return messages
    raise AssertionError(f"no end after {seconds} s: {messages}")


def test_a_killed_worker_is_noticed_at_once_and_replaced(processes, card, tmp_path):
    setup = load_study("digits-mlp", overrides=["training.epochs=10000", "training.patience=null"]).setup
    processes.submit(1, _task(card, tmp_path, setup=setup))
    while not processes.poll(0.5):
        pass
    started = time.monotonic()
    os.kill(processes._workers[1].process.pid, signal.SIGKILL)
    slot, lost = _until_end(processes)[-1]
    assert (slot, lost) == (1, WorkerLost(-signal.SIGKILL))
    assert time.monotonic() - started < 5
    processes.submit(1, _task(card, tmp_path, 1))
    assert _until_end(processes)[-1][1].result.state is TrialState.COMPLETE


def test_workers_import_neither_mlflow_nor_optuna():
    modules = "hpo.training.preload, hpo.execute.workers.task"
    code = f"import sys, {modules}; print(*{{'torch', 'mlflow', 'optuna', 'typer'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["torch"]


@pytest.fixture(scope="module")
def stacked():
    engine = LocalProcesses(["cpu"], threads=1, stack=3)
    yield engine
    engine.close()


def _all_ends(engine, count, *, verdict=None, seconds=60):
    results, deadline = {}, time.monotonic() + seconds
    while len(results) < count and time.monotonic() < deadline:
        for slot, message in engine.poll(0.5):
            if isinstance(message, EpochEnded) and verdict is not None:
                engine.verdict(slot, go_on=verdict(message))
            if isinstance(message, TrialEnded):
                results[slot] = message.result
    return results


def test_trials_side_by_side_share_a_computation_and_learn_as_they_do_alone(stacked, processes, card, tmp_path):
    tasks = [replace(_task(card, tmp_path, number), seed=number) for number in range(3)]
    for slot, task in enumerate(tasks):
        stacked.submit(slot, task)
    together = _all_ends(stacked, 3)
    for number, task in enumerate(tasks):
        assert together[number].settings["stack"] == "shared"
        processes.submit(0, replace(task, folder=str(tmp_path / f"alone{number}")))
        alone = _until_end(processes)[-1][1].result
        assert together[number].number == alone.number == number
        for one, other in zip(together[number].epochs, alone.epochs, strict=True):
            assert one.scores["valid_loss"] == pytest.approx(other.scores["valid_loss"], abs=1e-3)
    # One epoch is one computation: its time is shared.
    assert len({result.epochs[1].seconds for result in together.values()}) == 1


def test_a_pruned_trial_leaves_the_others_to_train_on(stacked, card, tmp_path):
    for slot in range(3):
        stacked.submit(slot, _task(card, tmp_path, slot, wait=True))
    ends = _all_ends(stacked, 3, verdict=lambda message: message.number != 1)
    assert [ends[slot].state for slot in range(3)] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    assert [len(ends[slot].epochs) for slot in range(3)] == [3, 1, 3]


def test_trainings_that_share_with_none_come_one_after_another(stacked, card, tmp_path):
    training = SPEC.setup.training.model_copy(update={"micro_batch": 8})
    setup = SPEC.setup.model_copy(update={"training": training})
    for slot in range(3):
        stacked.submit(slot, _task(card, tmp_path, slot, setup=setup))
    heard, deadline = [], time.monotonic() + 60
    while len(heard) < 12 and time.monotonic() < deadline:
        heard += [slot for slot, _ in stacked.poll(0.5)]
    assert heard == sorted(heard) == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.slow
def test_trainings_whose_shared_computation_fails_go_on_alone(card, tmp_path, monkeypatch):
    from hpo.training.stack import Stacks
    from hpo.training.stack_nets import StackedNets

    whole, tried = StackedNets.forward, []

    def no_room(self, *given, **options):
        tried.append(1)
        if len(tried) == 2:
            raise MemoryError("no room")
        return whole(self, *given, **options)

    monkeypatch.setattr(StackedNets, "forward", no_room)
    stacks = Stacks(2)
    trainings = [train_task(_task(card, tmp_path, number), "cpu", stacks) for number in range(2)]
    assert [next(training) for training in trainings] == [None, None]
    for number, training in enumerate(trainings):
        result = _result(training)
        assert result.state is TrialState.COMPLETE
        assert result.settings["stack"] == "alone: the computation that it shared failed: MemoryError: no room"
        assert "micro_batch" not in result.settings
        alone = train_task(_task(card, tmp_path, number), "cpu")
        next(alone)
        assert [one.scores for one in result.epochs] == [one.scores for one in _result(alone).epochs]


def _result(training):
    """Of a training that has begun, and is never to stop."""
    while not isinstance(message := training.send(True), TrialEnded):
        pass
    return message.result


def test_a_task_that_is_to_be_alone_waits_for_its_process_and_keeps_it(card, tmp_path):
    engine = LocalProcesses(["cpu"], threads=1, stack=3)
    try:
        engine.submit(0, _task(card, tmp_path, 0, wait=True))
        while not (told := engine.poll(0.5)):
            pass
        assert engine.accepts(1)
        engine.submit(1, replace(_task(card, tmp_path, 1), exclusive=True))
        assert not engine.accepts(2)
        assert engine.poll(0.5) == []  # it waits
        engine.verdict(0, go_on=False)
        ends = _all_ends(engine, 2)
        assert told[0][0] == 0
        assert [ends[slot].state for slot in range(2)] == [TrialState.PRUNED, TrialState.COMPLETE]
        assert engine.accepts(2)
    finally:
        engine.close()


def test_a_task_that_waits_to_be_alone_outlives_the_worker_that_it_waits_for(card, tmp_path):
    engine = LocalProcesses(["cpu"], threads=1, stack=2)
    try:
        engine.submit(0, _task(card, tmp_path, 0, wait=True))
        while not engine.poll(0.5):
            pass
        engine.submit(1, replace(_task(card, tmp_path, 1), exclusive=True))
        engine._workers[0].process.kill()
        messages = _until_end(engine)
        assert [slot for slot, message in messages if isinstance(message, WorkerLost)] == [0]
        messages += _until_end(engine)
        assert messages[-1][0] == 1
        assert messages[-1][1].result.state is TrialState.COMPLETE
    finally:
        engine.close()


def test_all_trials_of_a_worker_that_dies_are_lost_and_its_places_free_again(card, tmp_path):
    engine = LocalProcesses(["cpu"], threads=1, stack=2)
    try:
        setup = SPEC.with_values({"training.epochs": 10000})
        for slot in range(2):
            engine.submit(slot, _task(card, tmp_path, slot, setup=setup))
        while not engine.poll(0.5):
            pass
        engine._workers[0].process.kill()
        lost = {}
        while len(lost) < 2:
            lost |= {slot: message for slot, message in engine.poll(0.5) if isinstance(message, WorkerLost)}
        assert {slot: message.exitcode for slot, message in lost.items()} == {0: -9, 1: -9}
        engine.submit(1, _task(card, tmp_path, 7))
        assert _until_end(engine)[-1][1].result.state is TrialState.COMPLETE
    finally:
        engine.close()
