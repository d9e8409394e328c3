"""`hpo probe`: which frozen backbone suits a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli import output
from hpo.cli.options import AsJson, DataPath, Debug, DeviceName, ImageSide, Trust

if TYPE_CHECKING:
    from hpo.jobs.probe import Probed


def probe(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|STUDY",
            help="bloodmnist, npz, folder, ..., or a study, whose data are taken.",
            show_default=False,
        ),
    ],
    path: DataPath = None,
    size: ImageSide = None,
    backbones: Annotated[
        list[str] | None,
        typer.Option(
            "--backbone",
            metavar="KIND:NAME[=FILE]",
            help="A network of torchvision or timm, and a file of its weights; may be repeated.",
            show_default="all whose weights are in the caches",
        ),
    ] = None,
    sizes: Annotated[
        list[int] | None,
        typer.Option(
            "--input-size",
            metavar="N",
            min=8,
            max=2048,
            help="Side to which images are resized for the networks; may be repeated.",
            show_default="that of the images, and that which each network was trained at",
        ),
    ] = None,
    folds: Annotated[int, typer.Option(metavar="N", min=2, max=20, help="Parts that validate in turn.")] = 5,
    fuse: Annotated[int, typer.Option(metavar="N", min=1, max=8, help="Backbones in the study that is written.")] = 2,
    target: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The study file to write.", show_default="NAME-probe.yaml"),
    ] = None,
    device: DeviceName = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Compare frozen backbones on a data set, and write a study of the best.

    A linear and a small head are trained on the features of each backbone, fold by fold over training and validation
    images; the test part stays sealed. Features are cached: the study that is written, and a second probe, reuse them.
    """
    from hpo.jobs.probe import probe as run_probe

    found = run_probe(
        name,
        path=path,
        size=size,
        backbones=backbones or (),
        sizes=sizes or (),
        folds=folds,
        fuse=fuse,
        device=device,
        out=target,
        trust=trust,
        report=_announce,
    )
    if as_json:
        rows = [
            {
                "name": row.name,
                "head": row.head,
                "mean": row.mean,
                "spread": row.spread,
                "folds": row.folds,
                "minutes": row.minutes,
            }
            for row in found.rows
        ]
        output.print_json({"images": found.images, "rows": rows, "file": found.file})
        return
    rows_shown = [
        [row.name, row.head, f"{row.mean:.4f}", f"{row.spread:.4f}", f"{row.minutes:.1f}"] for row in found.rows
    ]
    output.print_table(rows_shown, ["backbone", "head", ">accuracy", ">spread", ">minutes"])
    output.print_message(
        f"accuracy: mean over {folds} folds of {found.images:,} images, spread: standard deviation over folds"
    )
    output.print_message(f"A study of the best: hpo run {found.file}")


def _announce(row: Probed) -> None:
    output.print_progress(f"{row.name}, {row.head} head: {row.mean:.4f} ({row.minutes:.1f} min)")
