from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import tiny_study as tiny
from hpo.errors import ModelError
from hpo.home import Home
from hpo.records import ModelVersion
from hpo.tracking.registry import fetch, resolve
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
