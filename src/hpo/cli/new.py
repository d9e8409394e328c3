"""`hpo new`: a study for images of the user's own; `hpo run FOLDER` writes and runs one."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli import output
from hpo.cli.options import (
    AsJson,
    DataSettings,
    Debug,
    DeviceName,
    Minutes,
    PresetName,
    Weights,
    Workers,
    outside_stores,
)
from hpo.options import RunOptions
from hpo.report.text import duration

if TYPE_CHECKING:
    from hpo.jobs.new_study import NewStudy

_LONGER = 1.25  # than the budget: from then on the run is ended
_CLOSING = 0.45  # of the budget, for the final training: a search that is slower than planned ends before
_LAST_TRIAL = 0.2  # of the budget, beside a final training whose time is known


def new(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|FILE", help="A folder of images, an npz, or a table such as labels.csv.", show_default=False
        ),
    ],
    preset: PresetName = "good",
    minutes: Minutes = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The study file to write.",
            show_default="studies/NAME.yaml",
            callback=outside_stores,
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=1024, help="Side of the images.", show_default="by the files")
    ] = None,
    settings: DataSettings = None,
    weights: Weights = None,
    workers: Workers = None,
    device: DeviceName = "auto",
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Look at your own images and write a study that fits into so many minutes on this machine.

    Classes, sizes, balance, groups and duplicates decide data, split and objective; measured speed decides network,
    epochs and trials. The file says why; change what you know better.
    """
    from hpo.jobs.new_study import new_study

    made = new_study(
        source,
        file=target,
        preset=preset,
        minutes=minutes,
        size=size,
        settings=settings or (),
        weights=weights or (),
        device=device,
        workers=workers,
    )
    if as_json:
        output.print_json(made)
        return
    _print(made)
    study = made.name if made.file.parent == Path("studies") else str(made.file)
    output.print_message(
        f"{made.file} is written. Run it, about {duration(made.seconds)}: hpo run {shlex.quote(study)}"
    )


def _print(made: NewStudy) -> None:
    data = made.data
    shape = " x ".join(map(str, data.image_shape))
    output.print_facts(
        [
            ("data", f"{data.development_count + data.test_count:,} images of {shape}, {data.source}"),
            *([("files", data.accounting)] if data.accounting else []),
            ("classes", f"{len(data.class_names)}: {', '.join(data.class_names)}"),
            *((each.subject, f"{each.choice}: {each.reason}") for each in made.decisions),
        ]
    )
    for warning in made.warnings:
        output.print_warning(warning)


def study_for(
    source: Path, options: RunOptions, *, preset: str, weights: list[str] | None, tell: bool
) -> tuple[str, RunOptions, float]:
    """The study of images of the user's own, written unless it is there, and what runs it in its budget.

    That is the options, and the seconds of their timeout that are left to final trainings. Raises HpoError where a file
    of that name is about other images.
    """
    from hpo.errors import HpoError
    from hpo.home import Home
    from hpo.jobs.new_study import default_file, new_study, same_source
    from hpo.jobs.shared.new_source import data_settings, refuse_among_images
    from hpo.jobs.shared.presets import budget_of

    began, file, final = time.monotonic(), default_file(source), 0.0
    minutes = budget_of(preset, options.minutes)[1]
    refuse_among_images(source, file=file, home=Home.find(options.home).root, command="run")
    written = not file.exists()
    if written:
        made = new_study(
            source,
            preset=preset,
            minutes=minutes,
            settings=data_settings(options.settings),
            weights=weights or (),
            device=options.device,
            workers=options.workers or None,
        )
        final = made.closing
        if tell:
            _print(made)
    elif not same_source(file, source):
        raise HpoError(
            f"{file}: is a study of other images.", f"Name one: hpo new {shlex.quote(str(source))} --out FILE"
        )
    elif tell:
        output.print_message(f"{file} is there already; delete it to have it written again.")
    # A study that is resumed was planned for minutes that the printed command does not repeat: nothing ends it early.
    # SLURM ends its jobs itself.
    limited = (written or options.minutes is not None) and options.engine != "slurm"
    most = max(60 * minutes * _LONGER - (time.monotonic() - began), 10.0) if limited else None
    closing = max(60 * minutes * _CLOSING, 60 * minutes * _LAST_TRIAL + final)
    closing = closing if limited and options.timeout is None else 0.0
    return file.stem, replace(options, minutes=None, timeout=options.timeout or most), closing
