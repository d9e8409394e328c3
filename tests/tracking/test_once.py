"""What is sent again because its answer was lost is there once."""

from __future__ import annotations

import contextlib
import functools
import itertools
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_study as tiny
from hpo.errors import StoreAwayError, StoreError
from hpo.home import Home
from hpo.records import TrialState
from hpo.relocation import local_path
from hpo.tracking import models, registry, runs, store, tracker
from hpo.tracking.reader import read_tracking
from hpo.tracking.registry import versions
from hpo.tracking.tracker import Tracker


class _Deaf:
    """A client that loses the answer of every request of every call the first time: it was done, and nobody heard."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.lost: set[tuple[int, str, int]] = set()
        self._call = 0
        self._requests: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)
        if not callable(found):
            return found

        @functools.wraps(found)
        def request(*arguments: Any, **options: Any) -> Any:
            answer = found(*arguments, **options)
            self._requests[name] += 1
            key = (self._call, name, self._requests[name])
            if key not in self.lost:
                self.lost.add(key)
                raise ConnectionResetError(104, "Connection reset by peer")
            return answer

        return request

    def insist(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Call until it works, as the background thread does."""
        self._call += 1
        for _ in range(100):
            self._requests.clear()
            with contextlib.suppress(StoreAwayError):
                call(*arguments, **options)
                return
        raise AssertionError(f"{call} never worked")


def _track(home: Home, folder: Path, do: Callable[..., Any]) -> None:
    one = Tracker(home)
    do(one.open_study, tiny.study(), tiny.spec(), tiny.data(), tiny.split())
    for number, state in enumerate([TrialState.COMPLETE, TrialState.FAILED, TrialState.COMPLETE]):
        candidate = tiny.candidate(number)
        setup = tiny.spec().with_values(candidate.parameters)
        do(one.start_trial, candidate, setup, worker="w0", started=1.7e9)
        result = tiny.result(number, state, ended=1.7e9 + 5, traceback="line 1")
        do(one.log_epochs, number, result.epochs, ended=result.ended)
        do(one.end_trial, result)
    study = tiny.study(tiny.trial(0), tiny.trial(1, TrialState.FAILED), tiny.trial(2))
    do(one.keep_model, 0, folder)
    do(one.keep_model, 2, folder)
    do(one.drop_model, 0)
    do(one.register, study, 2)
    do(one.close_study, study, status="FINISHED", summary="# study")


def _state(home: Home) -> Any:
    """All that can be told apart of a store, without its ids and its own clock."""
    client = store.connect(home)
    parent = runs.find_parent(client, tiny.study())
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    every = client.search_runs([experiment.experiment_id])
    assert sum(runs.TRIAL not in run.data.tags for run in every) == 1

    def shown(run: Any) -> Any:
        names = sorted(run.data.metrics)
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        rows = {name: [(m.step, m.value, m.timestamp) for m in found] for name, found in histories.items()}
        files = sorted(item.path for item in client.list_artifacts(run.info.run_id))
        tags = {name for name in run.data.tags if not name.startswith("mlflow.")}
        return run.info.run_name, run.info.status, rows, run.data.params, tags, files, len(run.inputs.dataset_inputs)

    models = client.search_logged_models([experiment.experiment_id])
    nets = sorted(path.name for path in home.artifacts.rglob("net.pt2"))
    found = [shown(run) for run in sorted(runs.children(client, parent), key=lambda run: run.info.run_name)]
    registered = [(version.version, version.aliases, version.trial) for version in versions(home)]
    return [shown(parent), *found], len(models), nets, registered


