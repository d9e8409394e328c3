"""Use the models of a study: `hpo promote`, `hpo models`, `hpo predict`, `hpo compare` and `hpo evaluate`."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli import output
from hpo.cli.completion import complete_model, complete_models
from hpo.cli.options import (
    AllowPickle,
    AsJson,
    Debug,
    HomeFolder,
    Model,
    Study,
    Trust,
    home_flag,
    outside_stores,
    study_name,
)
from hpo.errors import DataError

if TYPE_CHECKING:
    from hpo.report.comparison import Comparison

_MOST_ERRORS = 10  # files that cannot be read, in one message


def promote(
    study: Study,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="STORE",
            help="Copy the champion (or NAME/3) to another project's folder or MLflow URI and make it champion there.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Promote even if a gate refuses; that is recorded.")] = False,
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Check the challenger by the gates, measure it on the sealed test part, and make it champion.

    If a gate refuses the challenger, the test part is not opened, and the exit code is 1.
    """
    if to is not None:
        _copy(study_name(study), to, force=force, home=home, as_json=as_json)
        return
    from hpo.jobs.promote import promote as decide

    promotion = decide(study_name(study), home=home, force=force, trust=trust)
    if as_json:
        output.print_json(promotion)
        raise typer.Exit(1 if promotion.refused else 0)
    new, old = promotion.challenger, promotion.champion
    if promotion.gates:
        rows = [
            [gate.name, "passed" if gate.passed else "refused", gate.measured, gate.limit] for gate in promotion.gates
        ]
        output.print_table(rows, ["gate", "verdict", "~measured", "~wanted"])
        output.print_text("")
    verdict = f"version {new.version} is now champion" if promotion.promoted else "champion unchanged"
    output.print_message(f"{new.name}: {verdict}: {promotion.reason}")
    rows = [[name, output.show_score(value)] for name, value in promotion.scores.items()]
    columns = ["test part", f">version {new.version}"]
    if old and old.version != new.version:
        columns.append(f">version {old.version}, champion before")
        rows = [[*row, output.show_score(promotion.champion_scores.get(row[0]))] for row in rows]
    if rows:
        output.print_table(rows, columns)
    output.print_message(output.show_openings(new.study or study_name(study), promotion.openings))
    for sentence in promotion.history:
        output.print_message(sentence)
    if promotion.promoted:
        output.print_message(
            f"Serve it, with a page to drop an image on: hpo serve {shlex.quote(new.name)}{home_flag(home)}"
        )
    if promotion.refused:
        output.print_message(f"Promote it anyway, which is recorded: hpo promote {shlex.quote(study)} --force")
        raise typer.Exit(1)


def _copy(model: str, to: str, *, force: bool, home: Path | None, as_json: bool) -> None:
    from hpo.jobs.promote import copy_champion

    copied = copy_champion(model, to=to, home=home, force=force)
    if as_json:
        output.print_json(copied)
    elif copied.copy is None:
        output.print_message(f"{copied.source.name}: not copied to {copied.store}: {copied.refusal}")
        output.print_message("Replace the champion there anyway, which is recorded: --force")
    else:
        source, copy = copied.source, copied.copy
        output.print_message(
            f"{source.name}: version {source.version} is version {copy.version} in {copied.store}, champion there"
        )
    raise typer.Exit(0 if copied.copy is not None else 1)


def models(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Only the versions of this model, and its champions.",
            autocompletion=complete_model,
            show_default="all",
        ),
    ] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """List registered models with versions, aliases and scores; for one model, also its champions and their reasons."""
    from hpo.home import Home
    from hpo.tracking.champions import champions
    from hpo.tracking.registry import versions

    place = Home.find(home)
    found = versions(place, name)
    terms = champions(place, name) if name and found else []
    if as_json:
        plain = [
            {**output.plain(model), "champion": [term for term in terms if term.version == model.version]}
            if name
            else model
            for model in found
        ]
        output.print_json(plain)
        return
    if not found:
        output.print_message("No model is registered here yet. Begin with: hpo run digits-mlp")
        return
    rows = [
        [
            f"{model.name}",
            model.version,
            ", ".join(model.aliases),
            model.trial,
            output.show_score(model.scores.get("valid_accuracy")),
            output.show_score(model.scores.get("test_accuracy")),
            f"{datetime.fromtimestamp(model.created):%Y-%m-%d}" if model.created else "",
        ]
        for model in found
    ]
    output.print_table(rows, ["model", ">version", "~aliases", ">trial", ">valid acc.", ">test acc.", "created"])
    if terms:
        output.print_text("")
        times = [[_day(term.since), _day(term.until) if term.until else "now"] for term in terms]
        rows = [[each.version, *time, each.who, each.why] for each, time in zip(terms, times, strict=True)]
        output.print_table(rows[::-1], [">champion", "from", "to", "by", "~why"])


