"""A report gathers what real stores hold of a real study, and writes its page without opening or fetching anything."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.errors import HpoError, StoreError
from hpo.home import Home
from hpo.jobs.promote import promote
from hpo.jobs.report import explain_mistakes, gather, write_report
from hpo.storage.reader import read_study
from hpo.tracking.ledger import openings
from hpo.tracking.registry import resolve
from hpo.tracking.tracker import Tracker


@pytest.fixture
def project(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder that a test may change."""
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HPO_DATA", str(finished / "data"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "mlruns", tmp_path / "mlruns", ignore=shutil.ignore_patterns("work"))
    return tmp_path


def test_report_tells_of_everything_that_a_finished_study_left(project: Path) -> None:
    home = Home.find(project)
    findings = gather(home, read_study(home, "digits-mlp"))
    assert findings.missing == ()
    assert findings.data is not None
    assert findings.split is not None
    assert findings.split.counts["test"] == findings.data.test_count
    assert findings.samples is not None
    assert len(findings.samples.strips) == 10
    assert 0.25 < findings.samples.mean[0] < 0.4
    assert findings.answers is not None
    assert findings.answers.probabilities.shape == (findings.split.counts["valid"], 10)
    assert findings.answers.mistakes
    assert {place for each in findings.answers.mistakes for place in each.positions} == set(findings.answers.images)
    assert findings.model is not None
    assert findings.shown is not None
    assert findings.model.trial == findings.shown.number
    assert "torch" in findings.versions


def test_report_never_opens_the_test_part_and_tells_how_often_others_did(project: Path) -> None:
    """Through the command, which prints where the page is."""
    home = Home.find(project)
    said = CliRunner().invoke(app, ["report", "digits-mlp"])
    assert said.exit_code == 0, said.output
    assert said.stdout.strip() == "mlruns/reports/digits-mlp.html"
    assert "never opened" in Path(said.stdout.strip()).read_text(encoding="utf-8")
    assert not (home.root / "openings.jsonl").exists()
    test = promote("digits-mlp", home=project).scores["test_accuracy"]
    said = CliRunner().invoke(app, ["report", "digits-mlp", "--out", "a/b.html", "--json"])
    assert json.loads(said.stdout) == {"path": str(project / "a" / "b.html")}
    assert (project / "a" / "b.html").stat().st_mtime <= datetime.now(UTC).timestamp() + 1
    page = (project / "a" / "b.html").read_text(encoding="utf-8")
    assert "was opened once" in page
    assert f"{test:.4f}" in page
    assert "UTC to promote version 1" in page
    assert len(openings(home, read_study(home, "digits-mlp"))) == 1


def test_study_whose_data_is_gone_keeps_a_page(project: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_DATA", str(project / "elsewhere"))
    (finished / "data").rename(finished / "away")
    try:
        home = Home.find(project)
        findings = gather(home, read_study(home, "digits-mlp"))
    finally:
        (finished / "away").rename(finished / "data")
    assert findings.samples is None
    assert findings.split is not None
    assert any("are not on this machine" in sentence for sentence in findings.missing)
    assert not (project / "elsewhere").exists()


def test_study_without_a_tracking_store_keeps_a_page(project: Path) -> None:
    (project / "mlruns" / "mlflow.db").unlink()
    home = Home.find(project)
    findings = gather(home, read_study(home, "digits-mlp"))
    assert findings.data is not None  # from the prepared files
    assert findings.split is not None
    assert "No model of this study is registered." in findings.missing
    assert any("probabilities of trial" in sentence for sentence in findings.missing)
    assert not (project / "mlruns" / "mlflow.db").exists()


def test_damaged_tracking_store_is_told_on_the_page(project: Path) -> None:
    (project / "mlruns" / "mlflow.db").write_bytes(b"not a database" * 100)
    page = write_report("digits-mlp", home=project).read_text(encoding="utf-8")
    assert "The tracking store could not be read" in page


@pytest.mark.slow
def test_saliency_of_the_mistakes_is_on_the_page_where_it_is_asked_for(project: Path) -> None:
    plain = write_report("digits-mlp", home=project).read_text(encoding="utf-8")
    assert "Saliency of the mistakes" not in plain
    page = write_report("digits-mlp", home=project, saliency=True).read_text(encoding="utf-8")
    assert page.count("saliency of mistake ") == 5
    (project / "mlruns" / "mlflow.db").unlink()
    page = write_report("digits-mlp", home=project, saliency=True).read_text(encoding="utf-8")
    assert "mistakes could not be explained" in page


def test_unknown_study_and_unwritable_file_are_told(project: Path) -> None:
    with pytest.raises(StoreError, match="no study 'nobody' has run here"):
        write_report("nobody", home=project)
    (project / "mlruns" / "mlflow.db").unlink()  # a page without a model is drawn sooner
    (project / "file").touch()
    with pytest.raises(HpoError, match="cannot be written"):
        write_report("digits-mlp", home=project, out=project / "file" / "page.html")


def test_mistakes_are_those_of_the_model_that_is_named(project: Path) -> None:
    home = Home.find(project)
    study = read_study(home, "digits-mlp")
    other = next(trial for trial in study.trials if trial.number != gather(home, study).shown.number)
    kept = resolve(home, Tracker(home).kept_models(study)[other.number])
    findings = gather(home, study, model=kept)
    assert findings.shown.number == other.number
    rows = explain_mistakes(kept.model_uri, folder=project / "pictures", methods=["gradient"], home=project)
    for row, mistake in zip(rows, findings.answers.mistakes, strict=True):
        assert row.predicted == findings.class_names[mistake.predicted]
        assert row.probability == pytest.approx(max(mistake.probabilities), abs=1e-4)


def test_the_surest_mistakes_are_explained_by_name(project: Path) -> None:
    findings = gather(Home.find(project), read_study(Home.find(project), "digits-mlp"))
    rows = explain_mistakes("digits-mlp", folder=project / "pictures", methods=["gradient"], home=project)
    assert findings.answers is not None
    assert len(rows) == len(findings.answers.mistakes) == 5
    for row, mistake in zip(rows, findings.answers.mistakes, strict=True):
        assert row.predicted == findings.class_names[mistake.predicted]
        assert row.probability == pytest.approx(max(mistake.probabilities), abs=1e-4)
        assert Path(row.picture).stem.endswith(f"-{findings.class_names[mistake.true]}")
        assert Path(row.picture).is_file()
