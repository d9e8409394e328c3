"""The command `hpo report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Debug, HomeFolder, Study


def report(
    study: Study,
    target: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The HTML file.", show_default="mlruns/reports/STUDY.html"),
    ] = None,
    saliency: Annotated[
        bool, typer.Option("--saliency", help="Add saliency maps of the most confident mistakes; takes seconds.")
    ] = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Write one HTML page of a study: data, protocol, result, figures, mistakes, cost, how to repeat it.

    It can be read without a network. The sealed test part is not opened.
    """
    from hpo.jobs.report import write_report
    from hpo.spec.load import load_study

    name = load_study(study, trust=True).name if study.endswith((".yaml", ".yml")) else study
    path = write_report(name, home=home, out=target, saliency=saliency)
    if as_json:
        output.print_json({"path": str(path)})
    else:
        output.print_text(str(path))
