"""A version copied to another store is whole there, and only once."""

from __future__ import annotations

import contextlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny_study as tiny
from hpo.errors import HpoError
from hpo.home import Home
from hpo.jobs.promote import copy_champion, find_store
from hpo.predict import load_model
from hpo.records import ModelVersion
from hpo.tracking.champions import champions
from hpo.tracking.registry import fetch, set_alias, versions
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker
from hpo.tracking.transfer import import_runs


def _register(tracker: Tracker, folder: Path, number: int) -> ModelVersion:
    candidate = tiny.candidate(number)
    tracker.start_trial(candidate, tiny.spec().with_values(candidate.parameters), worker="w0")
    tracker.end_trial(tiny.result(number))
    tracker.keep_model(number, folder)
    return tracker.register(tiny.study(), number)


@pytest.fixture
def champion(home: Home, tracker: Tracker, folder: Path) -> ModelVersion:
    _register(tracker, folder, 0)
    return set_alias(home, "tiny", "champion", 1, scores={"test_accuracy": 0.875})


@pytest.fixture
def other(tmp_path: Path, template: Path) -> Home:
    other = Home.at(tmp_path / "other").create()
    shutil.copyfile(template, other.root / "mlflow.db")
    return other


def test_a_copy_is_whole_and_running_twice_makes_one_version(
    home: Home, champion: ModelVersion, other: Home, tmp_path: Path
) -> None:
    place = home.root.parent
    first = copy_champion("tiny", to=tmp_path / "other", home=place)
    again = copy_champion("tiny", to=f"sqlite:///{other.root / 'mlflow.db'}", home=place)
    assert first.copy == again.copy
    (copy,) = versions(other)
    assert (copy.version, copy.aliases, copy.study, copy.trial) == (1, ("champion",), "tiny", 0)
    assert copy.scores == champion.scores
    assert copy.origin == home.tracking_uri
    (reign,) = champions(other, "tiny")
    assert reign.why.startswith("copied: version 1 of")
    shutil.rmtree(home.artifacts)  # it stands on its own
    model = load_model("tiny@champion", home=other)
    assert model.predict_proba(np.zeros((2, *tiny.SHAPE), np.uint8)).shape == (2, 3)
    run = connect(other).get_run(copy.run_id)
    assert (run.info.status, run.data.params["seed"]) == ("FINISHED", "100")
    facts = next(other.artifacts.rglob("MLmodel")).read_text()
    assert copy.run_id in facts
    assert champion.run_id not in facts


@pytest.mark.slow
def test_a_champion_of_another_signature_is_replaced_by_force_only(
    home: Home, champion: ModelVersion, other: Home, tracker: Tracker, tmp_path: Path
) -> None:
    place = home.root.parent
    copy_champion("tiny", to=tmp_path / "other", home=place)
    wider = tiny.export_net(tmp_path / "wide", (9, 8, 3))
    _register(tracker, wider, 1)
    refused = copy_champion("tiny/2", to=tmp_path / "other", home=place)
    assert refused.copy is None
    assert "9x8x3" in str(refused.refusal)
    assert len(versions(other)) == 1
    forced = copy_champion("tiny/2", to=tmp_path / "other", home=place, force=True)
    assert (forced.copy.version, forced.copy.aliases, forced.forced) == (2, ("champion",), True)
    assert [reign.forced for reign in champions(other, "tiny")] == [False, True]


def test_a_copy_that_fails_leaves_no_half_of_a_model(
    home: Home, champion: ModelVersion, other: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlflow.MlflowClient.create_model_version", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        copy_champion("tiny", to=tmp_path / "other", home=home.root.parent)
    assert versions(other) == []
    assert not list(other.artifacts.rglob("net.pt2"))
    monkeypatch.undo()
    assert copy_champion("tiny", to=tmp_path / "other", home=home.root.parent).copy.version == 1


def test_what_cannot_be_copied_says_why(home: Home, tracker: Tracker, folder: Path) -> None:
    with pytest.raises(HpoError, match="that is the store"):
        find_store(home.root.parent, home)
    _register(tracker, folder, 0)
    with pytest.raises(HpoError, match="no alias champion"):
        copy_champion("tiny", to=home.root.parent / "elsewhere", home=home.root.parent)


@pytest.mark.long
def test_a_copy_reaches_a_real_server_once(
    server: Home,
    template: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = server.tracking_uri
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    home = Home.at(tmp_path / "mine").create()
    shutil.copyfile(template, home.root / "mlflow.db")
    tracker = Tracker(home)
    tracker.open_study(tiny.study(), tiny.spec(), tiny.data(), tiny.split())
    _register(tracker, folder, 0)
    set_alias(home, "tiny", "champion", 1, scores={"test_accuracy": 0.875})
    copies = [copy_champion("tiny", to=uri, home=tmp_path / "mine").copy for _ in range(2)]
    assert copies[0] == copies[1]
    assert (copies[0].aliases, copies[0].scores["test_accuracy"]) == (("champion",), 0.875)
    assert [len(champions(server, "tiny")), len(versions(server))] == [1, 1]
    expected = load_model("tiny", home=home).predict_proba(np.ones((2, *tiny.SHAPE), np.uint8))
    shutil.rmtree(home.root)
    answered = load_model("tiny@champion", home=server).predict_proba(np.ones((2, *tiny.SHAPE), np.uint8))
    np.testing.assert_array_equal(answered, expected)
    assert len(list((tmp_path / "server").rglob("net.pt2"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["shared server", "none in common"])
def test_two_machines_that_copy_one_champion_at_once_leave_one_version(
    storage: str,
    home: Home,
    champion: ModelVersion,
    other: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.chdir(tmp_path)
    url = request.getfixturevalue("database") if storage == "shared server" else None
    targets = [
        replace(Home.at(tmp_path / name).create(), tracking_uri=f"sqlite:///{other.root / 'mlflow.db'}")
        for name in ("machine 0", "machine 1")
    ]
    targets = [replace(target, storage_url=url or target.storage_url) for target in targets]
    both_looked = threading.Barrier(2)
    look, add, added = import_runs._find_copy, import_runs._add_copy, []

    def look_together(target: Home, name: str, digest: str) -> int | None:
        found = look(target, name, digest)
        with contextlib.suppress(threading.BrokenBarrierError):  # broken where a lock lets one through at a time
            both_looked.wait(timeout=5 if storage == "shared server" else 100)
        return found

    def count(*arguments: object) -> int:
        added.append(arguments)
        return add(*arguments)

    monkeypatch.setattr(import_runs, "_find_copy", look_together)
    monkeypatch.setattr(import_runs, "_add_copy", count)
    with ThreadPoolExecutor(2) as machines:
        copies = list(
            machines.map(lambda target: import_runs.copy_version(home, champion, target, openings=[]).version, targets)
        )
    (copy,) = versions(other)
    assert copies == [copy.version] * 2
    assert len(added) == (1 if storage == "shared server" else 2)
    assert fetch(other, copy, tmp_path)
