"""Adds up the events of a running study; its start and its end as text."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpo.cli.commands import runnable
from hpo.cli.options import home_flag
from hpo.cli.output import show_parameters, show_score
from hpo.events import EpochEnded, Event, StudyEnded, StudyOpened, StudyProfiled, TrialEnded, TrialPaused, TrialStarted
from hpo.options import RunOptions
from hpo.records import AFTER_SEARCH, FINAL, Candidate, EndReason, TrialResult, TrialState
from hpo.report.summary import failure_lines
from hpo.report.text import counted, duration, parameter_names, ranges_of


@dataclass(frozen=True)
class NextCommands:
    """Commands for the user: `hpo COMMAND STUDY` with the options `again` resumes; further trials take `further`."""

    command: str
    study: str
    again: RunOptions
    further: RunOptions

    def more(self, trials: int) -> str:
        """The command that continues the study to this total of trials."""
        return replace(self.further, trials=trials).command_line("run", self.study)


@dataclass
class RunningTrial:
    """A running trial; epochs is the maximum, best the best objective so far."""

    number: int
    worker: str
    parameters: Mapping[str, Any]
    epochs: int
    stage: str | None = None
    epoch: int = 0
    fold: int = 0
    value: float | None = None
    best: float | None = None


@dataclass
class Tally:
    """The events so far, added up; clock gives seconds that only grow."""

    clock: Callable[[], float] = time.monotonic
    opened: StudyOpened | None = None
    ended: StudyEnded | None = None
    running: dict[int, RunningTrial] = field(default_factory=dict)
    paused: dict[int, RunningTrial] = field(default_factory=dict)
    states: dict[TrialState, int] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    best: TrialResult | None = None
    best_parameters: Mapping[str, Any] = field(default_factory=dict)
    last_parameters: Mapping[str, Any] = field(default_factory=dict)
    last_stage: str | None = None
    finals: int = 0
    finished_here: int = 0
    started: float = 0.0

    def add(self, event: Event) -> None:
        """Add one event."""
        match event:
            case StudyOpened():
                self._open(event)
            case TrialStarted(candidate, worker):
                self.paused.pop(candidate.number, None)
                self.running[candidate.number] = self._trial(candidate, worker)
            case EpochEnded(number, epoch) if number in self.running:
                trial = self.running[number]
                trial.epoch, trial.fold = epoch.number, epoch.fold
                trial.value = epoch.scores.get(self.objective)
                trial.best = self.better(trial.best, trial.value)
            case TrialPaused(result) if result.number in self.running:
                self.paused[result.number] = self.running.pop(result.number)
            case TrialEnded(result, best):
                self._end_trial(result, best=best)
            case StudyEnded():
                self.ended = event
            case _:
                pass

    def _trial(self, candidate: Candidate, worker: str) -> RunningTrial:
        epochs = candidate.parameters.get("training.epochs") or self._setting("training", "epochs") or 0
        return RunningTrial(candidate.number, worker, candidate.parameters, int(epochs), candidate.stage)

    def _open(self, event: StudyOpened) -> None:
        self.opened, self.started = event, self.clock()
        study = event.study
        counting = [trial for trial in study.trials if not trial.outside]
        searched = [trial.state for trial in counting if trial.candidate.stage not in AFTER_SEARCH]
        self.states = {state: searched.count(state) for state in TrialState if state.finished}
        paused = [trial for trial in study.trials if trial.state is TrialState.PAUSED]
        self.paused = {trial.number: self._trial(trial.candidate, "") for trial in paused}
        ranges = ranges_of(study)
        held = {path for trial in study.trials for path in trial.candidate.parameters}
        self.names = parameter_names(ranges or held, ranges)
        if study.best:
            self.best, self.best_parameters = study.best.result, study.best.candidate.parameters

    def _end_trial(self, result: TrialResult, *, best: bool) -> None:
        trial = self.running.pop(result.number, None) or self.paused.pop(result.number, None)
        self.last_parameters, self.last_stage = (trial.parameters, trial.stage) if trial else ({}, None)
        if self.last_stage == FINAL:
            self.finals += result.state is TrialState.COMPLETE
        elif result.state.finished:
            self.states[result.state] = self.states.get(result.state, 0) + 1
            self.finished_here += 1
        if best:
            self.best, self.best_parameters = result, self.last_parameters

    def _setting(self, part: str, name: str) -> Any:
        return (self.opened.study.spec.get(part) or {}).get(name) if self.opened else None

    @property
    def objective(self) -> str:
        """The objective of the study."""
        return self.opened.study.objective if self.opened else ""

    @property
    def budget(self) -> int:
        """The study's total number of trials."""
        return self.opened.budget if self.opened else 0

    @property
    def finished(self) -> int:
        """Trials done, those of earlier runs included."""
        return (self.opened.finished if self.opened else 0) + self.finished_here

    @property
    def seconds(self) -> float:
        """Since the study was opened."""
        return self.clock() - self.started if self.opened else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far; None before the first trial of this run has ended."""
        if not self.finished_here:
            return None
        return max(self.budget - self.finished, 0) * self.seconds / self.finished_here

    def better(self, one: float | None, other: float | None) -> float | None:
        """The better of two objectives; None counts as none."""
        values = [value for value in (one, other) if value is not None]
        minimize = self.opened is not None and self.opened.study.direction == "minimize"
        return (min if minimize else max)(values, default=None)

    def counts(self) -> str:
        """15 complete, 4 pruned, 1 failed, 3 paused."""
        states = {**self.states, TrialState.PAUSED: len(self.paused)}
        return ", ".join(f"{count} {state}" for state, count in states.items() if count)


def opening(event: StudyOpened) -> tuple[str, str]:
    """The question, and data, parts, device and workers in one line."""
    data, split = event.data, event.split
    parts = ", ".join(f"{split.counts[part]:,} {part}" for part in ("train", "valid") if part in split.counts)
    workers = counted(event.workers, "worker") if event.workers else "in this process"
    workers += f", {event.stack} trials side by side in each" if event.stack > 1 else ""
    facts = [f"{data.name} {data.digest.removeprefix('sha256:')[:8]}", parts, event.device, workers]
    if event.finished:
        facts.append(f"{event.finished} of {event.budget} done")
    return str(event.study.spec.get("question") or ""), " · ".join(facts)


def closing(tally: Tally) -> list[tuple[str, str]]:
    """The end of the study as (label, text): trials, best trial, registered model."""
    ended = tally.ended
    if ended is None:
        return []
    study, best = ended.study, ended.study.best
    rows = [(_REASONS.get(ended.reason, ended.reason), _done(tally))]
    if best and best.result:
        rows.append(
            ("best", f"{study.objective} {show_score(best.value)}, trial {best.number}, epoch {best.result.best_epoch}")
        )
        rows.append(("", show_parameters(best.candidate.parameters, tally.names)))
    else:
        rows.append(("best", "none: no trial was completed"))
        rows += zip(("failures", "mostly"), failure_lines(study), strict=False)
    if ended.model and tally.finals:
        again = "1 more training" if tally.finals == 1 else f"{tally.finals} more trainings"
        rows.append(("final", f"{again} of the best; trial {ended.model.trial} is the model"))
    if ended.ensemble:
        rows.append(("ensemble", ended.ensemble))
    if ended.model:
        alias = f", alias {', '.join(ended.model.aliases)}" if ended.model.aliases else ""
        rows.append(("model", f"{ended.model.name} version {ended.model.version}{alias}"))
    return rows


_WIDEST_COMMAND = 48  # columns
_REASONS = {
    EndReason.BUDGET: "done",
    EndReason.EXHAUSTED: "done",
    EndReason.REACHED: "done",
    EndReason.ENOUGH: "enough",
    EndReason.TIMEOUT: "time limit",
    EndReason.FAILING: "gave up",
}


def _done(tally: Tally) -> str:
    if tally.ended and tally.ended.reason is EndReason.EXHAUSTED:
        return f"every candidate of the space was tried: {tally.counts()}"
    if not tally.finished_here and tally.finished >= tally.budget:
        return f"all {tally.finished} trials were done before: {tally.counts()}"
    counts = f": {tally.counts()}" if tally.finished else ""
    if tally.ended and tally.ended.reason is EndReason.REACHED:
        until = (tally.ended.study.spec.get("search") or {}).get("until")
        return f"search.until {until} is reached after {tally.finished} trials, {duration(tally.seconds)}{counts}"
    if tally.ended and tally.ended.reason is EndReason.ENOUGH:
        return f"{tally.ended.study.enough}; {duration(tally.seconds)}{counts}"
    return f"{tally.finished} of {tally.budget} trials, {duration(tally.seconds)}{counts}"


def next_steps(tally: Tally, commands: NextCommands) -> list[tuple[str, str]]:
    """(command, what it does) for what comes next."""
    ended = tally.ended
    if ended is None:
        return []
    home, model = home_flag(commands.again.home), ended.model
    steps = []
    if not ended.reason.completed and tally.finished < tally.budget:
        steps.append((commands.again.command_line(commands.command, commands.study), "resume"))
    if model and "champion" not in model.aliases:
        steps.append((f"hpo promote {model.study or model.name}{home}", "open its sealed test part once"))
    if model:
        steps.append((f"hpo predict {model.name} IMAGE...{home}", "classify image files"))
    if ended.ensemble and not ended.study.spec.get("ensemble"):
        steps.append((f"hpo ensemble {ended.study.name}{home}", "make that ensemble the challenger"))
    steps.append((f"hpo ui{home}", "open every run in MLflow"))
    if ended.reason is EndReason.BUDGET and not (ended.study.spec.get("search") or {}).get("stages"):
        steps.append((commands.more(2 * tally.budget), "continue the search"))
    return [(runnable(command), purpose) for command, purpose in steps]


def command_width(steps: list[tuple[str, str]]) -> int:
    """The width of the column of commands: one with a long --set does not push the words of the others away."""
    return max((len(command) for command, _ in steps if len(command) <= _WIDEST_COMMAND), default=0)


def profile_report(profiled: StudyProfiled) -> RenderableType:
    """Seconds and shares by phase in the workers, CPU seconds of the other processes, and the slowest operators."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("where the time went", no_wrap=True)
    for column in ("time", "share", "per trial"):
        table.add_column(column, justify="right", no_wrap=True)
    trials, total = max(1, profiled.trials), sum(profiled.phases.values())
    for phase, seconds in profiled.phases.items():
        table.add_row(phase, duration(seconds), f"{seconds / total:.1%}" if total else "", duration(seconds / trials))
    for process, seconds in profiled.outside.items():
        table.add_row(f"{process}, CPU", duration(seconds), "", duration(seconds / trials), style="dim")
    operators = ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in profiled.operators.items())
    return Group("", table, *([Text(f"slowest operators: {operators}", "dim")] if operators else []), "")
