"""Displays of a running study: live, plain lines, JSON lines, or only the final result."""

from __future__ import annotations

import re
import textwrap
import time
from abc import ABC, abstractmethod
from dataclasses import fields
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.cli.console import make_console
from hpo.cli.output import (
    INTERRUPTED,
    is_live_terminal,
    message,
    print_json,
    show_bytes,
    show_parameters,
    show_score,
)
from hpo.cli.run_summary import (
    NextCommands,
    RunningTrial,
    Tally,
    closing,
    command_width,
    next_steps,
    opening,
    profile_report,
)
from hpo.events import (
    EpochEnded,
    Event,
    Notice,
    StudyEnded,
    StudyOpened,
    StudyProfiled,
    TrialEnded,
    TrialPaused,
    TrialStarted,
)
from hpo.records import FINAL, TrialResult, TrialState
from hpo.report.text import duration

FRAMES_PER_SECOND = 4  # calm to look at, and cheap compared with training
WIDEST = 100  # columns of the live display, however wide the terminal
LABEL = 12  # width of the labels of the last lines


class Watcher(ABC):
    """Adds up events and shows them as its subclass defines.

    Use it as a context around run_study(..., watch=watcher).
    """

    def __init__(self, commands: NextCommands, *, console: Console | None = None, debug: bool = False) -> None:
        self.commands = commands
        self.console = console or make_console()
        self.debug = debug
        self.tally = Tally()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 - most subclasses have nothing to close
        """Nothing to close, unless a subclass has something."""

    def __call__(self, event: Event) -> None:
        """Add one event and show it."""
        self.tally.add(event)
        self.show(event)

    @abstractmethod
    def show(self, event: Event) -> None:
        """Show one event, which the tally contains."""

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C or hpo stop, 1 if the study has no complete trial, else 0."""
        ended = self.tally.ended
        if ended and ended.reason.by_user:
            return INTERRUPTED
        return 0 if ended and ended.study.best else 1

    def line(self, text: str | Text, style: str = "") -> None:
        """One line, neither wrapped nor cut."""
        text = message(text) if isinstance(text, str) else text
        self.console.print(text, style=style or None, soft_wrap=True)


class JsonLines(Watcher):
    """One JSON object for each event; the last, study_ended, is the result."""

    def show(self, event: Event) -> None:
        """Print the event: its name in snake case, then its fields, without those of earlier lines."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
        body = _fields(event)
        match event:
            case TrialEnded(result) | TrialPaused(result):
                body["result"] = _fields(result, "epochs", "folder")
            case StudyOpened(study):
                body = {**_fields(event, "trials_of_others"), "study": _fields(study, "trials")}
            case EpochEnded():
                body = _fields(event, "costs")
            case TrialStarted():
                body = _fields(event, "setup", "started")
            case StudyEnded(study):
                trials = [
                    {
                        **_fields(trial),
                        "result": trial.result and _fields(trial.result, "epochs", "folder", "confusion"),
                    }
                    for trial in study.trials
                ]
                body["study"] = {**_fields(study), "trials": trials}
                body["best"] = study.best.number if study.best else None
            case _:
                pass
        print_json({"event": name, **body}, indent=None)


def _fields(record: Any, *left_out: str) -> dict[str, Any]:
    return {part.name: getattr(record, part.name) for part in fields(record) if part.name not in left_out}


class Quiet(Watcher):
    """Only the final result."""

    def show(self, event: Event) -> None:
        """Print study, best value and model in one line at the end."""
        if isinstance(event, StudyEnded):
            best, model = event.study.best, event.model
            found = f"{event.study.objective} {show_score(best.value)}, trial {best.number}" if best else "no model"
            registered = f", registered as {model.name} version {model.version}" if model else ""
            done = f"{self.tally.finished} of {self.tally.budget} trials"
            self.line(f"{event.study.title}: {done}, {found}{registered}")


