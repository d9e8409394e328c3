"""`hpo mcp`: studies for an assistant, over the Model Context Protocol."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from hpo.cli.options import Debug, HomeFolder


def mcp(
    allow_run: Annotated[
        bool, typer.Option("--allow-run", help="Let the assistant start and stop studies; without it, it only reads.")
    ] = False,
    home: HomeFolder = None,
    _debug: Debug = False,
) -> None:
    """Let an assistant read studies, trials, models and figures, over the Model Context Protocol.

    An assistant's program starts this command and speaks with it on standard input and output. It reads and changes
    nothing; with --allow-run it also starts and stops the studies that hpo studies lists. With --home it works in that
    folder, as if it were started there.
    """
    if home is not None:
        home = home.expanduser().absolute()
        if home.is_dir():  # its studies are those of the working directory, and an assistant's program starts anywhere
            os.chdir(home)
    from hpo.jobs.mcp_server import make_server

    make_server(home, allow_run=allow_run).run("stdio")
