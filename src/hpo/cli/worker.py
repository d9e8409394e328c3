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
    Trust,
    Workers,
    read_duration,
    read_stack,
)


def worker(
    study: Annotated[str, typer.Argument(help="The name of a study that has begun.", show_default=False)],
    workers: Workers = None,
    stack: StackSize = "auto",
    device: DeviceName = "auto",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PLACE=VALUE", help="What differs on this machine: data.path=/scratch/x.npz"),
    ] = None,
    trust: Trust = False,
    home: HomeFolder = None,
    timeout: Annotated[
        float | None, typer.Option(parser=read_duration, metavar="TIME", help="Leave cleanly after 90, 30m or 1h.")
    ] = None,
    as_json: AsEvents = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train trials of a study that runs on a shared storage, until its budget is spent.

    Start as many as you like, on any machine that reaches the storage (HPO_STORAGE, or hpo.toml). Ctrl-C, SIGTERM and
    kills lose nothing: what was training is tried again by another one. The images must be those of the study.
    """
    from hpo.cli.display.live import watcher
    from hpo.cli.display.run_summary import NextCommands

    place = f" --home {shlex.quote(str(home))}" if home else ""
    again, more = (shlex.join(["hpo", verb, study]) + place for verb in ("worker", "run"))
    with watcher(as_json=as_json, quiet=quiet)(NextCommands(again, more, home=place), debug=debug) as watch:
        from hpo.cluster.join import join_study

        join_study(
            study,
            overrides=settings or [],
            trust=trust,
            home=home,
            watch=watch,
            workers=workers,
            stack=read_stack(stack),
            device=device,
            timeout=timeout,
        )
    raise typer.Exit(watch.exit_code)