class PlainLines(Watcher):
    """One line for each finished trial and notice: for pipes, files and logs."""

    def __init__(self, commands: NextCommands, *, console: Console | None = None, debug: bool = False) -> None:
        super().__init__(commands, console=console, debug=debug)
        self._shown: dict[str, int] = {}

    def show(self, event: Event) -> None:
        """Print notices, the opening, finished trials and the end."""
        match event:
            case Notice():
                self._notice(event)
            case StudyOpened(study):
                question, facts = opening(event)
                self.line(f"{study.title}: {question}".rstrip(": "))
                self.line(facts)
            case TrialEnded(result, best):
                self.line(self._trial(result, best=best))
                if self.debug and result.traceback:
                    self.line(result.traceback)
            case StudyProfiled():
                self.console.print(profile_report(event))
            case StudyEnded():
                for label, words in closing(self.tally):
                    self.line(f"{label:<{LABEL}}{words}")
                steps = next_steps(self.tally, self.commands)
                width = command_width(steps)
                for index, (command, purpose) in enumerate(steps):
                    self.line(f"{'' if index else 'next':<{LABEL}}{command:<{width}}  {purpose}")
            case _:
                pass

    def _notice(self, event: Notice) -> None:
        # A download reports a hundred times a second; four lines are enough for a log.
        quarter = 4 * event.done // event.total if event.total else 0
        if self._shown.get(event.text) != quarter or not event.total:
            self._shown[event.text] = quarter
            self.line(f"{event.text}{_measure(event)}")

    def _trial(self, result: TrialResult, *, best: bool) -> str:
        budget = str(self.tally.budget)
        known = show_parameters(self.tally.last_parameters, self.tally.names)
        words = result.reason if result.failure or result.state is TrialState.FAILED else known
        place = f"{self.tally.finished:>{len(budget)}}/{budget}"
        stage = self.tally.last_stage
        if stage:
            words = f"{stage}: {words}"
        return (
            f"{'' if stage == FINAL else place:<{len(place)}}  trial {result.number:<4} {result.state:<8}"
            f"  {show_score(result.value) or '-':<6}  {'best' if best else '':<4}"
            f"  {duration(result.seconds):>8}  {words}"
        ).rstrip()


def _measure(notice: Notice) -> str:
    return f"  {show_bytes(notice.done)} of {show_bytes(notice.total)}" if notice.total else ""


