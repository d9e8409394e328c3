"""The command `hpo evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Debug, HomeFolder, Trust, complete_study


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Studies (their winner), trials (STUDY#22), versions (NAME/1) or aliases (NAME@champion).",
            autocompletion=complete_study,
            show_default=False,
        ),
    ],
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Measure models on the sealed test part, each once; earlier measurements are reused.

    Every opening of the test part is recorded and counted. Choose models on validation images: a test part that models
    are chosen by no longer measures them.
    """
    from hpo.jobs.evaluate import evaluate as measure

    found = measure(models, home=home, trust=trust)
    if as_json:
        output.print_json(found)
        return
    names = list(dict.fromkeys(score for each in found for score in each.scores))
    rows = [
        [
            each.asked,
            each.model,
            *(output.show_score(each.scores.get(name)) for name in names),
            _source(each.when, each.opened),
        ]
        for each in found
    ]
    shown = [f">{name.removeprefix('test_').replace('_', ' ')}" for name in names]
    output.print_table(rows, ["name", "model", *shown, "measured"])
    for study, count in {each.study: each.openings for each in found}.items():
        now = sum(each.opened for each in found if each.study == study)
        output.print_text(output.show_openings(study, count, now=now))
    for sentence in dict.fromkeys(sentence for each in found for sentence in each.history):
        output.print_text(sentence)


def _source(when: str, opened: bool) -> str:
    return "now" if opened else when[:10] or "before"
