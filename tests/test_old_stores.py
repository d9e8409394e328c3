"""Stores of earlier code open, resume, promote, predict and report; tests/stores/README.md says what they are."""

from __future__ import annotations

import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.home import Home
from hpo.records import StudyResult
from hpo.storage.reader import read_study
from hpo.tracking import runs
from hpo.tracking.store import connect
from hpo.tracking.ui import runs_address

STORE = Path(__file__).parent / "stores" / "28a5243.tar.xz"
BINARY = (".npz", ".pt", ".pt2")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stored project, unpacked: the working directory."""
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    project = tmp_path / "project"
    with tarfile.open(STORE) as archive:
        archive.extractall(project, filter="data")
    for path in project.rglob("*"):
        if path.is_file() and path.suffix not in BINARY:
            text = path.read_text(encoding="utf-8")
            text = text.replace("@PROJECT@", str(project)).replace("@CACHE@", str(tmp_path / "cache"))
            path.write_text(text, encoding="utf-8")
    for name in ("optuna", "mlflow"):
        sql = project / "mlruns" / f"{name}.sql"
        database = sqlite3.connect(sql.with_suffix(".db"))
        database.executescript(sql.read_text(encoding="utf-8"))
        database.close()
        sql.unlink()
    monkeypatch.chdir(project)
    return project


def hpo(*words: str, code: int = 0) -> Any:
    """What a command prints as JSON."""
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    lines = result.stdout.splitlines()
    return json.loads(lines[-1] if words[0] == "run" else result.stdout)


def test_old_stores_open(project: Path) -> None:
    trials = {name: _trials(name) for name in ("digits-old", "digits-killed")}
    assert [trial["state"] for trial in trials["digits-old"]] == ["complete"] * 4
    assert [trial["state"] for trial in trials["digits-killed"]] == ["complete", "complete", "running"]
    champion = next(model for model in hpo("models", "digits-old") if "champion" in model["aliases"])
    assert champion["scores"]["test_accuracy"] > 0.8
    assert hpo("evaluate", "digits-old/1")[0]["openings"] == 1
    assert _predicted(project, "digits-old") == [{"class": "0"}]
    # Its objective has the name of today, so that the page of its trials is sorted.
    home, study = Home.find(), read_study(Home.find(), "digits-old")
    assert "orderByKey=metrics.%60objective%60" in runs_address(home, study)
    assert all("objective" in run.data.metrics for run in _runs(home, study))


@pytest.mark.slow
def test_killed_study_of_old_code_ends_as_the_old_code_ends_it(project: Path) -> None:
    hpo("run", "digits-killed.yaml", "--workers", "0")
    trials = _trials("digits-killed")
    assert [trial["state"] for trial in trials] == ["complete", "complete", "stopped", "complete", "complete"]
    # As commit 28a5243 went on from the same store.
    assert [trial["candidate"]["ordinal"] for trial in trials] == [0, 1, 2, 2, 3]
    assert [trial["candidate"]["seed"] for trial in trials][3:] == [1323506485, 1985956348]
    assert trials[3]["candidate"]["parameters"] == trials[2]["candidate"]["parameters"]
    assert trials[4]["candidate"]["parameters"]["training.optimizer.lr"] == pytest.approx(0.00868996773773319)
    assert trials[4]["candidate"]["parameters"]["model.hidden"] == 8
    # The runs of old trials stay, those of new ones have the names of today; the scores of both are read.
    home, study = Home.find(), read_study(Home.find(), "digits-killed")
    metrics = {run.data.tags["hpo.trial"]: run.data.metrics.keys() for run in _runs(home, study)}
    assert "best_valid_accuracy" in metrics["0"]
    assert "valid/best/accuracy" in metrics["4"]
    assert hpo("models", "digits-killed")[0]["scores"]["valid_accuracy"] > 0.8
    assert "viewStateShareKey" in runs_address(home, study)
    assert hpo("promote", "digits-killed")["promoted"]
    assert _predicted(project, "digits-killed") == [{"class": "0"}]
    for name in ("digits-old", "digits-killed"):
        assert "</html>" in Path(hpo("report", name)["path"]).read_text(encoding="utf-8")
    assert hpo("doctor")["well"]


@pytest.mark.slow
def test_export_of_old_stores_is_whole(project: Path, tmp_path: Path) -> None:
    exported = hpo("export", "digits-old")
    imported = hpo("import", exported["file"], "--home", str(tmp_path / "other"))
    assert (imported["trials"], imported["runs"], imported["models"], imported["versions"]) == (4, 5, 1, 1)


def _runs(home: Home, study: StudyResult) -> list[Any]:
    client = connect(home)
    return list(runs.children(client, runs.find_parent(client, study)))


def _trials(study: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = hpo("trials", study)["trials"]
    return listed


def _predicted(folder: Path, model: str) -> list[dict[str, str]]:
    """The class of the first of the digits, a zero, by a registered model."""
    picture = folder / "zero.png"
    Image.fromarray((load_digits().images[0] * 15).astype("uint8")).save(picture)
    result = CliRunner().invoke(app, ["predict", model, str(picture), "--format", "json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return [{"class": row["class"]} for row in json.loads(result.stdout)]
