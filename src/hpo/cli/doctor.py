"""`hpo doctor` and `hpo clean`: find and repair problems, free disk space."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from hpo.cli.display import output
from hpo.cli.options import AsJson, Debug, HomeFolder, study_name

if TYPE_CHECKING:
    from hpo.jobs.clean import Waste
    from hpo.jobs.shared.home_snapshot import Finding


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
        output.print_text(note)
    if found.well:
        output.print_text("All is well." if not found.fixed else "All is well now.")
    elif not fix and any(finding.repair for finding in found.wrong):
        output.print_text("Repair with: hpo doctor --fix")
    raise typer.Exit(not found.well)


def _print(finding: Finding, word: str, style: str, step: str) -> None:
    console = output.make_console()
    console.print(Text.assemble((f"{word}: ", style), finding.what), soft_wrap=True)
    for line in filter(None, (finding.where, finding.why, step)):
        console.print(Text(f"    {line}", "dim"), soft_wrap=True)


def clean(
    study: Annotated[str | None, typer.Argument(help="Only this study's.", show_default="all")] = None,
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
        output.print_text(note)
    if not found.waste:
        output.print_text("Nothing to clean up.")
        return
    output.print_table(_rows(found.waste), ["what", "study", ">count", ">size", "~which"])
    size = output.show_bytes(found.bytes)
    output.print_text(f"{size} freed." if yes else f"{size} would be freed. This was a dry run: delete with --yes.")


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
