"""`hpo export` and `hpo import`: move a study between projects."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Debug, HomeFolder, Study, study_name


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
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Import an exported study into this project's stores; safe to repeat."""
    from hpo.jobs.transfer import import_study

    made = import_study(file, home=home)
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
