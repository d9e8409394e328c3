"""The contract of tracking stores, of their registry and of test openings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny_study as tiny
from hpo.errors import ModelError
from hpo.home import Home
from hpo.predict import load_model
from hpo.records import ModelVersion
from hpo.tracking.champions import champions, record_champion
from hpo.tracking.ledger import Opening, announce_opening, complete_opening, openings
from hpo.tracking.reader import read_tracking
from hpo.tracking.registry import fetch, resolve, set_alias, versions
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker
from tracked_store import Register, Store, Tracked
from tracking_fixtures import tracking_server


def test_the_same_trial_registers_once_and_its_model_is_never_dropped(tracked: Tracked, register: Register) -> None:
    first = register(4)
    assert tracked.tracker.register(tracked.study(), 4) == first
    assert (first.version, first.trial, first.study, first.aliases) == (1, 4, tracked.name, ("challenger",))
    assert first.scores == {"valid_accuracy": 0.904, "valid_loss": 0.4}
    kept = tracked.tracker.kept_models(tracked.study())
    tracked.tracker.drop_model(4)
    assert tracked.tracker.kept_models(tracked.study()) == kept
    assert fetch(tracked.home, first, tracked.home.work).is_dir()


def test_a_registered_model_predicts(tracked: Tracked, register: Register) -> None:
    register(0)
    model = load_model(tracked.name, home=tracked.home)
    assert model.predict_proba(np.zeros((2, *tiny.SHAPE), np.uint8)).shape == (2, 3)


def test_the_challenger_moves_to_what_was_registered_last(tracked: Tracked, register: Register) -> None:
    register(0)
    register(1)
    home, name = tracked.home, tracked.name
    assert [(v.version, v.aliases) for v in versions(home, name)] == [(2, ("challenger",)), (1, ())]
    tracked.tracker.register(tracked.study(), 0)
    assert [(v.version, v.aliases) for v in versions(home, name)] == [(2, ()), (1, ("challenger",))]


def test_a_trial_whose_model_was_not_kept_is_not_registered(tracked: Tracked) -> None:
    tracked.start(0, 1)
    with pytest.raises(ModelError, match="model of trial 0 was not kept"):
        tracked.tracker.register(tracked.study(), 0)


def test_a_bare_name_is_the_champion_and_else_the_challenger(tracked: Tracked, register: Register) -> None:
    first, second = register(0), register(1)
    home, name = tracked.home, tracked.name
    assert resolve(home, name).version == second.version
    promoted = set_alias(home, name, "champion", 1, scores={"test_accuracy": 0.875}, tags={"why": "gate"})
    assert promoted.scores["test_accuracy"] == 0.875
    assert resolve(home, name).version == first.version


def test_names_aliases_versions_and_uris_resolve_to_the_same_version(tracked: Tracked, register: Register) -> None:
    version, home, name = register(0), tracked.home, tracked.name
    for model in (f"{name}@challenger", f"{name}/1", f"models:/{name}/1", f"models:/{name}@challenger"):
        assert resolve(home, model) == version
    logged = resolve(home, tracked.tracker.kept_models(tracked.study())[0])
    assert (logged.version, logged.study, logged.trial, logged.run_id) == (0, name, 0, version.run_id)
    assert fetch(home, logged, home.work).is_dir()


def test_a_challenger_that_became_champion_is_no_challenger_any_more(tracked: Tracked, register: Register) -> None:
    register(0)
    home, name = tracked.home, tracked.name
    assert set_alias(home, name, "champion", 1).aliases == ("champion",)
    assert tracked.tracker.register(tracked.study(), 0).aliases == ("champion",)
    register(1)
    assert [(v.version, v.aliases) for v in versions(home, name)] == [(2, ("challenger",)), (1, ("champion",))]
    # The best of the next run is the champion again.
    assert tracked.tracker.register(tracked.study(), 0).aliases == ("champion",)
    assert [(v.version, v.aliases) for v in versions(home, name)] == [(2, ()), (1, ("champion",))]


def test_a_version_is_described_and_linked_to_its_run(tracked: Tracked, register: Register) -> None:
    register(0)
    client = connect(tracked.home)
    version = client.get_model_version(tracked.name, "1")
    assert version.run_id == tracked.run(0).info.run_id
    assert version.description.startswith(f"Trial 0 of {tracked.name}: validation accuracy 0.9000")
    assert "| training.optimizer.lr | 0.01 |" in version.description
    assert client.get_registered_model(tracked.name).description == "Which rate is best?"


def test_champions_are_recorded_with_their_time_their_reason_and_who_chose_them(
    tracked: Tracked, register: Register
) -> None:
    register(0)
    home, name = tracked.home, tracked.name
    assert champions(home, name) == champions(home, "unknown") == []
    record_champion(home, name, 1, why="there was no champion before")
    record_champion(home, name, 4, why="slower, but needed", forced=True)
    record_champion(home, name, 4, why="again after a kill")
    first, second = champions(home, name)
    assert (first.version, first.why, first.forced) == (1, "there was no champion before", False)
    assert first.until == second.since > first.since
    assert (second.version, second.why, second.forced, second.until) == (4, "slower, but needed", True, None)
    assert first.who
    texts = [text for tag, text in connect(home).get_registered_model(name).tags.items() if "champion" in tag]
    assert sum(text.startswith("version 4 since ") and ", forced: slower, but" in text for text in texts) == 1


def test_champions_of_earlier_versions_are_read(tracked: Tracked, register: Register) -> None:
    register(0)
    home, name = tracked.home, tracked.name
    old = {"version": 1, "since": "2026-01-02T03:04:05.000000+00:00", "why": "a: b", "who": "ann", "forced": True}
    connect(home).set_registered_model_tag(
        name, "hpo.champion.20260102030405000000", json.dumps({**old, "until": None})
    )
    record_champion(home, name, 2, why="over: two\nlines")
    first, second = champions(home, name)
    assert (first.version, first.since, first.why, first.who, first.forced) == tuple(old.values())
    assert (second.version, second.why, second.forced) == (2, "over: two\nlines", False)


def test_no_tag_that_mlflow_shows_is_json(tracked: Tracked, register: Register) -> None:
    version = register(0)
    complete_opening(tracked.home, tracked.study(), announce(tracked), {"test_accuracy": 0.9})
    record_champion(tracked.home, tracked.name, 1, why="first")
    tracked.tracker.close_study(tracked.study(tiny.trial(0)), status="FINISHED", summary="")
    client = connect(tracked.home)
    tagged = [tracked.parent().data.tags, tracked.run(0).data.tags, client.get_registered_model(tracked.name).tags]
    tagged += [client.get_model_version(tracked.name, str(version.version)).tags]
    tagged += [client.get_experiment(tracked.parent().info.experiment_id).tags]
    shown = {name: text for tags in tagged for name, text in tags.items() if not name.startswith("mlflow.")}
    assert shown
    assert not [name for name, text in shown.items() if text.startswith(("{", "["))]


def announce(tracked: Tracked) -> Opening:
    model = ModelVersion(tracked.name, 2, ("challenger",), "run", f"models:/{tracked.name}/2", tracked.name, 5)
    return announce_opening(tracked.home, tracked.study(), model=model, trial=5, purpose="promote")


def test_every_opening_is_in_the_ledger_in_order_before_and_after(tracked: Tracked) -> None:
    home, study = tracked.home, tracked.study()
    assert openings(home, study) == []
    first, second = (complete_opening(home, study, announce(tracked), {"test_accuracy": 0.9}) for _ in range(2))
    killed = announce(tracked)  # before its result
    assert openings(home, study) == [first, second, killed]
    entries = map(json.loads, (home.root / "openings.jsonl").read_text().splitlines())
    scores = [entry["scores"] for entry in entries if entry["study"] == tracked.name]
    assert scores == [{}, {"test_accuracy": 0.9}, {}, {"test_accuracy": 0.9}, {}]
    assert (first.who != "", first.purpose) == (True, "promote")
    assert first.when < second.when


@pytest.mark.parametrize("lost", ["the file", "the run"])
def test_an_opening_is_not_forgotten_when_one_record_of_it_is_lost(tracked: Tracked, lost: str) -> None:
    home, study = tracked.home, tracked.study()
    opening = complete_opening(home, study, announce(tracked), {"test_accuracy": 0.9})
    if lost == "the file":
        (home.root / "openings.jsonl").unlink()
    else:
        connect(home).delete_run(tracked.parent().info.run_id)
    assert openings(home, study) == [opening]


@pytest.mark.slow
def test_a_server_keeps_the_artifacts_and_is_read_like_its_database(
    template: Path,
    folder: Path,
    tmp_path: Path,
) -> None:
    with tracking_server(template, tmp_path / "server") as uri:
        home = replace(Home.at(tmp_path).create(), tracking_uri=uri)
        tracker = Tracker(home)
        tracked = Tracked(Store(home, tmp_path / "server"), "tiny", tracker)
        tracker.open_study(tracked.study(), tiny.spec("tiny"), tiny.data(), tiny.split())
        for number in range(2):
            tracked.track(number)
            tracker.keep_model(number, folder)
        tracker.drop_model(0)
        tracker.register(tracked.study(), 1)
        assert not [path for path in home.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
        assert len([path for path in tracked.store.files() if path.name == "net.pt2"]) == 1
        database = read_tracking(replace(home, tracking_uri=f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}"))
        asked = read_tracking(home)
    assert database is not None
    assert asked is not None
    assert sorted(database.runs, key=lambda run: run.id) == sorted(asked.runs, key=lambda run: run.id)
    assert database.versions == asked.versions
    assert [model for model in database.models if not model.deleted] == list(asked.models)
