"""`hpo run` and `hpo rerun`: train a study, or one of its trials again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Debug, HomeFolder, Trust

if TYPE_CHECKING:
    from hpo.jobs.rerun import EpochCheck

import shlex
from dataclasses import replace

from hpo.cli.options import (
    Address,
    AsEvents,
    CpusPerTrial,
    DeviceName,
    EngineName,
    Fresh,
    GpusPerTrial,
    KeepModels,
    PrecisionName,
    Quiet,
    RetryFailed,
    Settings,
    SlurmSettings,
    StackSize,
    Study,
    Timeout,
    Trials,
    Workers,
)
from hpo.options import RunOptions


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
    retry_failed: RetryFailed = False,
    timeout: Timeout = None,
    keep_models: KeepModels = None,
    precision: PrecisionName = None,
    profile: Annotated[bool, typer.Option("--profile", help="Report where the time went.")] = False,
    slurm: SlurmSettings = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit the jobs and return.")] = False,
    print_script: Annotated[
        bool, typer.Option("--print", help="Print a script for sbatch, and submit nothing.")
    ] = False,
    as_json: AsEvents = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a study, or resume it; register its best model.

    Ctrl-C ends it cleanly; the same command resumes it. If all trials of a study are done, ask for more: --trials N.
    """
    start(study, RunOptions.pick(locals()), as_json=as_json, quiet=quiet, debug=debug)


def start(study: str, options: RunOptions, *, as_json: bool, quiet: bool, debug: bool) -> None:
    """Run a study with these options, here or on a scheduler's jobs."""
    from hpo.execute.process import start_fork_server

    if options.engine not in ("kubernetes", "slurm"):
        start_fork_server()  # the imports below go on beside it
    from hpo.cli.display.live import watcher
    from hpo.cli.display.run_summary import NextCommands
    from hpo.errors import HpoError
    from hpo.spec.load import load_study

    if options.engine == "kubernetes":
        hint = f"Print it: hpo manifest {shlex.quote(study)} --image IMAGE"
        raise HpoError("--engine kubernetes: is a manifest.", hint)
    spec = load_study(study, overrides=options.settings, trust=options.trust)
    resume = options.to_resume()

    def with_trials(trials: int) -> str:
        return replace(resume, trials=trials).command_line("run", study)

    home = f" --home {shlex.quote(str(options.home))}" if options.home else ""
    commands = NextCommands(resume.command_line("run", study), with_trials, home=home)
    display = watcher(as_json=as_json, quiet=quiet)(commands, debug=debug)
    if options.engine == "slurm":
        from hpo.cli.cluster import run_slurm

        raise typer.Exit(run_slurm(spec, options, display, as_json=as_json))
    with display as watch:
        # Imported inside, because it takes a moment in which the terminal should not look dead.
        from hpo.execute.run_study import run_study

        run_study(spec, options, watch=watch)
    raise typer.Exit(watch.exit_code)


_MARKS = {"equal": "=", "close": "~", "differs": "x"}


def rerun(
    trial: Annotated[str, typer.Argument(metavar="STUDY/TRIAL", help="digits-mlp/3.", show_default=False)],
    tolerance: Annotated[float, typer.Option(min=0.0, help="Differences of a score up to this count as close.")] = 1e-3,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:N or mps.", show_default="the trial's"),
    ] = None,
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Train a finished trial again from its record, and compare epoch by epoch.

    = equal bit for bit, ~ within the tolerance, x beyond it; exit code 1 where they differ. Nothing is stored.
    """
    from hpo.jobs.rerun import Agreement
    from hpo.jobs.rerun import rerun as train_again

    watch = None if as_json else _show
    found = train_again(trial, tolerance=tolerance, device=device, home=home, trust=trust, watch=watch)
    if as_json:
        output.print_json(found)
    else:
        threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
        output.print_text(f"{found}  ({found.device}, {found.precision or 'no precision'}, {threads})")
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
