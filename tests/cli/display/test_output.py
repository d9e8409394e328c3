"""Numbers, times and parameters in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.text import Text

from hpo.cli import output
from hpo.cli.console import make_console
from hpo.cli.live import JsonLines, LiveDisplay, PlainLines, Quiet
from hpo.cli.output import parse_duration, plain, show_bytes, show_parameters
from hpo.cli.run_summary import NextCommands
from hpo.events import Notice
from hpo.options import RunOptions
from hpo.report.text import duration, short_paths
from told_study import SPEC, opened, trial_events


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("45s", 45),
        ("30m", 1800),
        ("30min", 1800),
        ("1h", 3600),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("2m 5s", 125),
    ],
)
def test_durations_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "soon", "1d", "1.2.3h", "m", "1h-5m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (3.14, "3.1 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (7500, "2 h 05 min")],
)
def test_seconds_are_shown_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bytes_are_shown_in_the_unit_that_fits() -> None:
    assert [show_bytes(count) for count in (12, 3400, 512e6, 1.25e9, 2e15)] == [
        "12 B",
        "3.4 kB",
        "512 MB",
        "1.2 GB",
        "2000.0 TB",
    ]


def test_short_paths_are_the_shortest_that_stay_different() -> None:
    paths = ["model.dropout", "head.dropout", "training.optimizer.name", "training.optimizer.lr", "model.kind"]
    assert list(short_paths(paths).values()) == ["model.dropout", "head.dropout", "optimizer", "lr", "model"]


def test_parameters_are_shown_to_three_digits() -> None:
    shown = show_parameters({"model.hidden": [512, 256], "training.optimizer.lr": 0.00123456, "model.batch_norm": True})
    assert shown == "hidden=[512,256] lr=0.00123 batch_norm=true"


def test_numbers_that_json_lacks_become_null() -> None:
    assert plain({"a": float("nan"), "b": [float("inf"), 1.5]}) == {"a": None, "b": [None, 1.5]}


# Red, a title for the window, back over the line, the other direction, a command of eight bits, a link.
STEERING = "\x1b[31m\x1b]0;you\x07\r\b\u202e\x9b2J\x1b]8;;http://x\x1b\\"
NAME = f"cat{STEERING}dog"
ROWS = [{"file": NAME, "class": NAME, "probability": 1.0, "probabilities": {NAME: 1.0}}]
WRITERS: dict[str, Callable[[], Any]] = {
    "table": lambda: output.print_table([[NAME, Text(NAME)]], [NAME, "~x"]),
    "long table": lambda: output.print_table([[NAME]] * 501, [NAME]),
    "facts": lambda: output.print_facts([(NAME, NAME)]),
    "warning": lambda: output.print_warning(NAME),
    "text": lambda: output.print_text(NAME),
    "json": lambda: output.print_json({NAME: NAME}),
    "csv": lambda: output.write_text(output.predictions_csv(ROWS), None),
    "error": lambda: output.fail(ValueError(NAME), debug=True),
    **{kind.__name__: lambda kind=kind: _watched(kind) for kind in (PlainLines, LiveDisplay, JsonLines, Quiet)},
}


def _watched(kind: Any) -> None:
    study = opened(spec={**SPEC, "question": NAME})
    with kind(NextCommands("run", NAME, again=RunOptions(), further=RunOptions())) as watcher:
        for event in (study, Notice(NAME), *trial_events(0, best=True)):
            watcher(event)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_text_of_others_steers_no_terminal(writer: Callable[[], Any], capsys: pytest.CaptureFixture[str]) -> None:
    writer()
    told = "".join(capsys.readouterr())
    assert not {*told} & {*STEERING} - {*"\\[31m]0;you2J8http:/x"}
    assert "cat" in told or writer is WRITERS["Quiet"]


def test_a_file_of_predictions_holds_nothing_that_steers(tmp_path: Path) -> None:
    odd = [{**ROWS[0], "file": "\udcff.png"}]  # as a name is read that is no text
    output.write_text(output.predictions_csv(odd), tmp_path / "found.csv")
    assert (tmp_path / "found.csv").read_text().splitlines()[1].split(",")[1].startswith("cat[31m")
    assert json.loads(json.dumps(output.plain(ROWS)))[0]["class"] == NAME  # Python users get the name as it is


def test_a_table_in_the_terminal_keeps_its_own_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    console = make_console()
    console._color_system, console._force_terminal = 1, True
    with console.capture() as captured:
        console.print(Text(NAME, "red"))
    assert captured.get().startswith("\x1b[31mcat[31m")


def test_memory_that_does_not_suffice_is_an_error_to_mend(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MemoryError) as raised:
        np.empty((10**6, 10**6, 3000), np.uint8)
    assert output.fail(raised.value) == 2
    assert capsys.readouterr().err.startswith("error: the memory of this machine does not suffice: Unable to allocate")
