"""`hpo run`, `hpo rerun`, `hpo stop` and `hpo status`: train a study, a trial again, stop, and show what runs."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.cli import output
from hpo.cli.options import (
    CLUSTER,
    OUTPUT,
    Address,
    AsEvents,
    AsJson,
    AStudy,
    CpusPerTrial,
    Debug,
    DeviceName,
    EngineName,
    Extend,
    Fresh,
    GpusPerTrial,
    HomeFolder,
    KeepModels,
    Minutes,
    PrecisionName,
    PresetName,
    Quiet,
    RetryFailed,
    Settings,
    SlurmSettings,
    StackSize,
    Study,
    Timeout,
    Trials,
    Trust,
    Weights,
    Workers,
    home_flag,
    read_duration,
    study_name,
)
from hpo.options import RunOptions
from hpo.records import AFTER_SEARCH, TrialState
from hpo.report.text import counted, duration

if TYPE_CHECKING:
    from hpo.jobs.rerun import EpochCheck
    from hpo.storage.reader import StudySnapshot


def run(
    study: Study,
    trials: Trials = None,
    workers: Workers = None,
    stack: StackSize = None,
    device: DeviceName = "auto",
    engine: EngineName = "processes",
    address: Address = None,
    gpus_per_trial: GpusPerTrial = None,
    cpus_per_trial: CpusPerTrial = None,
    settings: Settings = None,
    trust: Trust = False,
    home: HomeFolder = None,
    fresh: Fresh = False,
    extend: Extend = False,
    retry_failed: RetryFailed = False,
    timeout: Timeout = None,
    minutes: Minutes = None,
    preset: PresetName = "good",
    weights: Weights = None,
    keep_models: KeepModels = None,
    precision: PrecisionName = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Report where the time went.", rich_help_panel=OUTPUT)
    ] = False,
    slurm: SlurmSettings = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Submit the jobs and return.", rich_help_panel=CLUSTER)
    ] = False,
    print_script: Annotated[
        bool, typer.Option("--print", help="Print a script for sbatch, and submit nothing.", rich_help_panel=CLUSTER)
    ] = False,
    as_json: AsEvents = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a study, or resume it; register its best model.

    For a folder, npz or table of your own images, a study is written first, as by hpo new. Ctrl-C ends it cleanly; the
    same command resumes it. If all trials of a study are done, ask for more: --trials N.
    """
    options = RunOptions.pick(locals())
    study, options, closing = _own_images(study, options, preset=preset, weights=weights, tell=not (as_json or quiet))
    start(study, options, closing=closing, as_json=as_json, quiet=quiet, debug=debug)


def _own_images(
    study: str, options: RunOptions, *, preset: str, weights: list[str] | None, tell: bool
) -> tuple[str, RunOptions, float]:
    """The study to run, its options, and closing of run_study; where images of one's own are given, it is written."""
    if not study.endswith((".yaml", ".yml")) and Path(study).expanduser().exists():
        from hpo.execute.process import start_fork_server

        start_fork_server()  # it imports torch while this process does
        from hpo.cli.new import study_for
        from hpo.jobs.new_study import source_of

        if (source := source_of(study)) is not None:
            return study_for(source, options, preset=preset, weights=weights, tell=tell)
    if weights:
        from hpo.errors import HpoError

        raise HpoError(f"--weights: is for images of your own, and {study} is a study.", "--set model.weights=FILE")
    return study, options, 0.0


def start(study: str, options: RunOptions, *, closing: float = 0.0, as_json: bool, quiet: bool, debug: bool) -> None:
    """Run a study with these options, here or on a scheduler's jobs."""
    from hpo.execute.process import start_fork_server

    if options.engine not in ("kubernetes", "slurm"):
        start_fork_server()  # the imports below run at the same time
    from hpo.cli.live import watcher
    from hpo.cli.run_summary import NextCommands
    from hpo.errors import HpoError
    from hpo.spec.load import load_study

    if options.engine == "kubernetes":
        hint = f"Print it: hpo manifest {shlex.quote(study)} --image IMAGE"
        raise HpoError("--engine kubernetes: is a manifest.", hint)
    spec = load_study(study, overrides=options.settings, trust=options.trust)
    resume = options.to_resume()
    display = watcher(as_json=as_json, quiet=quiet)(NextCommands("run", study, resume, resume), debug=debug)
    if options.engine == "slurm":
        from hpo.cli.cluster import run_slurm

        raise typer.Exit(run_slurm(spec, options, display, as_json=as_json))
    with display as watch:
        # Imported inside, because it takes a moment in which the terminal should not look dead.
        from hpo.execute.run_study import run_study

        run_study(spec, options, closing=closing, watch=watch)
    raise typer.Exit(watch.exit_code)


_MARKS = {"equal": "=", "close": "~", "differs": "x"}


