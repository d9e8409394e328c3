from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_study as tiny
from hpo.errors import ModelError
from hpo.home import Home
from hpo.records import ModelVersion
from hpo.tracking.registry import fetch, resolve, set_alias, versions
from hpo.tracking.tracker import Tracker

Register = Callable[[int], ModelVersion]


@pytest.fixture
def register(tracker: Tracker, folder: Path) -> Register:
    def register(number: int) -> ModelVersion:
        candidate = tiny.candidate(number)
        tracker.start_trial(candidate, tiny.spec().with_values(candidate.parameters), worker="w0")
        tracker.end_trial(tiny.result(number))
        tracker.keep_model(number, folder)
        return tracker.register(tiny.study(), number)

    return register


def test_the_same_trial_registers_once(tracker: Tracker, register: Register) -> None:
    first = register(4)
    assert tracker.register(tiny.study(), 4) == first
    assert (first.version, first.trial, first.study, first.aliases) == (1, 4, "tiny", ("challenger",))
    assert first.scores == {"valid_accuracy": 0.904, "valid_loss": 0.4}


def test_the_challenger_moves_to_what_was_registered_last(home: Home, tracker: Tracker, register: Register) -> None:
    register(0)
    register(1)
    assert [(v.version, v.aliases) for v in versions(home)] == [(2, ("challenger",)), (1, ())]
    tracker.register(tiny.study(), 0)
    assert [(v.version, v.aliases) for v in versions(home, "tiny")] == [(2, ()), (1, ("challenger",))]


def test_a_trial_whose_model_was_not_kept_is_not_registered(tracker: Tracker) -> None:
    candidate = tiny.candidate(0)
    tracker.start_trial(candidate, tiny.spec().with_values(candidate.parameters), worker="w0")
    with pytest.raises(ModelError, match="model of trial 0 was not kept"):
        tracker.register(tiny.study(), 0)


def test_a_bare_name_is_the_champion_and_else_the_challenger(home: Home, register: Register) -> None:
    first, second = register(0), register(1)
    assert resolve(home, "tiny").version == second.version
    promoted = set_alias(home, "tiny", "champion", 1, scores={"test_accuracy": 0.875}, tags={"why": "gate"})
    assert promoted.scores["test_accuracy"] == 0.875
    assert resolve(home, "tiny").version == first.version


def test_names_aliases_versions_and_uris_resolve_to_the_same_version(
    home: Home, tracker: Tracker, register: Register
) -> None:
    version = register(0)
    for model in ("tiny@challenger", "tiny/1", "models:/tiny/1", "models:/tiny@challenger"):
        assert resolve(home, model) == version
    logged = resolve(home, tracker.kept_models(tiny.study())[0])
    assert (logged.version, logged.study, logged.trial, logged.run_id) == (0, "tiny", 0, version.run_id)
    assert fetch(home, logged, home.work) == fetch(home, version, home.work)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("tinny", "no registered model named 'tinny'. Did you mean tiny"),
        ("tiny@champion", r"model 'tiny' has no alias champion. There is: tiny/1@challenger"),
        ("tiny/9", "model 'tiny' has no version 9"),
        ("models:/m-00000000000000000000000000000000", "no logged model m-0000"),
        ("a/b/c", "'a/b/c' is not the name of a model"),
    ],
)
def test_an_unknown_model_is_told_with_what_there_is(home: Home, register: Register, model: str, message: str) -> None:
    register(0)
    with pytest.raises(ModelError, match=message):
        resolve(home, model)


def test_without_any_model_the_error_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ModelError, match="none yet: hpo run"):
        resolve(Home.find(tmp_path), "tiny")


def test_a_version_whose_files_are_gone_is_told_so(home: Home, register: Register) -> None:
    version = register(0)
    for path in home.artifacts.rglob("MLmodel"):
        path.unlink()
    with pytest.raises(ModelError, match="files are not at"):
        fetch(home, version, home.work)