def _day(when: str) -> str:
    return f"{datetime.fromisoformat(when).astimezone():%Y-%m-%d %H:%M}"


class Format(StrEnum):
    """How predictions are written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def predict(
    model: Model,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Image files of any size and mode.", show_default=False)
    ],
    refuse_below: Annotated[
        float | None,
        typer.Option(
            "--refuse-below",
            metavar="P",
            min=0.0,
            max=1.0,
            help="Answer `refused` where the highest probability is below P, such as 0.8.",
            show_default="answer always",
        ),
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", metavar="table|csv|json", help="Format of the output.")
    ] = Format.TABLE,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The file to write.",
            show_default="the terminal",
            callback=outside_stores,
        ),
    ] = None,
    home: HomeFolder = None,
    allow_pickle: AllowPickle = False,
    _debug: Debug = False,
) -> None:
    """Classify image files with a registered model."""
    from hpo.predict import load_model, predict_files

    loaded = load_model(model, home=home, allow_pickle=allow_pickle)
    rows = predict_files(loaded, images, refuse_below=refuse_below)
    errors = [row["error"] for row in rows if "error" in row]
    if errors and len(errors) == len(rows):
        more = f" And {len(errors) - _MOST_ERRORS} more." if len(errors) > _MOST_ERRORS else ""
        raise DataError(" ".join(errors[:_MOST_ERRORS]) + more, "Check the files, or leave them out.")
    if form is Format.TABLE and target is None:
        output.print_table(
            [[row["file"], row["class"] or row["error"], output.show_score(row["probability"])] for row in rows],
            ["file", "class", ">probability"],
        )
    else:
        # A file of columns is CSV: a table is for eyes.
        text = output.to_json(rows) if form is Format.JSON else output.predictions_csv(rows)
        output.write_text(text, target)
    if refuse_below is not None:
        refused, answered = sum(row.get("refused", False) for row in rows), len(rows) - len(errors)
        output.print_progress(
            f"{refused} of {answered} images refused: their highest probability is below {refuse_below:g}"
        )
    if errors:
        output.print_warning(f"{len(errors)} of {len(rows)} files could not be read: {' '.join(errors[:_MOST_ERRORS])}")
        raise typer.Exit(1)


Models = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="Studies (their winner), trials (STUDY#22), versions (NAME/1) or aliases (NAME@champion).",
        autocompletion=complete_models,
        show_default=False,
    ),
]


def compare(
    models: Models,
    binarise: Annotated[bool, typer.Option("--binarise", help="Map classes to the groups of another model.")] = False,
    test: Annotated[
        bool, typer.Option("--test", help="Open the sealed test part; the opening is recorded for each model.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder to write comparison.md and roc.png to.")
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
        output.print_message(str(path))


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
        output.print_message(line)
    for study, times in comparison.openings.items():
        output.print_message(output.show_openings(study, times))


def evaluate(
    models: Models,
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Measure models on the sealed test part, each once; earlier measurements are reused.

    Every opening of the test part is recorded and counted. Choose models on validation images: test scores that were
    used to choose a model are too high.
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
        output.print_message(output.show_openings(study, count, now=now))
    for sentence in dict.fromkeys(sentence for each in found for sentence in each.history):
        output.print_message(sentence)


def _source(when: str, opened: bool) -> str:
    return "now" if opened else when[:10] or "before"
