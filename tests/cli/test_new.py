"""`hpo run FOLDER` and `hpo new`: what a study is written with, and the budget of its runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from blobs import png, write_blobs
from hpo.cli import new as room
from hpo.cli.app import app
from hpo.options import RunOptions

runner = CliRunner()
STUDY = """
question: Which?
data: {name: folder, path: ../photos}
split: {kind: holdout}
model: {kind: mlp}
search: {trials: 2, space: {training.optimizer.lr: {float: [0.001, 0.1]}}}
"""


@pytest.fixture
def calls(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What new_study and run_study were called with; the first writes a study, the second does nothing."""
    seen: list[dict[str, Any]] = []

    def new_study(source: Path, **given: Any) -> SimpleNamespace:
        (project / "studies").mkdir()
        (project / "studies" / "photos.yaml").write_text(STUDY)
        seen.append(given)
        return SimpleNamespace(closing=1440.0)

    def run_study(spec: Any, options: RunOptions, *, closing: float, watch: Any) -> None:
        seen.append({"spec": spec, "options": options, "closing": closing})

    monkeypatch.setattr("hpo.jobs.new_study.new_study", new_study)
    monkeypatch.setattr("hpo.execute.run_study.run_study", run_study)
    monkeypatch.setattr("hpo.execute.process.start_fork_server", lambda: None)
    monkeypatch.setattr(room, "_print", lambda made: None)
    write_blobs(project / "photos", png, count=2)
    return seen


def test_the_command_that_resumes_gives_the_run_no_budget_of_its_own(calls: list[dict[str, Any]]) -> None:
    def timeout(words: str) -> float | None:
        runner.invoke(app, ["run", "photos", "--quiet", *words.split()])
        found: float | None = calls[-1]["options"].timeout
        return found

    first = timeout("--minutes 60")
    assert first is not None
    assert 60 * 60 < first < 60 * 75
    assert timeout("") is None
    again = timeout("--minutes 20")
    assert again is not None
    assert 60 * 20 < again < 60 * 25
    assert timeout("--timeout 90") == 90
    assert calls[-1]["closing"] == 0


def test_a_slow_search_of_own_images_leaves_time_for_the_final_training(calls: list[dict[str, Any]]) -> None:
    """All was planned to take 0.8 of the minutes, and the run ends at 1.25 of them."""
    runner.invoke(app, ["run", "photos", "--quiet", "--minutes", "60"])
    assert calls[-1]["closing"] == pytest.approx(0.2 * 3600 + 1440)
    runner.invoke(app, ["run", "photos", "--quiet", "--minutes", "60"])  # its plan is not known any more
    assert calls[-1]["closing"] == pytest.approx(0.45 * 3600)


def test_settings_of_the_data_reach_the_study_that_is_written(calls: list[dict[str, Any]]) -> None:
    runner.invoke(app, ["run", "photos", "--quiet", "--set", "data.size=8", "--set", "training.epochs=3"])
    assert calls[0]["settings"] == ["data.size=8"]
    assert (calls[1]["spec"].data.size, calls[1]["spec"].training.epochs) == (8, 3)


@pytest.mark.parametrize("command", ["run", "new"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset fast", "--preset fast: is unknown.\nChoose one of: quick, good, best."),
        ("--minutes 0", "--minutes 0: is no number of minutes.\nFor example: --minutes 10"),
        ("--minutes -5", "--minutes -5: is no number of minutes."),
        ("--minutes inf", "--minutes inf: is no number of minutes."),
    ],
)
def test_a_preset_or_budget_that_is_none_is_refused_by_both_commands(
    project: Path, command: str, words: str, message: str
) -> None:
    write_blobs(project / "photos", png, count=2)
    result = runner.invoke(app, [command, "photos", *words.split()])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (project / "studies").exists()


@pytest.mark.parametrize(("words", "command"), [("run .", "run"), ("new .", "new")])
def test_nothing_is_written_into_a_folder_of_images(
    project: Path, monkeypatch: pytest.MonkeyPatch, words: str, command: str
) -> None:
    photos = write_blobs(project / "photos", png, count=2)
    before = sorted(photos.rglob("*"))
    monkeypatch.chdir(photos)
    result = runner.invoke(app, words.split())
    assert result.exit_code == 2
    assert f"cd .. && hpo {command} photos" in result.stderr
    monkeypatch.chdir(project)
    result = runner.invoke(app, ["run", "photos", "--home", "photos"])
    assert "would be among the images" in result.stderr
    assert sorted(photos.rglob("*")) == before
