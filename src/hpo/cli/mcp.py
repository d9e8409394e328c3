"""`hpo mcp`: studies for an assistant, over the Model Context Protocol."""

from __future__ import annotations

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
    nothing; with --allow-run it also starts and stops the studies that hpo studies lists.
    """
    from hpo.jobs.mcp_server import make_server

    make_server(home, allow_run=allow_run).run("stdio")
