"""`hpo report` and `hpo explain`: the page of a study, and pictures that explain a model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Debug, HomeFolder, Study, Trust


def report(
    study: Study,
    target: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The HTML file.", show_default="mlruns/reports/STUDY.html"),
    ] = None,
    saliency: Annotated[
        bool, typer.Option("--saliency", help="Add saliency maps of the most confident mistakes; takes seconds.")
    ] = False,
    fanova: Annotated[
        bool, typer.Option("--fanova", help="Add a second measure of importance, fANOVA; takes seconds.")
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
    path = write_report(name, home=home, out=target, saliency=saliency, fanova=fanova)
    if as_json:
        output.print_json({"path": str(path)})
    else:
        output.print_text(str(path))


class Method(StrEnum):
    """A method that measures the importance of a pixel."""

    GRADIENT = "gradient"
    INTEGRATED = "integrated"
    GRADCAM = "gradcam"


def explain(
    model: Annotated[str, typer.Argument(help="digits-mlp, digits-mlp@champion, digits-mlp/3.", show_default=False)],
    images: Annotated[
        list[Path] | None, typer.Argument(help="Image files of any size and mode.", show_default=False)
    ] = None,
    mistakes: Annotated[
        bool, typer.Option("--mistakes", help="Explain its most confident mistakes on validation images.")
    ] = False,
    methods: Annotated[
        list[Method] | None,
        typer.Option("--method", help="A method; may be repeated.", show_default="all that suit the network"),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option("--class", metavar="NAME", help="The class to explain.", show_default="the most probable"),
    ] = None,
    folder: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="The folder of the pictures.")] = Path(
        "explained"
    ),
    home: HomeFolder = None,
    trust: Trust = False,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Highlight the pixels that support a class: one picture for each image file."""
    from hpo.errors import HpoError
    from hpo.jobs.explain import explain as draw
    from hpo.jobs.report import explain_mistakes

    if bool(images) == mistakes:
        raise HpoError("hpo explain needs image files, or --mistakes.", f"For example: hpo explain {model} --mistakes")
    chosen = [str(method) for method in methods or ()]
    if mistakes:
        rows = explain_mistakes(model, folder=folder, methods=chosen, home=home, trust=trust)
    else:
        rows = draw(model, images or [], folder=folder, methods=chosen, class_name=class_name, home=home, trust=trust)
    if as_json:
        output.print_json(rows)
        return
    output.print_table(
        [[row.file, row.predicted, output.show_score(row.probability), row.explained, row.picture] for row in rows],
        ["file", "class", ">probability", "explained", "picture"],
    )
