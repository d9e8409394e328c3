"""hpo export and hpo import, on studies without any training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.home import Home
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.spec.load import parse_study
from hpo.storage.reader import read_study


@pytest.fixture
def searched(project: Path, empty_stores: Path) -> Path:
    """A folder whose study has two trials, and no runs; `there` is one with empty stores."""
    for place in (project, project / "there"):
        shutil.copytree(empty_stores / "mlruns", place / "mlruns")
    spec = parse_study(
        {
            "name": "tiny",
            "data": {"name": "digits"},
            "model": {"kind": "mlp"},
            "search": {"sampler": "random", "space": {"model.dropout": {"float": [0.0, 0.5]}}},
        }
    )
    study = open_study(Home.find(project), spec, data_digest="d")
    for value in (0.5, 0.6):
        candidate = study.ask(budget=2, worker="w")
        study.tell(TrialResult(candidate.number, TrialState.COMPLETE, value, 1))
    study.close()
    return project


def _hpo(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code, done.output
    return done.output


def test_export_names_the_command_that_imports_and_that_works(searched: Path) -> None:
    said = _hpo("export", "tiny")
    assert "tiny: 2 trials, 0 runs, 0 models, 0 registered versions in tiny.zip" in said
    assert "hpo import tiny.zip --home DIR" in said
    assert "tiny: 2 trials new in" in _hpo("import", "tiny.zip", "--home", "there")
    assert "tiny: nothing new in" in _hpo("import", "tiny.zip", "--home", "there")
    assert "tiny: 2 trials" in _hpo("export", "tiny~1")
    trials = [json.loads(_hpo("trials", "tiny", "--home", place, "--json")) for place in (".", "there")]
    assert trials[0] == trials[1]


def test_both_speak_json(searched: Path) -> None:
    made = json.loads(_hpo("export", "tiny", "--out", "x.zip", "--json"))
    assert (made["file"], made["trials"], made["notes"]) == ("x.zip", 2, [])
    came = json.loads(_hpo("import", "x.zip", "--home", "elsewhere", "--json"))
    assert (came["relation"], came["trials"]) == ("absent", 2)


def test_older_file_says_that_the_study_is_further_on(searched: Path) -> None:
    _hpo("export", "tiny")
    home = Home.find(searched)
    study = open_study(home, parse_study(read_study(home, "tiny").spec), data_digest="d")
    candidate = study.ask(budget=3, worker="w")
    study.tell(TrialResult(candidate.number, TrialState.COMPLETE, 0.7, 1))
    study.close()
    assert "the study here has more trials than the file" in _hpo("import", "tiny.zip")


def test_unknown_study_and_file_are_one_message(searched: Path) -> None:
    assert "no study 'other'" in _hpo("export", "other", code=2)
    assert "there is no such file" in _hpo("import", "other.zip", code=2)
    Path("tiny.zip").write_text("not a zip", encoding="ascii")
    assert "not a whole export" in _hpo("import", "tiny.zip", code=2)
