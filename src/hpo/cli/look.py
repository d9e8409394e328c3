"""What is there: studies, their trials, their settings, and MLflow's pages; and whether a study would run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli import output
from hpo.cli.completion import complete_study
from hpo.cli.options import (
    AsJson,
    Debug,
    DeviceName,
    HomeFolder,
    Settings,
    Study,
    Trials,
    Trust,
    outside_stores,
    study_name,
)
from hpo.cli.windows import open_browser
from hpo.report.text import declares_groups, duration, groups_row, parameter_names, ranges_of

if TYPE_CHECKING:
    from hpo.home import Home
    from hpo.records import StudyResult, Trial


def preview(
    study: Study,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The PNG to write.",
            show_default="mlruns/reports/STUDY-augmented.png",
            callback=outside_stores,
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(metavar="N", min=1, max=100, help="Number of training images, of alternating classes.")
    ] = 8,
    copies: Annotated[int, typer.Option(metavar="N", min=1, max=50, help="Augmented copies of each image.")] = 7,
    settings: Settings = None,
    trust: Trust = False,
    home: HomeFolder = None,
    _debug: Debug = False,
) -> None:
    """Draw training images as the study's augmentation changes them: one row for each image."""
    from hpo.home import Home
    from hpo.jobs.check import preview_study
    from hpo.spec.load import load_study

    spec = load_study(study, overrides=settings or [], trust=trust)
    target = target or Home.find(home).reports / f"{spec.name}-augmented.png"
    output.print_message(str(preview_study(spec, target, images=images, copies=copies)))


