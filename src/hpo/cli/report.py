"""`hpo report`, `hpo explain` and `hpo data`: pages of a study and its images, and pictures that explain a model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli import output
from hpo.cli.options import (
    AsJson,
    Command,
    DataPath,
    Debug,
    HomeFolder,
    ImageSide,
    Model,
    Study,
    Trust,
    outside_stores,
    study_name,
)

if TYPE_CHECKING:
    from hpo.report.page import DataFacts


def report(
    study: Study,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The HTML file.",
            show_default="mlruns/reports/STUDY.html",
            callback=outside_stores,
        ),
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

    path = write_report(study_name(study), home=home, out=target, saliency=saliency, fanova=fanova)
    if as_json:
        output.print_json({"path": str(path)})
    else:
        output.print_message(str(path))


class Method(StrEnum):
    """A method that measures the importance of a pixel."""

    GRADIENT = "gradient"
    INTEGRATED = "integrated"
    GRADCAM = "gradcam"


def explain(
    model: Model,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE", help="Image files of any size and mode.", show_default=False)
    ] = None,
    mistakes: Annotated[
        bool, typer.Option("--mistakes", help="Explain its most confident mistakes on validation images.")
    ] = False,
    methods: Annotated[
        list[Method] | None,
        typer.Option(
            "--method",
            metavar="gradient|integrated|gradcam",
            help="A method; may be repeated.",
            show_default="all that suit the network",
        ),
    ] = None,
    class_name: Annotated[
        str | None,
        typer.Option("--class", metavar="NAME", help="The class to explain.", show_default="the most probable"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Folder to write the pictures to.",
            show_default="mlruns/reports/explained",
        ),
    ] = None,
    home: HomeFolder = None,
    trust: Trust = False,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Highlight the pixels that support a class: one picture for each image file."""
    from hpo.errors import HpoError
    from hpo.home import Home
    from hpo.jobs.explain import explain as draw
    from hpo.jobs.report import explain_mistakes

    if bool(images) == mistakes:
        raise HpoError("hpo explain needs image files, or --mistakes.", f"For example: hpo explain {model} --mistakes")
    folder = out or Home.find(home).reports / "explained"
    chosen = [str(method) for method in methods or ()]
    if mistakes:
        rows = explain_mistakes(model, folder=folder, methods=chosen, home=home, trust=trust)
    else:
        rows = draw(model, images or [], folder=folder, methods=chosen, class_name=class_name, home=home, trust=trust)
    if as_json:
        output.print_json(rows)
        return
    output.print_table(
        [
            [row.file, row.predicted, output.show_score(row.probability), row.explained, output.message(row.picture)]
            for row in rows
        ],
        ["file", "class", ">probability", "explained", "picture"],
    )
    if rows and (views := rows[0].views) > 1:
        output.print_text(
            f"Probabilities are the mean of {views} views of an image; maps explain the network on the image as it is."
        )


app = typer.Typer(help="Explore a data set.", no_args_is_help=True)


@app.command(cls=Command, epilog="Example: hpo data show digits")
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|STUDY",
            help="bloodmnist, npz, folder, ..., or a study, whose split is shown.",
            show_default=False,
        ),
    ],
    path: DataPath = None,
    size: ImageSide = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The HTML file.",
            show_default="mlruns/reports/data-NAME.html",
            callback=outside_stores,
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(metavar="N", min=0, max=100, help="Training images of each class to show.")
    ] = 8,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the choice of images.")] = 0,
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Write a page on a data set: images, classes, channels, duplicates.

    The test part stays sealed: only its image counts are reported. With --json a page is written only with --out.
    """
    from hpo.home import Home
    from hpo.jobs.data_report import explore, write_page

    facts, pictures = explore(name, path=path, size=size, images=images, seed=seed, trust=trust)
    if page is not None or not as_json:
        stem = Path(name).stem if name.endswith((".yaml", ".yml")) else name.replace(":", "-")
        page = write_page(facts, pictures, page or Home.find(home).reports / f"data-{stem}.html")
    if as_json:
        output.print_json(facts)
        return
    _print(facts)
    output.print_message(str(page))


def _print(facts: DataFacts) -> None:
    from hpo.report.text import groups_row

    data, totals = facts.data, facts.totals
    rows = [
        [name, *(f"{counts[label]:,}" for counts in facts.counts.values())]
        for label, name in enumerate(data.class_names)
    ]
    rows.append(["all", *(f"{total:,}" for total in totals.values())])
    output.print_table(rows, ["class", *(f">{part}" for part in totals)])
    pairs = ", ".join(f"{count:,} in {pair}" for pair, count in facts.shared.items())
    repeated = ", ".join(f"{count:,} in {part}" for part, count in facts.copies.items())
    contradicting = sum(map(len, facts.contradictions))
    output.print_facts(
        [
            ("images", " x ".join(map(str, data.image_shape))),
            *([("files", data.accounting)] if data.accounting else []),
            ("pixels", data.pixel_ranges or "uint8 0 to 255"),
            ("split", facts.split),
            *groups_row(data, declared=facts.groups_declared),
            ("mean", ", ".join(f"{value:.4f}" for value in facts.mean)),
            ("deviation", ", ".join(f"{value:.4f}" for value in facts.std)),
            ("repeated", repeated),
            ("shared", pairs),
            ("near-duplicates", facts.near_duplicates),
            ("same pixels, different labels", f"{contradicting:,}"),
            ("source", f"{data.source}, {'' if data.official else 'not '}the publisher's"),
            ("licence", data.licence or "not stated"),
            ("digest", data.digest),
        ]
    )
    for warning in data.warnings:
        output.print_warning(warning)
