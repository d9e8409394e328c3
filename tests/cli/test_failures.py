"""Errors are one message with a next step and the right exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hpo.cli.app import app
from hpo.errors import DataError

runner = CliRunner()
pytestmark = pytest.mark.usefixtures("project")


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, *options: str) -> Result:
    """hpo run, with a run_study that raises."""

    def run_study(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "hpo.execute.run_study", SimpleNamespace(run_study=run_study))  # type: ignore[arg-type]
    return runner.invoke(app, ["run", "digits-mlp", *options])


def test_user_error_is_a_message_and_a_hint_with_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing(monkeypatch, DataError("x.npz: labels reach 12.", "Give 10 class names."))
    assert result.stderr == "error: x.npz: labels reach 12.\nGive 10 class names.\n"
    assert result.stdout == ""
    assert result.exit_code == 2


def test_long_message_is_not_broken_into_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/very/long/" * 40
    assert path in failing(monkeypatch, DataError(f"{path}: missing. [bold]")).stderr


@pytest.mark.parametrize("arguments", [["run", "digits-mlp", "--debug"], ["--debug", "run", "digits-mlp"]])
def test_debug_adds_the_traceback(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_study(*arguments: Any, **named: Any) -> None:
        raise DataError("broken.")

    monkeypatch.setitem(sys.modules, "hpo.execute.run_study", SimpleNamespace(run_study=run_study))  # type: ignore[arg-type]
    result = runner.invoke(app, arguments)
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: broken.\n")
    assert result.exit_code == 2


def test_unexpected_error_is_one_line_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing(monkeypatch, ValueError("bad\nthing"))
    assert result.stderr == "unexpected error ValueError: bad thing\nRun again with --debug for the traceback.\n"
    assert result.exit_code == 1


def test_interrupt_is_one_line_with_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing(monkeypatch, KeyboardInterrupt())
    assert (result.stderr, result.exit_code) == ("interrupted\n", 130)


def test_errors_are_json_where_json_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    result = failing(monkeypatch, DataError("x.npz is damaged.", "Remove it."), "--json")
    assert json.loads(result.stderr) == {"error": "x.npz is damaged.", "hint": "Remove it."}
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "digits-mpl"], "digits-mlp"),
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run", "digits-mlp", "--set", "training.epochs=many"], "training.epochs"),
        (["run", "digits-mlp", "--set", "training.epoch=5"], "unknown key 'epoch'"),
        (["run", "digits-mlp", "--set", "epochs"], "place=value"),
        (["run", "digits-mlp", "--timeout", "soon"], "'soon' is not a time"),
        (["run", "digits-mlp", "--trials", "0"], "--trials"),
        (["run"], "Missing argument"),
        (["fly"], "No such command"),
        (["predict", "digits-mlp"], "Missing argument"),
        (["trials", "digits-mlp", "--sort", "colour"], "colour"),
    ],
)
def test_wrong_words_on_the_command_line_are_exit_code_2(arguments: list[str], said: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


def test_unwritable_output_file_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(predict_files=lambda model, paths, **options: [], load_model=lambda model, **options: model)
    monkeypatch.setitem(sys.modules, "hpo.predict", fake)  # type: ignore[arg-type]
    result = runner.invoke(app, ["predict", "m", "a.png", "--out", "no/such/folder/out.csv"])
    assert result.exit_code == 2
    assert "no/such/folder/out.csv" in result.stderr
    assert "--out" in result.stderr


def test_reader_that_goes_away_ends_the_command_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:  # noqa: PTH123 - a file descriptor
        done = subprocess.run([sys.executable, "-m", "hpo", "schema"], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == ""


def test_terminal_without_unicode_gets_text_not_a_traceback(tmp_path: Path) -> None:
    file = tmp_path / "blood.yaml"
    file.write_text(
        "question: Wie groß? ≥ 5\ndata: {name: digits}\nmodel: {kind: mlp}\n"
        "search: {space: {model.hidden: {int: [1, 2]}}}\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "hpo", "show", str(file)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "question: Wie gro?? ? 5" in done.stdout
