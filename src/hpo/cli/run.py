"""`hpo run`: start or resume a study, and register its best model."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Annotated

import typer

from hpo.cli.options import (
    Address,
    AsEvents,
    CpusPerTrial,
    Debug,
    DeviceName,
    EngineName,
    Fresh,
    GpusPerTrial,
    HomeFolder,
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
    Trust,
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
