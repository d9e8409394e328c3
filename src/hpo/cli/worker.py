"""`hpo worker`: one more machine for a study."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from hpo.cli.options import (
    AsEvents,
    Debug,
    DeviceName,
    HomeFolder,
    Quiet,
    StackSize,
    Timeout,
    Trust,
    Workers,
)
from hpo.options import RunOptions


def worker(
    study: Annotated[str, typer.Argument(help="The name of a study that has begun.", show_default=False)],
    workers: Workers = None,
    stack: StackSize = None,
    device: DeviceName = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PLACE=VALUE", help="An entry that differs on this machine: data.path=/scratch/x.npz"
        ),
    ] = None,
    trust: Trust = False,
    home: HomeFolder = None,
    timeout: Timeout = None,
    as_json: AsEvents = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train trials of a study that runs on a shared storage, until its budget is spent.

    Start any number of workers, on any machine that reaches the storage (HPO_STORAGE, or hpo.toml). Ctrl-C, SIGTERM and
    kills lose nothing: another worker tries the interrupted trials again. The images must be those of the study.
    """
    options = RunOptions.pick(locals())
    from hpo.cli.display.live import watcher
    from hpo.cli.display.run_summary import NextCommands

    def with_trials(trials: int) -> str:
        return RunOptions(home=home, trials=trials).command_line("run", study)

    home_flag = f" --home {shlex.quote(str(home))}" if home else ""
    commands = NextCommands(options.to_resume().command_line("worker", study), with_trials, home=home_flag)
    with watcher(as_json=as_json, quiet=quiet)(commands, debug=debug) as watch:
        from hpo.cluster.shared_study import join_study

        join_study(study, options, watch=watch)
    raise typer.Exit(watch.exit_code)
