"""Every way of watching a study says what happened, in its own form."""

from __future__ import annotations

import io
import json
import time

import numpy as np
import pytest
from rich.console import Console

from hpo.cli.live import JsonLines, LiveDisplay, PlainLines, Quiet, Watcher
from hpo.cli.run_summary import NextCommands, Tally
from hpo.events import EpochEnded, Event, Notice, StudyOpened, StudyProfiled, TrialEnded
from hpo.options import RunOptions
from hpo.records import TrialState
from told_study import STORY, ended, opened, study, trial_events, trial_result, whole_story

OPTIONS = RunOptions(home="/data", trials=4)
COMMANDS = NextCommands("run", "digits-mlp", again=OPTIONS, further=OPTIONS)


def told(watcher: Watcher, *events: Event) -> str:
    with watcher:
        for event in events:
            watcher(event)
    stream = watcher.console.file
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def frame(display: LiveDisplay, width: int = 80) -> str:
    """What the display would draw now, as text."""
    page = Console(file=io.StringIO(), width=width, color_system=None)
    page.print(display.frame())
    assert isinstance(page.file, io.StringIO)
    return page.file.getvalue()


def test_plain_lines_hold_one_line_for_each_finished_trial(terminal: Console) -> None:
    lines = told(PlainLines(COMMANDS, console=terminal), *whole_story()).splitlines()
    trials = [line.split() for line in lines if "/4  trial" in line]
    assert [(words[0], words[2], words[3]) for words in trials] == [
        ("1/4", "0", "complete"),
        ("2/4", "1", "pruned"),
        ("3/4", "2", "complete"),
        ("4/4", "3", "failed"),
    ]
    assert [words[4] for words in trials] == ["0.8000", "0.2000", "0.9000", "-"]
    assert [int(words[2]) for words in trials if "best" in words] == [0, 2]
    assert trials[2][-3:] == ["hidden=48", "optimizer=adam", "lr=0.00123"]
    assert " ".join(trials[3]).endswith("the loss is nan")


def test_last_lines_say_best_trial_model_and_what_to_do_next(terminal: Console) -> None:
    text = told(PlainLines(COMMANDS, console=terminal), *whole_story())
    assert "valid_accuracy 0.9000, trial 2, epoch 2" in text
    assert "digits-mlp version 7, alias challenger" in text
    assert "2 complete, 1 pruned, 1 failed" in text
    for command in (
        "hpo promote digits-mlp --home /data",
        "hpo predict digits-mlp IMAGE... --home /data",
        "hpo ui --home /data",
        "hpo run digits-mlp --home /data --trials 8",
    ):
        assert command in text


@pytest.mark.parametrize("kind", [PlainLines, LiveDisplay])
def test_interrupted_study_says_how_to_go_on(kind: type[Watcher], terminal: Console) -> None:
    watcher = kind(COMMANDS, console=terminal)
    text = told(watcher, opened(), *trial_events(0, best=True), ended(0, reason="interrupted"))
    assert "1 of 4 trials" in text
    assert "hpo run digits-mlp --home /data --trials 4" in text
    assert "--trials 8" not in text
    assert watcher.exit_code == 130


def test_study_done_before_says_so_and_how_to_ask_for_more(terminal: Console) -> None:
    watcher = PlainLines(COMMANDS, console=terminal)
    text = told(watcher, opened(*STORY), ended(*STORY))
    assert "all 4 trials were done before" in text
    assert "--trials 8" in text
    assert watcher.exit_code == 0


@pytest.mark.parametrize("kind", [PlainLines, LiveDisplay])
def test_study_without_a_complete_trial_exits_1_with_the_last_reason(kind: type[Watcher], terminal: Console) -> None:
    watcher = kind(COMMANDS, console=terminal)
    text = told(watcher, opened(), *trial_events(3), ended(3, reason="failing"))
    assert text.count("the loss is nan") == 2
    assert watcher.exit_code == 1


