"""`hpo store`: state and upgrade of the study storage and the tracking store."""

from __future__ import annotations

from typing import Annotated

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Command, Debug, HomeFolder

app = typer.Typer(name="store", help="Where studies and runs are kept.", no_args_is_help=True)


@app.command(cls=Command)
def status(home: HomeFolder = None, as_json: AsJson = False, _debug: Debug = False) -> None:
    """Show address, state and content of both stores. The exit code is 1 where a run could not use one."""
    from hpo.jobs.stores import store_status

    states = store_status(home)
    if as_json:
        output.print_json(states)
    else:
        rows = [[s.name, s.state, f"{s.milliseconds:.0f} ms" if s.milliseconds else "", s.address] for s in states]
        output.print_table(rows, ["store", "state", ">answers in", "address"])
        for state in states:
            output.print_text(f"{state.name}: {state.detail}")
            if state.next:
                output.print_text(f"    {state.next}")
    raise typer.Exit(not all(state.well for state in states))


@app.command(cls=Command)
def upgrade(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Confirm that databases on servers were copied.")] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Upgrade databases that an older Optuna or MLflow wrote. SQLite files are copied first."""
    from hpo.jobs.stores import upgrade_stores

    done = upgrade_stores(home, backed_up=yes)
    if as_json:
        output.print_json({"upgraded": done})
        return
    for text in done or ["Both stores are up to date."]:
        output.print_text(text)
