"""A pipe or a device in place of a file is refused: one may never begin, the other never ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.cli.options import outside_stores
from hpo.errors import DataError
from hpo.predict import read_images
from hpo.spec.load import load_study
from hpo.spec.own_code import content_of

pytestmark = pytest.mark.timeout(60)
runner = CliRunner()
SEARCH = "search: {trials: 1, space: {training.optimizer.lr: {float: [1.0e-3, 1.0e-2]}}}\n"
KINDS = [pytest.param(os.mkfifo, id="pipe"), pytest.param(lambda file: file.symlink_to("/dev/zero"), id="endless")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("hpo.toml", "status"),
        ("own.npz", "check npz.yaml"),
        ("own.csv", "check table.yaml"),
        ("study.zip", "import study.zip --home new"),
    ],
)
def test_it_is_refused_by_name(place: Path, make: Callable[[Path], None], name: str, command: str) -> None:
    for kind, file in {"npz": "own.npz", "table": "own.csv"}.items():
        head = f"data: {{name: {kind}, path: {file}}}\nsplit: {{kind: holdout}}\nmodel: {{kind: mlp}}\n"
        (place / f"{kind}.yaml").write_text(head + SEARCH)
    make(place / name)
    result = runner.invoke(app, command.split())
    assert result.exit_code == 2
    assert f"{name}: " in result.stderr
    assert "it is a pipe or a device" in result.stderr
    assert not (place / "new").exists()


@pytest.mark.parametrize("make", KINDS)
def test_it_is_no_image_and_has_no_content(place: Path, make: Callable[[Path], None]) -> None:
    make(place / "x.png")
    with pytest.raises(DataError, match=r"x\.png: not an image that can be read: it is a pipe or a device"):
        read_images([place / "x.png"], (8, 8, 3))
    head = "data: {name: digits}\nsplit: {kind: holdout}\nmodel: {kind: 'a:b', options: {file: ./x.png}}\n"
    (place / "own.yaml").write_text(head + SEARCH)
    assert content_of(load_study("own.yaml"))["files"] == {}


def test_an_hpo_toml_of_megabytes_is_refused(place: Path) -> None:
    (place / "hpo.toml").write_text(f'storage = "{"a" * 10**6}"')
    result = runner.invoke(app, ["status"])
    assert result.exit_code == 2
    assert "more than 100,000 bytes" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        "export x --out {}",
        "report x --out {}",
        "predict x x.png -o {}",
        "preview digits-mlp -o {}",
        "data show digits -o {}",
    ],
)
@pytest.mark.parametrize("name", ["optuna.db", "openings.jsonl", "artifacts/x/y"])
def test_no_output_replaces_what_a_home_keeps(place: Path, command: str, name: str) -> None:
    kept = place / "mlruns" / name
    kept.parent.mkdir(parents=True)
    (place / "mlruns" / "optuna.db").write_text("studies")
    before = sorted(place.rglob("*"))
    result = runner.invoke(app, command.format(f"mlruns/reports/../{name}").split())
    assert result.exit_code == 2
    assert "is among the files that" in " ".join(result.stderr.replace("│", "").split())
    assert (place / "mlruns" / "optuna.db").read_text() == "studies"
    assert sorted(place.rglob("*")) == before
    assert outside_stores(place / "mlruns/reports/x.html")


HPO = [sys.executable, "-m", "hpo"]


def test_an_output_that_is_closed_or_full_is_no_traceback(place: Path) -> None:
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *HPO, "studies"], capture_output=True, check=False)
    assert (closed.returncode, closed.stderr) == (0, b"")
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([*HPO, "schema"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: no space is left")


def test_a_working_directory_that_is_gone_is_one_error(place: Path) -> None:
    (place / "gone").mkdir()
    os.chdir(place / "gone")
    (place / "gone").rmdir()
    result = runner.invoke(app, ["status"])
    assert result.exit_code == 2
    assert "the working directory is gone" in result.stderr