def test_tracebacks_of_workers_are_shown_only_on_demand(terminal: Console) -> None:
    story = [opened(), *trial_events(3)]
    assert "Traceback" not in told(PlainLines(COMMANDS, console=terminal), *story)
    assert "Traceback of the worker" in told(PlainLines(COMMANDS, console=terminal, debug=True), *story)


def test_plain_lines_tell_a_download_in_a_handful_of_lines(terminal: Console) -> None:
    notices = [Notice("downloading x.npz", done * 1000, 1_000_000) for done in range(1001)]
    lines = told(PlainLines(COMMANDS, console=terminal), *notices).splitlines()
    assert len(lines) == 5
    assert lines[-1].endswith("1.0 MB of 1.0 MB")


def test_json_lines_are_valid_json_and_end_with_the_result(
    capsys: pytest.CaptureFixture[str], terminal: Console
) -> None:
    told(JsonLines(COMMANDS, console=terminal), *whole_story())
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(events) == len(list(whole_story()))
    assert [event["event"] for event in events[:3]] == ["notice", "study_opened", "trial_started"]
    assert events[-1]["event"] == "study_ended"
    assert (events[-1]["best"], events[-1]["model"]["version"]) == (2, 7)
    assert [trial["state"] for trial in events[-1]["study"]["trials"]] == [state.value for state, _ in STORY.values()]


def test_json_lines_say_each_epoch_once(capsys: pytest.CaptureFixture[str], terminal: Console) -> None:
    told(JsonLines(COMMANDS, console=terminal), *whole_story())
    text = capsys.readouterr().out
    assert text.count('"learning_rate"') == sum(len(values) for _, values in STORY.values())


def test_json_lines_accept_numpy_numbers_and_nan(capsys: pytest.CaptureFixture[str], terminal: Console) -> None:
    epoch = trial_result(0).epochs[0]
    odd = type(epoch)(np.int64(1), {"a": np.float32(0.5), "b": float("nan"), "c": np.float64("inf")}, 0.1, 0.1)
    told(JsonLines(COMMANDS, console=terminal), EpochEnded(0, odd))
    assert json.loads(capsys.readouterr().out)["epoch"]["scores"] == {"a": 0.5, "b": None, "c": None}


PROFILED = StudyProfiled(
    trials=2,
    workers=2,
    seconds=5.0,
    phases={"forward": 3.0, "between epochs": 1.0, "idle": 4.0},
    outside={"export and figures": 0.2},
    operators={"aten::addmm": 0.42, "aten::relu": 0.1},
)


@pytest.mark.parametrize("kind", [PlainLines, LiveDisplay])
def test_a_profile_says_shares_and_operators(kind: type[Watcher], terminal: Console) -> None:
    terminal.width = 200
    text = told(kind(COMMANDS, console=terminal), *whole_story(), PROFILED)
    rows = [line.split() for line in text.splitlines()]
    assert ["forward", "3.0", "s", "37.5%", "1.5", "s"] in rows
    assert ["export", "and", "figures,", "CPU", "0.2", "s", "0.1", "s"] in rows
    assert "slowest operators: addmm 42%, relu 10%" in text


def test_a_profile_is_an_event_in_json(capsys: pytest.CaptureFixture[str], terminal: Console) -> None:
    told(JsonLines(COMMANDS, console=terminal), PROFILED)
    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["phases"]["forward"]) == ("study_profiled", 3.0)


def test_quiet_prints_one_line(terminal: Console) -> None:
    text = told(Quiet(COMMANDS, console=terminal), *whole_story())
    assert text == "digits-mlp: 4 of 4 trials, valid_accuracy 0.9000, trial 2, registered as digits-mlp version 7\n"


