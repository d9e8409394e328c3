"""`hpo run`: a study from its beginning, or from where it stands, to its best model."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from hpo.cli import cluster
from hpo.cli.options import (
    AsEvents,
    Debug,
    DeviceName,
    Fresh,
    HomeFolder,
    KeepModels,
    PrecisionName,
    Quiet,
    RetryFailed,
    Settings,
    StackSize,
    Study,
    Trials,
    Trust,
    Workers,
    read_duration,
    read_stack,
)
from hpo.cli.ray import Address, CpusPerTrial, Engine, EngineName, GpusPerTrial, read_ray


def run(
    study: Study,
    trials: Trials = None,
    workers: Workers = None,
    stack: StackSize = "auto",
    device: DeviceName = "auto",
    engine: Engine = EngineName.PROCESSES,
    address: Address = None,
    gpus_per_trial: GpusPerTrial = None,
    cpus_per_trial: CpusPerTrial = None,
    settings: Settings = None,
    trust: Trust = False,
    home: HomeFolder = None,
    fresh: Fresh = False,
    retry_failed: RetryFailed = False,
    timeout: Annotated[
        float | None, typer.Option(parser=read_duration, metavar="TIME", help="Stop cleanly after 90, 30m or 1h.")
    ] = None,
    keep_models: KeepModels = None,
    precision: PrecisionName = None,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time went.")] = False,
    slurm: cluster.SlurmSettings = None,
    detach: cluster.Detach = False,
    print_script: cluster.PrintScript = False,
    as_json: AsEvents = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a study, or go on with it; register its best model.

    Ctrl-C ends it cleanly; the same command goes on. A study whose trials are all done asks for more: --trials N.
    """
    from hpo.cli.display.live import watcher
    from hpo.cli.display.run_summary import NextCommands
    from hpo.spec.load import load_study

    spec = load_study(study, overrides=settings or [], trust=trust)
    options = [part for setting in settings or [] for part in ("--set", setting)] + ["--trust"] * trust
    options += ["--precision", precision] if precision else []  # a study goes on as it began
    ray, again_by_ray = read_ray(engine, address=address, gpus_per_trial=gpus_per_trial, cpus_per_trial=cpus_per_trial)
    options += again_by_ray
    options += cluster.engine_options(engine, workers, slurm or [])
    place = f" --home {shlex.quote(str(home))}" if home else ""
    more = shlex.join(["hpo", "run", study, *options]) + place
    again = f"{more} --trials {trials}" if trials else more
    commands = NextCommands(again, more, home=place)
    shown = watcher(as_json=as_json, quiet=quiet)(commands, debug=debug)
    alone = {"--slurm": slurm, "--detach": detach, "--print": print_script}
    if cluster.on_slurm(engine, study, alone=alone, never={"--timeout": timeout, "--profile": profile}):
        code = cluster.run_slurm(
            spec,
            shown,
            workers=workers,
            slurm=slurm or [],
            options=cluster.worker_options(device=device, stack=stack, trust=trust),
            detach=detach,
            printed=print_script,
            as_json=as_json,
            trials=trials,
            home=home,
            fresh=fresh,
            retry_failed=retry_failed,
            keep_models=keep_models,
            precision=precision,
        )
        raise typer.Exit(code)
    with shown as watch:
        # Inside, because its imports take a moment in which the terminal should not look dead.
        from hpo.execute.run_study import run_study

        run_study(
            spec,
            trials=trials,
            workers=workers,
            stack=read_stack(stack),
            device=device,
            home=home,
            fresh=fresh,
            retry_failed=retry_failed,
            timeout=timeout,
            keep_models=keep_models,
            precision=precision,
            profile=profile,
            ray=ray,
            watch=watch,
        )
    raise typer.Exit(watch.exit_code)
