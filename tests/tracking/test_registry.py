from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpo.errors import ModelError
from hpo.home import Home
from hpo.tracking.registry import fetch, resolve


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
def test_an_unknown_model_is_told_with_what_there_is(registered: Path, model: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(Home.at(registered), model)


def test_without_any_model_the_error_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ModelError, match="none yet: hpo run"):
        resolve(Home.find(tmp_path), "tiny")


def test_a_version_whose_files_are_gone_is_told_so(registered: Path, tmp_path: Path) -> None:
    shutil.copytree(registered / "mlruns", tmp_path / "mlruns")
    home = Home.at(tmp_path)
    version = resolve(home, "tiny")
    for path in home.artifacts.rglob("MLmodel"):
        path.unlink()
    with pytest.raises(ModelError, match="files are not at"):
        fetch(home, version, home.work)
