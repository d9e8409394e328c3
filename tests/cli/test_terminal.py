"""What a person meets in the terminal: help, hints, completion, commands that work as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hpo.cli import commands, output, silence
from hpo.cli.app import SECTIONS, app, load_command
from hpo.cli.completion import complete_device, complete_model, complete_setting
from hpo.cli.run_summary import command_width
from hpo.spec.files import places
from hpo.spec.load import load_study

runner = CliRunner()
pytestmark = pytest.mark.usefixtures("project")


def _each_command() -> dict[str, Any]:
    found = {}
    for rows in SECTIONS.values():
        for name in rows:
            command = load_command(name)
            found |= {f"{name} {inner}": each for inner, each in getattr(command, "commands", {}).items()}
            found |= {} if hasattr(command, "commands") else {name: command}
    return found


@pytest.mark.parametrize("name", _each_command())
def test_every_help_has_an_example_and_plain_words_in_its_usage(name: str) -> None:
    text = runner.invoke(app, [*name.split(), "--help"]).stdout
    assert f"Example: hpo {name}" in text
    usage = text.splitlines()[0]
    assert re.fullmatch(rf"Usage: hpo {name} \[OPTIONS\]( \[?[A-Z]+([|#][A-Z]+)?\]?(\.\.\.)?)*", usage), usage
    assert not re.search(r"[{}]|<\w", text), text


def test_out_is_the_only_name_of_the_option_for_output() -> None:
    for name, command in _each_command().items():
        context = typer.Context(command)
        flags = {flag for part in command.get_params(context) for flag in part.opts}
        assert "--output" not in flags, name
        assert ("-o" in flags) == ("--out" in flags), name


def test_options_that_are_spelled_like_their_metavar_have_a_name() -> None:
    """Typer 0.27 calls others by their metavar: --DEVICE."""
    for path in Path(commands.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for name, metavar in re.findall(r'(\w+)(?:: | = )Annotated\[\s*[^=]*?typer\.Option\(\s*metavar="(\w+)"', text):
            assert name.lower() != metavar.lower(), f"{path.name}: {name}"


def test_help_of_run_has_its_options_in_sections() -> None:
    text = runner.invoke(app, ["run", "--help"]).stdout
    places = [text.index(heading) for heading in ("Options:", "Compute:", "Cluster:", "Output:")]
    assert places == sorted(places)
    assert text.index("--device") > text.index("Compute:") > text.index("--trials")


@pytest.mark.parametrize("device", ["cuda:7", "cuda:99", "tpu"])
def test_a_device_that_is_not_here_is_one_clear_error(device: str) -> None:
    done = runner.invoke(app, ["run", "digits-mlp", "--device", device, "--workers", "0"])
    assert done.exit_code == 2
    assert f"--device {device}: is not a device of this machine." in done.stderr
    assert "Choose one of: auto, cpu" in done.stderr


def _refused(project: Path, text: str, *words: str) -> str:
    (project / "elsewhere").mkdir()
    (file := project / "elsewhere" / "bad.yaml").write_text(text)
    done = runner.invoke(app, ["check", str(file), *words])
    assert done.exit_code == 2
    return done.stderr


SPACE = "search: {space: {model.dropout: {float: [0, 0.5]}}}\n"


def test_the_hint_of_a_bad_file_names_that_file(project: Path) -> None:
    said = _refused(project, f"data: {{name: digits}}\nmodel: {{kind: mlp, hidden: many}}\n{SPACE}")
    assert "hpo check elsewhere/bad.yaml" in said
    assert "elsewhere/bad.yaml:2: model.hidden: input should be a valid integer" in said
    assert str(project) not in said


@pytest.mark.parametrize(
    ("key", "meant"), [("model: {kind: mlp, hiden: 8}", "hidden"), ("model: {kind: mlp}\ntrainng: {}", "training")]
)
def test_an_unknown_key_is_compared_with_those_of_its_place(project: Path, key: str, meant: str) -> None:
    assert f"Did you mean {meant}?" in _refused(project, f"data: {{name: digits}}\n{key}\n{SPACE}")


def test_an_unknown_key_unlike_any_other_gets_no_guess(project: Path) -> None:
    assert "Did you mean" not in _refused(project, f"data: {{name: digits}}\nmodel: {{kind: mlp}}\nxyzzy: 1\n{SPACE}")


def test_completed_places_can_be_set() -> None:
    offered = complete_setting("training.")
    assert "training.optimizer.lr=" in offered
    assert "training.optimizer=" not in offered
    assert all(place.startswith("training.") for place in offered)
    load_study("digits-mlp", overrides=["training.epochs=2", "training.optimizer.lr=0.1"])
    assert set(complete_setting("")) <= {f"{place}=" for place in places()}


def test_devices_are_completed() -> None:
    assert {"cpu", "cuda"} <= set(complete_device("c"))
    assert complete_device("m") == ["mps"]


def test_models_are_completed_from_the_registry_of_the_home(finished: Path, project: Path) -> None:
    context = typer.Context(typer.main.get_command(app))
    assert complete_model(context, "di") == []  # none is registered in this folder
    assert not (project / "mlruns").exists()
    context.params["home"] = finished
    assert complete_model(context, "di") == ["digits-mlp"]
    assert complete_model(context, "digits-mlp@") == ["digits-mlp@challenger"]
    assert complete_model(context, "digits-mlp/") == ["digits-mlp/1"]


def _completed(words: str) -> tuple[list[str], float]:
    """What bash is offered, and the processor seconds that it took."""
    told = {"_HPO_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "hpo"], env=os.environ | told, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout.split(), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("hpo run digits-m", "digits-mlp"),
        ("hpo run digits-mlp --set training.ep", "training.epochs="),
        ("hpo run digits-mlp --device cp", "cpu"),
    ],
)
def test_completion_answers_soon(words: str, offered: str) -> None:
    """In 0.3 s where the import of typer takes 0.13 s; torch, MLflow or Optuna would take ten times as long."""

    def typer_alone() -> float:
        import resource

        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", "import typer"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    answers = [_completed(words) for _ in range(5)]
    assert answers[0][0] == [offered]
    assert min(seconds for _, seconds in answers) < 6 * min(typer_alone() for _ in range(5))


@pytest.mark.parametrize(
    ("script", "uv", "call"),
    [
        ("/usr/bin/pytest", False, "hpo"),
        ("/x/.venv/bin/hpo", True, "uv run hpo"),
        ("/x/.venv/bin/hpo", False, "/x/.venv/bin/hpo"),
        ("/x/src/hpo/__main__.py", False, f"{sys.executable} -m hpo"),
    ],
)
def test_printed_commands_work_in_this_terminal(
    monkeypatch: pytest.MonkeyPatch, script: str, uv: bool, call: str
) -> None:
    monkeypatch.setattr("sys.argv", [script])
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1") if uv else monkeypatch.delenv(
        "UV_RUN_RECURSION_DEPTH", raising=False
    )
    assert commands.called_as() == call
    assert commands.runnable("See: hpo trials x, as hpo keeps it.") == f"See: {call} trials x, as hpo keeps it."
    monkeypatch.setattr("shutil.which", lambda name: script)
    if not uv and script.endswith("bin/hpo"):
        assert commands.called_as() == "hpo"


def test_messages_show_relative_paths(project: Path) -> None:
    assert output.message(f"{project}/mlruns/x.db: is full") == "mlruns/x.db: is full"
    assert output.message(f"sqlite:///{project}/mlruns/x.db") == "sqlite:///mlruns/x.db"
    for other in (f"/backup{project}/x", f"file://{project}/x", f"{project}-2/x"):
        assert output.message(other) == other


def test_a_long_command_does_not_move_the_words_of_the_others() -> None:
    long = "hpo run digits-mlp --set " + "x" * 200
    assert command_width([("hpo ui", ""), ("hpo promote digits-mlp", ""), (long, "")]) == len("hpo promote digits-mlp")


class _Terminal:
    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True


def test_a_second_without_a_word_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := _Terminal())
    monkeypatch.setattr(silence, "_PATIENCE", 0.0)
    with silence.announced("loading the model"):
        for _ in range(1000):
            if terminal.text:
                break
            time.sleep(0.01)
    assert terminal.text == "loading the model ...\n"


def test_a_command_that_speaks_in_time_is_not_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := _Terminal())
    monkeypatch.setattr(silence, "_PATIENCE", 3600.0)
    with silence.announced("loading the model"):
        timer = silence._timer
        output.print_text("done")
        assert timer is not None
        assert timer.finished.is_set()
    assert terminal.text == ""


def test_trials_have_a_number_sign_and_versions_a_slash() -> None:
    done = runner.invoke(app, ["rerun", "digits-mlp/3"])
    assert done.exit_code == 2
    assert "digits-mlp/3: is version 3 of a model." in done.stderr
    assert "digits-mlp#3" in done.stderr
