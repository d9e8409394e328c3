"""The stores: `hpo store`, `hpo export`, `hpo import`, `hpo doctor` and `hpo clean`."""

from __future__ import annotations

import shlex
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli import output
from hpo.cli.options import AsJson, AStudy, Command, Debug, HomeFolder, Study, outside_stores, study_name
from hpo.report.text import counted

if TYPE_CHECKING:
    from hpo.jobs.clean import Waste
    from hpo.jobs.shared.home_snapshot import Finding

app = typer.Typer(help="Where studies and runs are kept.", no_args_is_help=True)


@app.command(cls=Command, epilog="Example: hpo store status")
def status(home: HomeFolder = None, as_json: AsJson = False, _debug: Debug = False) -> None:
    """Show address, state and content of both stores. The exit code is 1 where a run could not use one."""
    from hpo.jobs.stores import store_status

    states = store_status(home)
    if as_json:
        output.print_json(states)
    else:
        rows = [
            [s.name, s.state, f"{s.milliseconds:.0f} ms" if s.milliseconds else "", output.message(s.address)]
            for s in states
        ]
        output.print_table(rows, ["store", "state", ">answers in", "address"])
        for state in states:
            output.print_message(f"{state.name}: {state.detail}")
            if state.next:
                output.print_message(f"    {state.next}")
    raise typer.Exit(not all(state.well for state in states))


@app.command(cls=Command, epilog="Example: hpo store upgrade")
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
        output.print_message(text)


def export(
    study: Study,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write there.", show_default="STUDY.zip", callback=outside_stores
        ),
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
    output.print_message(
        f"{made.title}: {counted(made.trials, 'trial')}, {counted(made.runs, 'run')}, "
        f"{counted(made.models, 'model')}, {counted(made.versions, 'registered version')} in {made.file}, "
        f"{output.show_bytes(made.bytes)}"
    )
    for note in made.notes:
        output.print_warning(note)
    output.print_message(f"Import it elsewhere: hpo import {shlex.quote(str(made.file))} --home DIR")


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
    new = ", ".join(counted(count, what) for count, what in parts if count) or "nothing"
    further = "; the study here has more trials than the file" if made.relation == "ahead" else ""
    output.print_message(f"{made.title}: {new} new in {made.store}{further}")
    for note in made.notes:
        output.print_warning(note)


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Repair problems; no result is ever deleted.")] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Compare Optuna, MLflow and the disk; report problems and repair them.

    The exit code is 1 where a problem was not repaired. Without --fix it is read-only and safe while a study runs.
    """
    from hpo.jobs.doctor import doctor as examine

    found = examine(home=home, fix=fix)
    if as_json:
        output.print_json({"well": found.well, **output.plain(found)})
        raise typer.Exit(not found.well)
    for finding in found.fixed:
        _print(finding, "repaired", "green", finding.repair)
    for finding in found.wrong:
        step = f"--fix {finding.repair}" if finding.repair else finding.hint
        _print(finding, "wrong", "yellow", step)
    for note in found.notes:
        output.print_message(note)
    if found.well:
        output.print_message("All is well." if not found.fixed else "All is well now.")
    elif not fix and any(finding.repair for finding in found.wrong):
        output.print_message("Repair with: hpo doctor --fix")
    raise typer.Exit(not found.well)


def _print(finding: Finding, word: str, style: str, step: str) -> None:
    from rich.text import Text

    from hpo.cli.console import make_console

    console = make_console()
    console.print(Text.assemble((f"{word}: ", style), output.message(finding.what)), soft_wrap=True)
    for line in filter(None, (finding.where, finding.why, step)):
        console.print(Text(f"    {output.message(line)}", "dim"), soft_wrap=True)


def clean(
    study: AStudy = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete; without it, dry run.")] = False,
    keep_models: Annotated[
        str | None,
        typer.Option(metavar="all|best:K|none", help="Delete models of other trials; registered ones are kept."),
    ] = None,
    keep_figures: Annotated[
        str | None, typer.Option(metavar="all|best:K|none", help="Delete figures of other trials.")
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Also delete prepared data that no study here uses; other homes may use it.")
    ] = False,
    aside: Annotated[bool, typer.Option("--aside", help="Also delete what hpo doctor has set aside.")] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Free disk space: list what can be deleted, with its size; with --yes delete it.

    Without options: work of dead supervisors, and what was deleted in MLflow. Trials and their metrics are always kept.
    """
    from hpo.jobs.clean import clean as tidy

    found = tidy(
        study_name(study) if study else None,
        home=home,
        keep_models=keep_models,
        keep_figures=keep_figures,
        data=data,
        aside=aside,
        really=yes,
    )
    if as_json:
        output.print_json({**output.plain(found), "bytes": found.bytes})
        return
    for note in found.notes:
        output.print_message(note)
    if not found.waste:
        output.print_message("Nothing to clean up.")
        return
    output.print_table(_rows(found.waste), ["what", "study", ">count", ">size", "~which"])
    size = output.show_bytes(found.bytes)
    output.print_message(f"{size} freed." if yes else f"{size} would be freed. This was a dry run: delete with --yes.")


def _rows(waste: tuple[Waste, ...]) -> list[list[str]]:
    """One row for each kind and study."""
    rows = []
    for (kind, study), group in groupby(sorted(waste, key=_kind), key=_kind):
        each = list(group)
        names = ", ".join(one.what for one in each[:4]) + (", ..." if len(each) > 4 else "")
        rows.append([kind, study, str(len(each)), output.show_bytes(sum(one.bytes for one in each)), names])
    return rows


def _kind(waste: Waste) -> tuple[str, str]:
    return waste.kind, waste.study