def check(
    study: Study,
    trials: Trials = None,
    device: DeviceName = "auto",
    settings: Settings = None,
    trust: Trust = False,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Validate a study, train one batch, and estimate time and disk space."""
    from hpo.spec.load import load_study

    spec = load_study(study, overrides=settings or [], trust=trust)
    from hpo.jobs.check import check_study

    report = check_study(spec, trials=trials, device=device)
    if as_json:
        output.print_json(report)
        return
    data, split = report.data, report.split
    origin = "the publisher's file" if data.official else "not the publisher's file"
    size = " x ".join(map(str, data.image_shape))
    features = duration(report.features_seconds)
    time, disk = duration(report.estimated_seconds), output.show_bytes(report.estimated_bytes)
    output.print_facts(
        [
            ("data", f"{data.name}, {origin}, {data.digest}"),
            *([("files", data.accounting)] if data.accounting else []),
            ("images", f"{size}, {data.pixel_ranges or 'uint8 0 to 255'}"),
            ("classes", f"{len(data.class_names)}: {', '.join(data.class_names)}"),
            *groups_row(data, declared=declares_groups(spec.data, spec.split)),
            *((part, f"{count:,} images{_range(split.shares.get(part))}") for part, count in split.counts.items()),
            ("near-duplicates", report.near_duplicates),
            ("network", f"{report.parameter_count:,} parameters, {output.show_bytes(report.model_bytes)} as a model"),
            ("device", f"{report.device}, {report.precision}, {report.workers} workers"),
            *([("features", f"{features}, once")] if report.features_seconds else []),
            ("batch", duration(report.batch_seconds)),
            ("epoch", duration(report.epoch_seconds)),
            ("export", duration(report.export_seconds)),
            (f"{report.trials} trials", f"about {time} and {disk}"),
        ]
    )
    for warning in report.warnings:
        output.print_warning(warning)
    output.print_message(f"{spec.name} is ready: hpo run {shlex.quote(study)}")


def _range(shares: tuple[float, ...] | None) -> str:
    return f", {min(shares):.1%} to {max(shares):.1%} of them in a class" if shares else ""


class Order(StrEnum):
    """The order in which trials are listed."""

    VALUE = "value"
    NUMBER = "number"


def trials(
    study: Study,
    sort: Annotated[Order, typer.Option(metavar="number|value", help="The order of the list.")] = Order.NUMBER,
    top: Annotated[int | None, typer.Option(metavar="N", min=1, help="Only the best N.", show_default="all")] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """List the trials of a study."""
    from hpo.home import Home
    from hpo.storage.reader import list_trials

    result = list_trials(Home.find(home), study_name(study))
    shown = list(result.trials)
    if top is not None:
        shown = list(result.ranked()[:top])
    elif sort is Order.VALUE:
        ranked = result.ranked()
        rank = {trial.number: index for index, trial in enumerate(ranked)}
        shown.sort(key=lambda trial: (rank.get(trial.number, len(ranked)), trial.number))
    if as_json:
        output.print_json(replace(result, trials=tuple(shown)))
        return
    names = parameter_names({path for trial in shown for path in trial.candidate.parameters}, ranges_of(result))
    columns = [">trial", "state", f">{result.objective}", ">epoch", ">time", "~parameters"]
    output.print_table([_trial_row(trial, names) for trial in shown], columns)


def _trial_row(trial: Trial, names: dict[str, str]) -> list[str]:
    epoch = str(trial.result.best_epoch or "") if trial.result else ""
    words = output.show_parameters(trial.candidate.parameters, names)
    if trial.result and trial.result.reason:
        words = f"{trial.result.reason} ({words})"
    time = duration(trial.run_seconds) if trial.state.finished else ""
    return [str(trial.number), trial.state.value, output.show_score(trial.value), epoch, time, words]


def studies(as_json: AsJson = False, _debug: Debug = False) -> None:
    """List the available studies, by data set."""
    from hpo.errors import SpecError
    from hpo.spec.files import study_files
    from hpo.spec.load import load_study

    rows, broken = [], []
    for name, path in study_files().items():
        try:
            spec = load_study(path)
        except SpecError as error:
            broken.append(str(error))
            continue
        rows.append(
            {
                "name": name,
                "data": spec.data.name,
                "model": spec.model.kind,
                "trials": spec.search.trials,
                "question": spec.question,
                "file": str(path),
            }
        )
    rows.sort(key=lambda row: (str(row["data"]), str(row["name"])))
    if as_json:
        output.print_json(rows)
    else:
        cells = [[row[key] for key in ("data", "name", "model", "trials", "question")] for row in rows]
        for above, row in reversed(list(pairwise(cells))):
            # A data set is named once, above its studies.
            row[0] = "" if row[0] == above[0] else row[0]
        output.print_table(cells, ["data", "study", "model", ">trials", "~question"])
    for warning in broken:
        output.print_warning(warning)


def show(study: Study, settings: Settings = None, as_json: AsJson = False, _debug: Debug = False) -> None:
    """Print a study with all its defaults, and the size of its search space."""
    from hpo.spec.load import dump_study, load_study

    spec = load_study(study, overrides=settings or [], trust=True)
    size = spec.search.space.size(spec.fixed())
    if as_json:
        output.print_json({"spec": spec.model_dump(mode="json"), "parameters": len(spec.search.space), "size": size})
        return
    points = f"{size:,} combinations" if size is not None else "continuous (unlimited combinations)"
    output.print_text(f"# search space: {len(spec.search.space)} parameters, {points}")
    output.print_text(dump_study(spec).rstrip())


def schema(_debug: Debug = False) -> None:
    """Print the JSON Schema of a study file, for editors."""
    from hpo.spec.schema import study_schema

    output.print_json(study_schema())


def ui(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY", help="Study to open.", autocompletion=complete_study, show_default="the newest"
        ),
    ] = "",
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Port.")] = 5000,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="127.0.0.1 is this machine only.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page in a browser, where there is a desktop.")] = True,
    home: HomeFolder = None,
    _debug: Debug = False,
) -> None:
    """Open the MLflow UI on a study's trials, best first."""
    from hpo.home import Home
    from hpo.storage.reader import list_trials
    from hpo.tracking.ui import is_local, open_ui, page_address, runs_address

    place = Home.find(home)
    if not is_local(host):
        output.print_warning(
            f"anyone who can reach {host}:{port} can read and change everything: MLflow has no password."
        )
    known = list_trials(place, study_name(study)) if study else _newest_study(place)
    address = page_address(host, port, runs_address(place, known) if known else "")

    def ready() -> None:
        output.print_progress(f"MLflow is ready: {address}")
        if browser:
            open_browser(address)

    shown = f", on the trials of {known.title}" if known else ""
    output.print_progress(f"MLflow starts in half a minute{shown}; Ctrl-C ends it.")
    output.print_text(address)
    raise typer.Exit(open_ui(place, host=host, port=port, ready=ready))


def _newest_study(home: Home) -> StudyResult | None:
    """The newest study; None where none has run here, or the study storage cannot be read."""
    from hpo.errors import StoreError
    from hpo.storage.reader import read_snapshots

    try:
        return next((each.study for each in reversed(read_snapshots(home, results=False))), None)
    except StoreError:
        return None  # the pages are of use without the study storage
