"""Compare an ensemble of a study's trials with its best member: score, time and size, on up to five data sets.

For each data set a shipped study runs for the given minutes in a folder of its own, or a study that has run is taken
(--study). `hpo ensemble` then chooses among the trials that keep their model. The difference on validation images is
the estimate that `hpo ensemble` prints: on images that chose neither. With --test both models are also measured on the
sealed test part, each once.

Times are CPU times of the exported programs on one thread, on an idle machine the time that passes: one image, and 64
images at once, medians of rounds in which all programs take turns. `sum` divides the time of the ensemble for 64
images by the sum of its members' times.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

_SIDES = {"kind": "holdout", "share": 0.2, "test_share": 0.2}


class Case(NamedTuple):
    """A shipped study, and what is changed in it."""

    study: str
    overrides: Mapping[str, Any] = {}


CASES: Mapping[str, Case] = {
    "digits": Case("digits-mlp"),
    "fashionmnist": Case("fashionmnist-mlp"),
    "bloodmnist": Case("bloodmnist-cnn"),
    "eurosat": Case("cifar10-cnn", {"data": {"name": "eurosat"}, "split": _SIDES}),
    "cifar10": Case("cifar10-cnn"),
}


class Row(NamedTuple):
    """The results on one data set."""

    study: str
    trials: int  # that keep a model
    members: int
    valid: Any  # Gain
    test: Any  # an Interval, or None
    milliseconds: tuple[float, float]  # an image: ensemble, best member
    share: float  # of the sum of the members' times, 64 images
    megabytes: tuple[float, float]


def measure(name: str, path: str | None, minutes: float, home: Path, *, test: bool) -> Row | None:
    """Run the study of a data set, make its ensemble, and compare it with its best member."""
    from hpo.execute.run_study import run_study
    from hpo.spec.load import load_study

    case = CASES[name]
    overrides = {**case.overrides, **({"data.path": path} if path else {}), "keep.figures": "none"}
    spec = load_study(case.study, overrides=overrides)
    run_study(spec, trials=1000, timeout=60 * minutes, home=home, keep_models="best:20")
    return judge(spec.name, home, test=test)


def judge(title: str, home: Path, *, test: bool) -> Row | None:
    """Make the ensemble of a study that has run, and compare it with its best member."""
    from hpo.errors import HpoError
    from hpo.execute.ensemble import candidates
    from hpo.home import Home
    from hpo.jobs.compare import compare
    from hpo.jobs.ensemble import ensemble
    from hpo.storage.reader import read_study
    from hpo.tracking.registry import fetch, resolve
    from hpo.tracking.tracker import Tracker

    try:
        made = ensemble(title, home=home)
    except HpoError as error:
        print(f"{title}: {error}")
        return None
    if made.version is None:
        print(f"{title}: no ensemble is better than one trial: {made.gain}")
        return None
    place = Home.find(home)
    study = read_study(place, title)
    kept = Tracker(place).kept_models(study)
    folders = [fetch(place, made.version, home)]
    folders += [fetch(place, resolve(place, kept[int(each.partition("#")[2])]), home) for each in made.members]
    best = next(trial for trial in candidates(study) if trial.number in kept)
    folders.append(fetch(place, resolve(place, kept[best.number]), home))
    one, many = times(folders, 1), times(folders, 64, rounds=5)
    sizes = [sum(file.stat().st_size for file in (folder / "artifacts").iterdir()) / 1e6 for folder in folders]
    lead = None
    if test:
        names = [f"{study.name}#{best.number}", f"{study.name}/{made.version.version}"]
        lead = compare(names, test=True, home=home).contestants[1].differences["accuracy"]
    return Row(
        study=title,
        trials=made.candidates,
        members=len(made.members),
        valid=made.gain,
        test=lead,
        milliseconds=(one[0], one[-1]),
        share=many[0] / sum(many[1:-1]),
        megabytes=(sizes[0], sizes[-1]),
    )


def times(folders: list[Path], count: int, *, rounds: int = 30) -> list[float]:
    """Milliseconds of each model's program for this number of images."""
    from hpo.models.safe_loader import Program, read_config

    programs = [Program(folder / "artifacts" / "net.pt2") for folder in folders]
    shape = read_config(folders[0] / "artifacts" / "config.json")["image_shape"]
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)
    found: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds + 2):  # the first two warm up
        for program, own in zip(programs, found, strict=True):
            started = time.process_time()
            program.predict(images)
            own.append(1000 * (time.process_time() - started))
    return [median(own[2:]) for own in found]


def show(rows: list[Row], minutes: float) -> str:
    """The table in Markdown."""
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    head = ["study", "trials", "members", "validation, points", "test, points", "ms an image", "ms, best", "sum"]
    head += ["MB", "MB, best"]
    lines = [f"{machine}, {minutes:g} minutes a study, one thread for times.", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [_points(row.valid.lead), _points(row.test) if row.test else "not opened"]
        cells += [f"{each:.2f}" for each in (*row.milliseconds, row.share)] + [f"{each:.1f}" for each in row.megabytes]
        lines.append(f"| {row.study} | {row.trials} | {row.members} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _points(lead: Any) -> str:
    return f"{100 * lead.value:+.2f} ({100 * lead.low:.2f} to {100 * lead.high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="*", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--study", nargs="*", default=[], metavar="HOME:STUDY", help="Studies that have run.")
    parser.add_argument("--path", action="append", default=[], metavar="NAME=PATH", help="A local copy of a data set.")
    parser.add_argument("--minutes", type=float, default=5.0, help="For the study of each data set.")
    parser.add_argument("--test", action="store_true", help="Open the sealed test part of each, once for each model.")
    parser.add_argument("--home", type=Path, help="Keep the studies there; by default they are deleted.")
    given = parser.parse_args()
    paths = dict(each.split("=", 1) for each in given.path)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for name in given.data:
            home = (given.home or Path(scratch)) / name
            home.mkdir(parents=True, exist_ok=True)
            row = measure(name, paths.get(name), given.minutes, home, test=given.test)
            rows += [row] if row is not None else []
            print(show(rows, given.minutes), flush=True)
        for each in given.study:
            place, _, title = each.rpartition(":")
            row = judge(title, Path(place), test=given.test)
            rows += [row] if row is not None else []
            print(show(rows, given.minutes), flush=True)


if __name__ == "__main__":
    main()
