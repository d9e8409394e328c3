"""`hpo ensemble`: one model of several trials."""

from __future__ import annotations

from typing import Annotated

import typer

from hpo.cli import output
from hpo.cli.completion import complete_study
from hpo.cli.options import AsJson, Debug, HomeFolder, Trust, home_flag, study_name


def ensemble(
    studies: Annotated[
        list[str],
        typer.Argument(
            metavar="STUDY...",
            help="The study that gets the model; others after it, on the same images, give members too.",
            autocompletion=complete_study,
            show_default=False,
        ),
    ],
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--from", metavar="STUDY...", help="Further studies that give members.", autocompletion=complete_study
        ),
    ] = None,
    members: Annotated[
        int | None, typer.Option(metavar="N", min=2, max=64, help="Trials in it, at most.", show_default="8")
    ] = None,
    parameters: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Weights and biases of all members together, at most.", show_default="the study's"
        ),
    ] = None,
    latency_ms: Annotated[
        float | None,
        typer.Option(
            "--latency-ms", metavar="N", help="Milliseconds for one image, at most.", show_default="the study's"
        ),
    ] = None,
    soup: Annotated[
        bool, typer.Option("--soup", help="Average weights, of trials with one architecture: as fast as one network.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate what it gains.")] = False,
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Make one model of several trials of a study that has run: the mean of their probabilities.

    Members are chosen on validation images; the gain is estimated on images that did not choose them, with an interval.
    The model is registered as challenger; promote it as any other. The test part stays sealed, and nothing is trained.
    """
    from hpo.jobs.ensemble import ensemble as make

    first, *more = map(study_name, studies)
    more += map(study_name, others or ())
    made = make(
        first,
        more,
        members=members,
        parameters=parameters,
        latency_ms=latency_ms,
        soup=soup,
        dry_run=dry_run,
        home=home,
        trust=trust,
    )
    if as_json:
        output.print_json(made)
        return
    output.print_table([[name, count] for name, count in made.members.items()], ["member", ">counts"])
    output.print_text("")
    gain = made.gain
    count = f"{max(1, len(made.members))} of {made.candidates} kept models"
    output.print_facts(
        [
            ("gain", f"{gain}, over the best single one"),
            ("on", f"{gain.images:,} validation images, none of which chose what it judges"),
            (gain.label, f"{output.show_score(gain.ensemble)} together, {output.show_score(gain.single)} the best one"),
            ("size", f"{count}, {made.parameters:,} parameters"),
        ]
    )
    if made.unknown:
        output.print_warning(f"Its members may have seen test images: {made.unknown}")
    if made.version is not None:
        version = made.version
        output.print_message(f"{version.name}: version {version.version} is the ensemble, trial {version.trial}.")
        output.print_message(f"Open its sealed test part once: hpo promote {version.name}{home_flag(home)}")
    elif not dry_run:
        output.print_message("No ensemble is better than that one trial on the validation images, so none was made.")
        raise typer.Exit(1)