def test_live_frame_shows_progress_best_and_running_trials(terminal: Console) -> None:
    display = LiveDisplay(COMMANDS, console=terminal)
    for event in (opened(0, 1), *list(trial_events(2))[:3]):
        display(event)
    text = frame(display)
    assert "2/4" in text
    assert "1 complete, 1 pruned, 1 running" in text
    assert "valid_accuracy 0.8000  trial 0, epoch 3" in text
    assert "hidden=16 optimizer=adam lr=0.00123" in text
    running = next(line for line in text.splitlines() if line.startswith("trial 2"))
    assert running.split()[-5:] == ["epoch", "2/3", "0.9000", "best", "0.9000"]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_live_frame_never_exceeds_the_terminal(width: int) -> None:
    page = Console(file=io.StringIO(), width=width, height=24, color_system=None, force_terminal=True)
    display = LiveDisplay(COMMANDS, console=page)
    display(opened(0, budget=100))
    for number in range(2, 64):
        start = next(iter(trial_events(2)))
        display(type(start)(type(start.candidate)(number, number, start.candidate.parameters, 0), f"worker {number}"))
    lines = frame(display, width).splitlines()
    assert max(map(len, lines)) <= min(width, 100)
    assert len(lines) <= 24
    assert "more" in lines[-1]


def test_live_display_keeps_every_finished_trial_above_itself(terminal: Console) -> None:
    lines = told(LiveDisplay(COMMANDS, console=terminal), *whole_story()).splitlines()
    kept = [line.split()[:3] for line in lines if line.startswith(("0.", "trial 3 failed"))]
    assert kept == [
        ["0.8000", "trial", "0"],
        ["0.2000", "trial", "1"],
        ["0.9000", "trial", "2"],
        ["trial", "3", "failed:"],
    ]
    assert max(map(len, lines)) <= 80


def test_live_display_shows_the_bytes_of_a_download(terminal: Console) -> None:
    display = LiveDisplay(COMMANDS, console=terminal)
    display(Notice("downloading bloodmnist.npz", 12_000_000, 35_000_000))
    assert "12.0 MB of 35.0 MB" in frame(display)
    display(Notice("downloading bloodmnist.npz", 35_000_000, 35_000_000))
    assert "MB" not in frame(display)


def test_live_display_leaves_the_terminal_as_it_was_when_a_study_breaks() -> None:
    page = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)

    def break_off() -> None:
        with LiveDisplay(COMMANDS, console=page) as display:
            display(opened())
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        break_off()
    assert isinstance(page.file, io.StringIO)
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert page.file.getvalue().count(hide) == page.file.getvalue().count(show) == 1


def test_epochs_cost_the_supervisor_next_to_nothing(terminal: Console) -> None:
    display = LiveDisplay(COMMANDS, console=terminal)
    display(opened())
    start, epoch, *_ = trial_events(0)
    display(start)
    began = time.process_time()
    for _ in range(2000):
        display(epoch)
    # Ten seconds of the busiest study; 0.01 s on an idle machine.
    assert time.process_time() - began < 0.5


def test_pace_counts_only_the_trials_of_this_run() -> None:
    now = [100.0]
    tally = Tally(clock=lambda: now[0])
    tally.add(opened(0, 1, budget=10))
    assert tally.seconds_left is None
    now[0] = 130.0
    tally.add(TrialEnded(trial_result(2)))
    assert (tally.finished, tally.seconds_left) == (3, 7 * 30.0)


def test_stopped_trials_do_not_count() -> None:
    tally = Tally()
    tally.add(opened())
    stopped = type(trial_result(0))(0, TrialState.STOPPED)
    tally.add(TrialEnded(stopped))
    assert (tally.finished, tally.counts()) == (0, "")


def test_best_so_far_of_a_loss_is_the_lowest() -> None:
    tally = Tally()
    event = opened(direction="minimize", objective="valid_accuracy")
    assert isinstance(event, StudyOpened)
    tally.add(event)
    for step in trial_events(0):
        if not isinstance(step, TrialEnded):
            tally.add(step)
    assert tally.running[0].best == 0.5


def test_generation_is_part_of_the_title(terminal: Console) -> None:
    event = opened()
    later = type(event)(
        type(event.study)("digits-mlp", 2, "maximize", "valid_accuracy"), event.data, event.split, 4, 0, 0, "cpu"
    )
    text = told(PlainLines(COMMANDS, console=terminal), later)
    assert text.startswith("digits-mlp~2\n")
    assert "in this process" in text
    assert study().title == "digits-mlp"
