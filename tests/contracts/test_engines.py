"""The contract of engines: every entry of ENGINES trains, takes verdicts, reports failures and deaths, and closes."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest

from hpo.errors import HpoError
from hpo.events import EpochEnded, TrialEnded
from hpo.execute.engines import ENGINES, engine_factory
from hpo.execute.engines.base import StudyWork, WorkerLost
from hpo.execute.engines.in_process import InProcess
from hpo.execute.engines.ray import RayActors
from hpo.execute.workers.ray_actor import WorkerSetup
from hpo.execute.workers.task import Task
from hpo.options import RunOptions
from hpo.records import TrialState
from hpo.spec.load import load_study
from hpo.spec.models import CnnSpec
from study_fixtures import cluster  # noqa: F401 - a fixture

SPEC = load_study("digits-mlp", overrides=["training.epochs=3", "training.precision=float32"])
ENDLESS = SPEC.with_values({"training.epochs": 100_000, "training.patience": None})


@dataclass
class Subject:
    """An engine with two slots, or with one where it can have no more; kill ends the worker of a slot."""

    engine: Any
    kill: Any = None

    def ready(self, slot: int = 0) -> None:
        deadline = time.monotonic() + 120
        while not self.engine.accepts(slot):
            assert time.monotonic() < deadline, "the slot never accepts a task"
            assert self.engine.poll(0.5) == []

    def submit(self, slot: int, task: Task) -> None:
        self.ready(slot)
        self.engine.submit(slot, task)

    def until(self, *kinds: type, verdict: Any = None, slot: int | None = None) -> list[tuple[int, Any]]:
        """(slot, message) of all messages up to the first of these kinds."""
        messages, deadline = [], time.monotonic() + 120
        while time.monotonic() < deadline:
            for number, message in self.engine.poll(0.5):
                messages.append((number, message))
                if isinstance(message, EpochEnded) and verdict is not None:
                    self.engine.verdict(number, go_on=verdict(message))
            if any(isinstance(message, kinds) and slot in (None, number) for number, message in messages):
                return messages
        raise AssertionError(f"no {kinds}: {messages}")


def _in_process(request: pytest.FixtureRequest) -> Subject:
    return Subject(InProcess())


def _processes(request: pytest.FixtureRequest) -> Subject:
    factory = engine_factory(RunOptions(workers=2, device="cpu"))
    work = StudyWork(SPEC, request.getfixturevalue("card"), print)
    engine: Any = factory.start(factory.plan(["cpu"], most=9), work, stack=1)
    return Subject(engine, lambda slot: os.kill(engine._workers[slot].process.pid, signal.SIGKILL))


def _ray(request: pytest.FixtureRequest) -> Subject:
    ray = request.getfixturevalue("cluster")
    needs = WorkerSetup(SPEC.data, SPEC.split, request.getfixturevalue("card"))
    engine = RayActors(needs, slots=2, cpus=ray.cpus)
    return Subject(engine, lambda slot: ray._ray.kill(engine._slots[slot].actor))


MAKERS = {"in_process": _in_process, "processes": _processes, "ray": _ray}
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name == "ray" else []) for name in MAKERS]


@pytest.fixture(scope="module", params=NAMES)
def tested(request):
    made = MAKERS[request.param](request)
    yield made
    made.engine.close()


def _task(card, folder, number=0, *, wait=False, setup=None):
    return Task(number, setup or SPEC.setup, 7, card, str(folder / str(number)), wait=wait)


def test_every_engine_of_the_table_is_under_contract():
    assert MAKERS.keys() == ENGINES.keys()


def test_an_idle_engine_accepts_a_task_and_has_no_message(tested):
    tested.ready()
    assert tested.engine.poll(0.0) == []


def test_a_worker_trains_bit_for_bit_as_the_calling_process_does(tested, card, tmp_path):
    import torch

    torch.set_num_threads(1)
    ends = []
    for other, folder in ((tested, tmp_path / "a"), (Subject(InProcess()), tmp_path / "b")):
        other.submit(0, _task(card, folder))
        messages = other.until(TrialEnded)
        assert [message.epoch.number for _, message in messages[:-1]] == [1, 2, 3]
        assert {slot for slot, _ in messages} == {0}
        ends.append(messages[-1][1].result)
    assert ends[0].state is TrialState.COMPLETE
    assert [epoch.scores for epoch in ends[0].epochs] == [epoch.scores for epoch in ends[1].epochs]
    written = [
        {file.name: file.read_bytes() for file in Path(end.folder).iterdir() if file.suffix != ".npz"} for end in ends
    ]
    assert "weights.safetensors" in written[0]
    assert written[0] == written[1]
    assert ends[0].folder == str(tmp_path / "a" / "0")


def test_a_verdict_ends_a_trial_as_pruned(tested, card, tmp_path):
    tested.submit(0, _task(card, tmp_path, wait=True))
    messages = tested.until(TrialEnded, verdict=lambda message: message.epoch.number < 2)
    result = messages[-1][1].result
    assert result.state is TrialState.PRUNED
    assert len(result.epochs) == 2
    assert not (tmp_path / "0").exists()


def test_a_failed_candidate_reports_why_and_its_worker_trains_the_next(tested, card, tmp_path):
    setup = SPEC.setup.model_copy(update={"model": CnnSpec(kind="cnn", kernel=9, padding="valid")})
    tested.submit(0, _task(card, tmp_path, setup=setup))
    result = tested.until(TrialEnded)[-1][1].result
    assert result.state is TrialState.FAILED
    assert "does not fit" in result.reason
    assert "Traceback" in result.traceback
    assert result.settings == {"device": "cpu", "threads": "1", **({"node": ANY} if "node" in result.settings else {})}
    tested.submit(0, _task(card, tmp_path, 1))
    assert tested.until(TrialEnded)[-1][1].result.state is TrialState.COMPLETE


def test_slots_train_at_the_same_time_and_messages_name_theirs(tested, card, tmp_path):
    for slot in range(tested.engine.slots):
        tested.ready(slot)  # all of them before any trains and has something to say
    for slot in range(tested.engine.slots):
        tested.engine.submit(slot, _task(card, tmp_path, slot, wait=True))
    seen: dict[int, list[int]] = {slot: [] for slot in range(tested.engine.slots)}
    deadline = time.monotonic() + 120
    while not all(seen.values()) and time.monotonic() < deadline:
        for slot, message in tested.engine.poll(0.5):
            seen[slot].append(message.number)
    assert seen == {slot: [slot] for slot in seen}, "every slot has trained an epoch and waits for its verdict"
    for slot in seen:
        tested.engine.verdict(slot, go_on=False)
    ends: dict[int, TrialState] = {}
    while len(ends) < len(seen) and time.monotonic() < deadline:
        ends |= {slot: message.result.state for slot, message in tested.engine.poll(0.5)}
    assert ends == dict.fromkeys(seen, TrialState.PRUNED)


def test_a_killed_worker_is_noticed_and_replaced(tested, card, tmp_path):
    if tested.kill is None:
        pytest.skip("the worker is this process")
    tested.submit(1, _task(card, tmp_path, setup=ENDLESS))
    tested.until(EpochEnded)
    tested.kill(1)
    slot, lost = tested.until(WorkerLost)[-1]
    assert slot == 1
    assert lost.cause
    tested.submit(1, _task(card, tmp_path, 1))
    assert tested.until(TrialEnded, slot=1)[-1][1].result.state is TrialState.COMPLETE


@pytest.mark.parametrize("name", NAMES)
def test_closing_ends_what_runs_and_may_be_repeated(name, request, card, tmp_path):
    tested = MAKERS[name](request)
    tested.submit(0, _task(card, tmp_path, setup=ENDLESS))
    tested.until(EpochEnded)
    tested.engine.close()
    tested.engine.close()


def test_the_table_is_asked_by_name_and_no_workers_means_this_process():
    assert type(engine_factory(RunOptions())).__name__ == "ProcessesFactory"
    assert type(engine_factory(RunOptions(workers=0))).__name__ == "InProcessFactory"
    with pytest.raises(HpoError, match="--engine abacus: there is no such engine"):
        engine_factory(RunOptions(engine="abacus"))
