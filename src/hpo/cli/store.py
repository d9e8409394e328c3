"""`hpo store`, `hpo export` and `hpo import`: the stores, and studies moved between them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Command, Debug, HomeFolder, Study, study_name

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


def export(
    study: Study,
    target: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write there.", show_default="STUDY.zip")
    ] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Write a study to one file: trials, runs, files, models and registered versions.

    STUDY may be a generation, such as digits-mlp~2. hpo import reads the file; the stores are not changed.
    """
    from hpo.jobs.transfer import export_study

    made = export_study(study_name(study), home=home, file=target)
    if as_json:
        output.print_json(made)
        return
    output.print_text(
        f"{made.title}: {_counted(made.trials, 'trial')}, {_counted(made.runs, 'run')}, "
        f"{_counted(made.models, 'model')}, {_counted(made.versions, 'registered version')} in {made.file}, "
        f"{output.show_bytes(made.bytes)}"
    )
    for note in made.notes:
        output.print_warning(note)
    output.print_text(f"Import it elsewhere: hpo import {shlex.quote(str(made.file))} --home DIR")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of hpo export.", show_default=False)],
    move_aliases: Annotated[
        bool, typer.Option("--move-aliases", help="Move aliases such as champion to its versions, past the gates.")
    ] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Import an exported study into this project's stores; safe to repeat."""
    from hpo.jobs.transfer import import_study

    made = import_study(file, home=home, move_aliases=move_aliases)
    if as_json:
        output.print_json(made)
        return
    parts = [(made.trials, "trial"), (made.runs, "run"), (made.models, "model"), (made.versions, "registered version")]
    new = ", ".join(_counted(count, what) for count, what in parts if count) or "nothing"
    further = "; the study here has more trials than the file" if made.standing == "ahead" else ""
    output.print_text(f"{made.title}: {new} new in {made.store}{further}")
    for note in made.notes:
        output.print_warning(note)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