def rerun(
    trial: Annotated[str, typer.Argument(metavar="STUDY#TRIAL", help="digits-mlp#3.", show_default=False)],
    tolerance: Annotated[
        float, typer.Option(metavar="N", min=0.0, help="Largest difference of a score that counts as close.")
    ] = 1e-3,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:N or mps.", show_default="the trial's"),
    ] = None,
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Train a finished trial again from its record, and compare epoch by epoch.

    Marks: = equal bit for bit, ~ within the tolerance, x different; the exit code is 1 if an epoch differs. Nothing is
    stored.
    """
    from hpo.jobs.rerun import Agreement
    from hpo.jobs.rerun import rerun as train_again

    watch = None if as_json else _show
    found = train_again(trial, tolerance=tolerance, device=device, home=home, trust=trust, watch=watch)
    if as_json:
        output.print_json(found)
    else:
        how = f"{found.device}, {found.precision or 'no precision'}, {counted(found.threads, 'thread')}"
        output.print_message(f"{found}  ({how})")
        if not found.same_machine:
            output.print_warning("the trial used another device or precision, or they are unknown")
    if found.agreement is Agreement.DIFFERS:
        raise typer.Exit(1)


def _show(check: EpochCheck) -> None:
    """One line for each epoch, with a heading above the first."""
    if (check.fold, check.number) == (0, 1):
        output.print_text(f"  {'epoch':>8}  {'then':>7}  {'again':>7}  difference")
    place = f"{check.fold + 1}.{check.number}" if check.fold else str(check.number)
    then, again = (output.show_score(value) or "-" for value in (check.objective, check.again))
    difference = f"{check.difference:.2g} {check.score}" if check.difference else "0"
    output.print_text(f"{_MARKS[check.agreement]} {place:>8}  {then:>7}  {again:>7}  {difference}")


def stop(
    study: Study,
    timeout: Annotated[
        float | None, typer.Option(parser=read_duration, metavar="TIME", help="How long to wait.", show_default="60")
    ] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Stop a running study from another terminal, as Ctrl-C does; the next hpo run resumes it.

    All its processes on the shared storage stop. Running trials are recorded as stopped, and the next run retries them.
    """
    from hpo.jobs.stop import stop_study

    def say(count: int) -> None:
        if not as_json:
            output.print_progress(f"{study}: asked {counted(count, 'supervisor')} to stop ...")

    done = stop_study(study_name(study), home=home, timeout=timeout or 60.0, watch=say)
    again = f"hpo run {shlex.quote(study)}{home_flag(home)}"
    if as_json:
        output.print_json({**output.plain(done), "next": again})
        return
    if not done.supervisors:
        output.print_message(f"{done.title}: it is not running.")
        if done.asked:
            output.print_message("Idle workers on other machines stop too; workers that are still starting do not.")
        if done.abandoned:
            trials = counted(len(done.abandoned), "trial")
            output.print_message(f"{trials} of a dead process will be retried by the next run: {again}")
        return
    stopped = counted(len(done.stopped), "trial")
    words = f"{stopped} stopped, will be retried" if done.stopped else "no trial was running"
    output.print_message(f"{done.title}: stopped in {duration(done.seconds)}; {words}.")
    output.print_message(f"Resume with: {again}")


def status(
    study: AStudy = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Show the progress of every study and its running processes; read-only."""
    from hpo.home import Home
    from hpo.storage.reader import read_snapshots

    place = Home.find(home)
    wanted = study_name(study) if study else None
    found = [one for one in read_snapshots(place, results=False) if wanted in (None, one.study.name, one.study.title)]
    if as_json:
        output.print_json([_facts(one) for one in found])
        return
    if not found:
        output.print_message(f"No study has run in {place.root}. Begin with: hpo run digits-mlp")
        return
    columns = ["study", "at work", ">running", ">complete", ">pruned", ">failed", ">of", "objective", ">best", ">trial"]
    output.print_table([_row(one) for one in found], columns)
    for one in found:
        for holder in one.holders:
            where = f"process {holder.pid} on {holder.host}" if holder.pid else f"a process on {holder.host}"
            since = f", for {duration(time.time() - holder.since)}" if holder.since else ""
            numbers = [str(trial.number) for trial in one.running if one.leases[trial.number] == holder.lease]
            trials = f", trial {', '.join(numbers)}" if numbers else ""
            output.print_message(f"{one.study.title}: {where}{since}{trials}")
    for one in found:
        if paused := _counts(one)[TrialState.PAUSED]:
            output.print_message(f"{one.study.title}: {counted(paused, 'trial')} paused, and may continue")
    for one in found:
        if one.abandoned:
            trials = counted(len(one.abandoned), "trial")
            text = f"{trials} of a dead process: hpo run retries them, hpo doctor has details"
            output.print_warning(f"{one.study.title}: {text}")


def _row(one: StudySnapshot) -> list[str]:
    counts = _counts(one)
    workers = {(one.leases[trial.number], trial.worker) for trial in one.running}
    at_work = "-"
    if one.holders:
        runs = f"{len(one.holders)} runs, " if len(one.holders) > 1 else ""
        at_work = f"{runs}{counted(len(workers), 'worker')}"
    return [
        one.study.title,
        at_work,
        str(len(one.running) or ""),
        *(str(counts[state] or "") for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)),
        str(_budget(one) or ""),
        one.study.objective,
        output.show_score(one.best.value if one.best else None),
        str(one.best.number) if one.best else "",
    ]


def _counts(one: StudySnapshot) -> dict[TrialState, int]:
    searched = [trial.state for trial in one.study.counted if trial.candidate.stage not in AFTER_SEARCH]
    return {state: searched.count(state) for state in TrialState}


def _budget(one: StudySnapshot) -> int | None:
    """The budget of the study in trials; None where it is the sum over stages, which only a running study knows."""
    search = one.study.spec.get("search") or {}
    return None if search.get("stages") else search.get("trials")


def _facts(one: StudySnapshot) -> dict[str, Any]:
    return {
        "study": one.study.title,
        "objective": one.study.objective,
        "budget": _budget(one),
        "trials": {state.value: count for state, count in _counts(one).items()},
        "supervisors": [output.plain(holder) for holder in one.holders],
        "workers": len({(one.leases[trial.number], trial.worker) for trial in one.running}),
        "running": [
            {"trial": t.number, "worker": t.worker, "seconds": time.time() - t.started, "lease": one.leases[t.number]}
            for t in one.running
        ],
        "abandoned": one.abandoned,
        "best": {"trial": one.best.number, "value": one.best.value} if one.best else None,
    }
