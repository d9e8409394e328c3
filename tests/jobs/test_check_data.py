"""What check, data show, run and the report say of a data set's files, range, classes and near-duplicates."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from blobs import deep_png, write_blobs
from hpo.cli.app import app

STUDY = """
data: {name: folder, path: ../photos}
split: {kind: holdout}
model: {kind: mlp, hidden: 8}
training: {epochs: 1}
search: {trials: 2, space: {training.optimizer.lr: {float: [1.0e-4, 1.0e-2], log: true}}}
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of 12-bit images with a file that is no image and a constant image."""
    photos = write_blobs(tmp_path / "photos", lambda i, p: deep_png(i / 255 * 4095, p))
    (photos / "round" / "notes.txt").write_text("no image")
    deep_png(np.full((32, 32), 900), photos / "long" / "flat.png")
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "mine.yaml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    return "mine"


FILES = "42 seen, 41 used, 1 skipped: 1 no image (.txt)"
CONSTANT = "1 of 41 images are constant"


def test_check_says_what_was_read(study):
    result = CliRunner().invoke(app, ["check", study, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert f"files {FILES}" in words
    assert "uint16 0 to 4095" in words
    assert "classes 2: long, round" in words
    assert "near-duplicates 0 of valid in train, 0 of test in train, 0 of test in valid" in words
    assert CONSTANT in result.stderr


def test_data_show_says_what_was_read(study):
    result = CliRunner().invoke(app, ["data", "show", study, "--out", "page.html"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert f"files {FILES}" in words
    assert "pixels uint16 0 to 4095" in words
    assert CONSTANT in result.stderr
    page = Path("page.html").read_text(encoding="utf-8")
    assert FILES in page
    assert CONSTANT in page
    assert "0 of test in train" in page
    plain = json.loads(CliRunner().invoke(app, ["data", "show", study, "--json"]).stdout)
    assert plain["data"]["files"] == {"seen": 42, "used": 41, "no image (.txt)": 1}


def test_the_preparation_of_a_run_says_what_was_read(study, monkeypatch):
    from hpo.execute.workers import job_process
    from hpo.spec.load import load_study

    said = []
    monkeypatch.setattr(job_process, "_notify", lambda text, done, total: said.append(text))
    spec = load_study(study)
    for _ in range(2):  # the second answer is from the index
        said.clear()
        job_process.prepare(spec, "cpu")
        assert f"files: {FILES}" in said
        assert any(CONSTANT in text for text in said)


def test_clusters_of_near_duplicates_are_told_as_such_and_declared_groups_as_groups(study):
    clusters = "clusters of near-duplicates 41, a single image counted as one; none is divided"
    for setting, told in (("split.near_duplicates=together", clusters), ("split.group=(.*)", "groups 41, each in one")):
        result = CliRunner().invoke(app, ["check", study, "--device", "cpu", "--set", setting])
        assert result.exit_code == 0, result.output
        assert told in " ".join(result.stdout.split())
    file = Path("studies/mine.yaml")
    file.write_text(file.read_text().replace("{kind: holdout}", "{kind: holdout, near_duplicates: together}"))
    result = CliRunner().invoke(app, ["data", "show", study, "--out", "page.html"])
    assert clusters in " ".join(result.stdout.split())
    assert "clusters of near-duplicates" in Path("page.html").read_text(encoding="utf-8")


def test_a_report_says_what_was_read(study):
    from hpo.data.prepare import prepare
    from hpo.report.page import origin_rows
    from hpo.spec.load import load_study

    spec = load_study(study)
    rows = origin_rows(prepare(spec.data, spec.split), "3 of test in train")
    assert ("files", FILES) in rows
    assert ("pixels", "uint16 0 to 4095") in rows
    assert ("near-duplicates", "3 of test in train") in rows
    assert any(label == "warning" and CONSTANT in str(words) for label, words in rows)