@pytest.mark.slow
def test_a_store_whose_every_answer_is_lost_once_ends_as_one_that_answers(
    home: Home, folder: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _track(home, folder, lambda call, *arguments, **options: call(*arguments, **options))
    other = Home.find(tmp_path / "other").create()
    shutil.copyfile(template, other.root / "mlflow.db")
    deaf = _Deaf(store.connect(other))
    with monkeypatch.context() as patch:
        patch.setattr(tracker, "connect", lambda _: deaf)
        _track(other, folder, deaf.insist)
    assert len(deaf.lost) > 30
    assert _state(other) == _state(home)


def _die_at(home: Home, folder: Path, step: int, name: Any) -> None:
    """End a study in this process, which dies at request number `step` from the first model on; name gets its name."""
    made = store.connect(home)

    class Dying:
        requests = 0

        def __getattr__(self, asked: str) -> Any:
            found = getattr(made, asked)
            return functools.partial(self.request, asked, found) if callable(found) else found

        def request(self, asked: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            Dying.requests += bool(Dying.requests or asked == "create_logged_model")
            if Dying.requests == step:
                name.value = asked.encode()
                os._exit(9)
            return call(*arguments, **options)

    dying = Dying()
    for module in (tracker, registry):
        module.connect = lambda _: dying
    delete = models.delete_artifacts
    models.delete_artifacts = lambda _, place, part=None: (
        dying.request("delete_artifacts", lambda: Path(local_path(place), "MLmodel").unlink(missing_ok=True)),
        dying.request("delete_artifacts, begun", delete, made, place, part),
    )
    _track(home, folder, lambda call, *arguments, **options: call(*arguments, **options))
    os._exit(0)


def _loads(home: Home) -> int:
    """Load every version as MLflow alone does, and ask it; returns how many there are."""
    mlflow = store.load_mlflow()
    mlflow.set_tracking_uri(home.tracking_uri)
    found = mlflow.MlflowClient().search_model_versions()
    images = np.zeros((1, *tiny.SHAPE), np.uint8)
    for version in found:
        assert mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}").predict(images).shape == (1, 3)
    mlflow.set_tracking_uri(None)
    return len(found)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_any_request_every_version_has_its_model_and_what_counts_as_kept_can_be_registered(
    exported: Path, template: Path, tmp_path: Path
) -> None:
    study = tiny.study(tiny.trial(0), tiny.trial(1, TrialState.FAILED), tiny.trial(2))
    fork = multiprocessing.get_context("fork")
    name, steps = fork.Array("c", 40), []
    store.load_mlflow()
    for step in itertools.count(1):
        home = Home.at(tmp_path / str(step)).create()
        shutil.copyfile(template, home.root / "mlflow.db")
        folder = Path(shutil.copytree(exported, home.work / "left"))
        child = fork.Process(target=_die_at, args=(home, folder, step, name))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        steps.append(name.value.decode())
        _loads(home)
        one = Tracker(home)
        one.open_study(study, tiny.spec(), tiny.data(), tiny.split())
        one.reconcile(study, tiny.spec())
        kept = one.kept_models(study)
        for number in kept:
            one.register(study, number)
        assert len(kept) <= _loads(home) <= 2, (step, steps[-1])
        tagged = {run.tags[runs.TRIAL] for run in read_tracking(home).runs if runs.MODEL in run.tags}
        assert tagged == {*map(str, kept)}, (step, steps[-1])
        shutil.rmtree(home.root)
    assert {"finalize_logged_model", "set_tag", "create_model_version", "delete_artifacts, begun"} <= {*steps}


def test_a_study_that_is_closed_twice_in_one_state_says_so_once(home: Home) -> None:
    one, study = Tracker(home), tiny.study(tiny.trial(0))
    one.open_study(study, tiny.spec(), tiny.data(), tiny.split())
    for _ in range(2):
        one.close_study(study, status="FINISHED", summary="")
    client = store.connect(home)
    run_id = runs.find_parent(client, study).info.run_id
    assert len(client.get_metric_history(run_id, "study/best_value")) == 1


def test_a_server_that_nobody_answers_is_away(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    away = Home.find(home.root.parent)
    with pytest.raises(StoreAwayError, match="nothing answers there"):
        store.check_reachable(away)
    from mlflow import MlflowClient

    @store.translate_errors
    def ask(_: Home) -> None:
        MlflowClient("http://127.0.0.1:9").search_experiments()

    with pytest.raises(StoreAwayError, match="Connection refused"):
        ask(away)


def test_a_call_that_is_wrong_is_not_taken_for_an_outage(home: Home) -> None:
    @store.translate_errors
    def ask(place: Home) -> None:
        store.connect(place).get_run("0" * 32)

    with pytest.raises(StoreError) as refused:
        ask(home)
    assert not isinstance(refused.value, StoreAwayError)


@pytest.mark.parametrize("before", ["none", "deleted"])
def test_two_processes_that_look_for_one_experiment_at_once_find_one(
    before: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = store.connect(home)
    if before == "deleted":
        client.delete_experiment(client.create_experiment("tiny"))
    look, stale = client.get_experiment_by_name, [client.get_experiment_by_name("tiny")]
    first = runs.experiment(client, home, "tiny")
    monkeypatch.setattr(client, "get_experiment_by_name", lambda name: stale.pop() if stale else look(name))
    assert runs.experiment(client, home, "tiny") == first
    assert not stale
    assert look("tiny").lifecycle_stage == "active"