class LiveDisplay(Watcher):
    """The state of the run, redrawn in place; finished trials and notices stay above it."""

    def __init__(self, commands: NextCommands, *, console: Console | None = None, debug: bool = False) -> None:

        super().__init__(commands, console=console, debug=debug)
        self._notice: Notice | None = Notice("opening the study")
        self._began = time.monotonic()
        self._live = Live(
            get_renderable=self.frame, console=self.console, refresh_per_second=FRAMES_PER_SECOND, transient=True
        )

    def __enter__(self) -> LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        """Print lines that stay; the rest is drawn in the next frame."""
        match event:
            case Notice(total=0):
                self.line(event.text, "dim")
            case Notice():
                self._notice = event if event.done < event.total else None
            case StudyOpened(study):
                self._notice = None
                question, facts = opening(event)
                self.console.print(Text.assemble((study.title, "bold"), f"  {question}"))
                self.console.print(Text(facts, "dim"))
            case TrialEnded(result, best):
                self._end_trial(result, best=best)
            case StudyProfiled():
                self.console.print(profile_report(event))
            case StudyEnded():
                self._live.stop()
                self._close()
            case _:
                pass

    def _end_trial(self, result: TrialResult, *, best: bool) -> None:

        if best:
            words = show_parameters(self.tally.last_parameters, self.tally.names)
            text = Text.assemble(
                (f"{show_score(result.value)}", "green"), (f"  trial {result.number:<4} {words}", "dim")
            )
            self.console.print(text, no_wrap=True, overflow="ellipsis")
        elif result.state is TrialState.FAILED or (result.failure and result.state.finished):
            self.line(f"trial {result.number} {result.state}: {result.reason}", "red")
            if self.debug and result.traceback:
                self.line(result.traceback, "dim")
        elif result.state.finished:
            words = show_parameters(self.tally.last_parameters, self.tally.names)
            state = "pruned  " if result.state is TrialState.PRUNED else ""
            line = f"{show_score(result.value) or '-':<6}  trial {result.number:<4} {state}{words}"
            self.console.print(Text(line, "dim"), no_wrap=True, overflow="ellipsis")

    def _close(self) -> None:

        room = max(self.console.width - LABEL, 20)
        self.line("")
        for label, words in closing(self.tally):
            for index, part in enumerate(textwrap.wrap(words, room) or [""]):
                style = "green" if label == "best" else "bold" if label == "model" else ""
                self.line(Text.assemble((f"{'' if index else label:<{LABEL}}", "dim"), (part, style)))
        steps = next_steps(self.tally, self.commands)
        width = command_width(steps)
        self.line("")
        for index, (command, purpose) in enumerate(steps):
            # The command must be complete for copying, so its purpose is left out if both do not fit.
            shown = f"  {purpose}" if max(width, len(command)) + 2 + len(purpose) <= room else ""
            label = "" if index else "next"
            self.line(Text.assemble((f"{label:<{LABEL}}", "dim"), (f"{command:<{width}}", "cyan"), (shown, "dim")))

    def frame(self) -> RenderableType:
        """The current frame, at most as wide and high as the terminal."""
        parts: list[RenderableType] = []
        if self.tally.opened and not self.tally.ended:
            parts = ["", self._overview(), "", *self._best(), *self._running()]
        if self._notice:
            parts.append(self._note(self._notice))
        return Group(*parts)

    def _grid(self, *cells: str | Text | ProgressBar, into: Table | None = None) -> Table:
        """One row of a grid as wide as the picture, in which a bar takes the rest of the width."""
        if into is None:
            into = Table.grid(padding=(0, 2, 0, 0), expand=True, pad_edge=False)
            into.width = min(self.console.width, WIDEST)
            for cell in cells:
                into.add_column(no_wrap=True, ratio=1 if isinstance(cell, ProgressBar) else None)
        into.add_row(*cells)
        return into

    def _note(self, notice: Notice) -> RenderableType:
        if not notice.total:
            return Text(f"{notice.text} ... {time.monotonic() - self._began:.0f} s", "dim")
        bar = ProgressBar(total=notice.total, completed=notice.done)
        return self._grid(notice.text, bar, Text(_measure(notice).strip(), "dim"))

    def _overview(self) -> RenderableType:
        tally = self.tally
        bar = ProgressBar(
            total=max(tally.budget, 1), completed=tally.finished, complete_style="green", finished_style="green"
        )
        pace = [duration(tally.seconds)]
        left = tally.seconds_left
        if left is not None and tally.seconds > 0:
            pace = [f"{60 * tally.finished_here / tally.seconds:.3g} trials/min", f"{duration(left)} left"]
        counts = ", ".join(filter(None, [tally.counts(), f"{len(tally.running)} running"]))
        return Group(
            self._grid(bar, Text(f"{tally.finished}/{tally.budget}", "bold"), Text(" · ".join(pace))),
            Text(counts, "dim"),
        )

    def _best(self) -> list[RenderableType]:
        best = self.tally.best
        if best is None:
            return []
        words = show_parameters(self.tally.best_parameters, self.tally.names)
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.width = min(self.console.width, WIDEST)
        head = Text.assemble((f"{self.tally.objective} {show_score(best.value)}", "green"))
        grid.add_row(Text("best", "dim"), head + Text(f"  trial {best.number}, epoch {best.best_epoch}", "dim"))
        grid.add_row("", words)
        return [grid, ""]

    def _running(self) -> list[RenderableType]:
        # By worker, so that a row stays where it is.
        trials = sorted(self.tally.running.values(), key=lambda trial: (len(trial.worker), trial.worker))
        room = max(self.console.height - 12, 2)
        table: Table | None = None
        for trial in trials[:room]:
            table = self._grid(*self._trial_cells(trial), into=table)
        more = [Text(f"and {len(trials) - room} more", "dim")] if len(trials) > room else []
        return [*([table] if table else []), *more]

    def _trial_cells(self, trial: RunningTrial) -> tuple[str | Text | ProgressBar, ...]:
        fold = f"fold {trial.fold + 1} " if trial.fold else ""
        most = f"/{trial.epochs}" if trial.epochs else ""
        best = f"best {show_score(trial.best)}" if trial.best is not None else ""
        return (
            Text(" ".join(filter(None, [f"trial {trial.number}", trial.stage])), "dim"),
            ProgressBar(
                total=max(trial.epochs, 1), completed=trial.epoch, complete_style="cyan", finished_style="cyan"
            ),
            f"{fold}epoch {trial.epoch:>{len(str(trial.epochs))}}{most}",
            f"{show_score(trial.value):6}",
            Text(f"{best:11}", "dim"),
        )


def watcher(*, as_json: bool, quiet: bool) -> type[Watcher]:
    """The display that the user's options and the output need."""
    if as_json or quiet:
        return JsonLines if as_json else Quiet
    return LiveDisplay if is_live_terminal() else PlainLines
