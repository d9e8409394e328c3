"""`hpo promote`, `hpo models`, `hpo predict`: what comes after a search."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli import output
from hpo.cli.options import AllowPickle, AsJson, Debug, HomeFolder, Study, Trust, study_name


def promote(
    study: Study, home: HomeFolder = None, trust: Trust = False, as_json: AsJson = False, _debug: Debug = False
) -> None:
    """Open the sealed test part for challenger and champion; the better one becomes champion."""
    from hpo.run.promote import promote as decide

    promotion = decide(study_name(study), home=home, trust=trust)
    if as_json:
        output.print_json(promotion)
        return
    new, old = promotion.challenger, promotion.champion
    verdict = f"version {new.version} is now champion" if promotion.promoted else "champion unchanged"
    output.print_text(f"{new.name}: {verdict}: {promotion.reason}")
    rows = [[name, output.show_score(value)] for name, value in promotion.scores.items()]
    columns = ["test part", f">version {new.version}"]
    if old and old.version != new.version:
        columns.append(f">version {old.version}, champion before")
        rows = [[*row, output.show_score(promotion.champion_scores.get(row[0]))] for row in rows]
    output.print_table(rows, columns)
    times = "once" if promotion.openings == 1 else f"{promotion.openings} times"
    output.print_text(f"The test part of {study_name(study)} has been opened {times}.")


def models(
    name: Annotated[str | None, typer.Argument(help="Only the versions of this model.", show_default="all")] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """List registered models: versions, aliases, scores."""
    from hpo.home import Home
    from hpo.track.registry import versions

    found = versions(Home.find(home), name)
    if as_json:
        output.print_json(found)
        return
    if not found:
        output.print_text("No model is registered here yet. Begin with: hpo run digits-mlp")
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


class Format(StrEnum):
    """How predictions are written."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def predict(
    model: Annotated[str, typer.Argument(help="digits-mlp, digits-mlp@champion, digits-mlp/3.", show_default=False)],
    images: Annotated[list[Path], typer.Argument(help="Image files of any size and mode.", show_default=False)],
    form: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,
    target: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write there.", show_default="the terminal")
    ] = None,
    home: HomeFolder = None,
    allow_pickle: AllowPickle = False,
    _debug: Debug = False,
) -> None:
    """Classify image files with a registered model."""
    from hpo.predict import load_model, predict_files

    rows = predict_files(load_model(model, home=home, allow_pickle=allow_pickle), images)
    if form is Format.TABLE and target is None:
        output.print_table(
            [[row["file"], row["class"], output.show_score(row["probability"])] for row in rows],
            ["file", "class", ">probability"],
        )
        return
    # A file of columns is CSV: a table is for eyes.
    text = output.to_json(rows) if form is Format.JSON else output.predictions_csv(rows)
    output.write_text(text, target)
