"""`hpo compare` and `hpo evaluate`: models measured on the same images."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Debug, HomeFolder, Trust, complete_study

if TYPE_CHECKING:
    from hpo.report.comparison import Comparison


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A B ...",
            help="Studies (their winner), trials (STUDY#22), versions (NAME/1) or aliases (NAME@champion).",
            autocompletion=complete_study,
            show_default=False,
        ),
    ],
    binarise: Annotated[bool, typer.Option("--binarise", help="Sum classes to the groups of another model.")] = False,
    test: Annotated[
        bool, typer.Option("--test", help="Open the sealed test part; the opening is recorded for each model.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Write comparison.md and roc.png there.")
    ] = None,
    home: HomeFolder = None,
    trust: Trust = False,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Compare models on the same images: scores with intervals, McNemar's test, ROC curves."""
    from hpo.jobs.compare import compare as run_comparison
    from hpo.jobs.compare import make_folder, write_comparison

    if out is not None:
        make_folder(out)  # so that the test part is not opened in vain
    comparison = run_comparison(models, test=test, binarise=binarise, home=home, trust=trust)
    written = write_comparison(comparison, out) if out is not None else []
    if as_json:
        # The points of the curves are only for the figure; their areas stay.
        short = tuple(replace(contestant, curve=None) for contestant in comparison.contestants)
        plain = output.plain(replace(comparison, contestants=short))
        for contestant in plain["contestants"]:
            del contestant["curve"]
        output.print_json({**plain, "verdicts": comparison.verdicts, "files": written})
        return
    _print_comparison(comparison)
    for path in written:
        output.print_text(str(path))


def _print_comparison(comparison: Comparison) -> None:
    from hpo.report.comparison import rows_of

    binary = len(comparison.class_names) == 2
    letters = [ascii_uppercase[index] if index < 26 else str(index + 1) for index in range(len(comparison.contestants))]
    named = list(zip(letters, comparison.contestants, strict=True))
    count = f"{comparison.image_count:,} {comparison.part} images, {len(comparison.class_names)} classes"
    if binary:
        count += f", positive: {comparison.class_names[1]}"
    output.print_facts([*((letter, f"{each.name}: {each.model}") for letter, each in named), ("on", count)])
    output.print_text("")
    rows = []
    for letter, each in named:
        for index, (_, *cells) in enumerate(rows_of(each)):
            rows.append(["" if index else letter, *cells])
    columns = ["", "score", ">value", f">{comparison.level:.0%} interval", ">points to A", ">McNemar"]
    output.print_table(rows, columns)
    if binary:
        output.print_text("")
        counts = [[letter, *itertools.chain(*each.confusion)] for letter, each in named]
        output.print_table(counts, ["", ">TN", ">FP", ">FN", ">TP"])
    output.print_text("")
    for line in [*comparison.verdicts, *comparison.notes]:
        output.print_text(line)
    for study, times in comparison.openings.items():
        output.print_text(output.show_openings(study, times))


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
