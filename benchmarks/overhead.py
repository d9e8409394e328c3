"""What a trial costs beside its training, and what comes before the first epoch, in a study of short trainings.

The study is a perceptron of 8 neurons on the digits, one epoch a trial, random search, run by `hpo run` as users do.

overhead: milliseconds of a worker for each trial, less the trial's own `seconds`, which a worker measures from the task
in its hands to its result. It is workers * (time from the end of the first trials to the end of the last) / (trials
that ended in between) - (mean `seconds` of those). So it holds all that a worker waits for: that its result is told and
recorded, the next candidate asked, and both sent. The first trials, twice as many as there are workers and 10 at
least, are left out: they wait for imports. tail: milliseconds a trial from the end of the last one to the end of the
study, in which tracking, exports and pictures are brought to their end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from against_peer import lines_of, machine

HIDDEN = 8


def study(*, trials: int, pruner: str, sampler: str) -> dict[str, Any]:
    """The study file."""
    return {
        "data": {"name": "digits"},
        "split": {"kind": "holdout"},
        "model": {"kind": "mlp", "hidden": HIDDEN},
        "training": {"epochs": 1, "batch_size": 64},
        "search": {
            "sampler": sampler,
            "pruner": pruner,
            "trials": trials,
            "space": {
                "training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True},
                "model.dropout": {"float": [0.0, 0.5]},
            },
        },
    }


def run(
    folder: Path, spec: dict[str, Any], *, workers: int, keep: str, engine: str
) -> list[tuple[float, dict[str, Any]]]:
    """The events of a run, each with the seconds from the start of the command."""
    file = folder / "overhead.yaml"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    command = [sys.executable, "-m", "hpo", "run", str(file), "--home", str(folder), "--json", "--engine", engine]
    return lines_of([*command, "--workers", str(workers), "--stack", "1", "--keep-models", keep], folder)[0]


def summary(events: Sequence[tuple[float, dict[str, Any]]], *, workers: int) -> dict[str, float]:
    """opened, started and epoch: seconds to the first of each; training, overhead and tail: milliseconds a trial."""
    times: dict[str, list[float]] = {}
    for at, event in events:
        times.setdefault(event["event"], []).append(at)
    seconds = [event["result"]["seconds"] for _, event in events if event["event"] == "trial_ended"]
    ends = times["trial_ended"]
    skipped = min(max(10, 2 * workers), len(ends) // 2)
    count = len(ends) - skipped
    training = fmean(seconds[skipped:])
    busy = workers * (ends[-1] - ends[skipped - 1]) / count
    return {
        "opened": times["study_opened"][0],
        "started": times["trial_started"][0],
        "epoch": times["epoch_ended"][0],
        "training": 1000 * training,
        "overhead": 1000 * (busy - training),
        "tail": 1000 * (times["study_ended"][-1] - ends[-1]) / len(ends),
    }


def import_seconds(module: str) -> float:
    """Seconds that a fresh interpreter takes to import a module, more than it takes to start."""

    def once(code: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"})
        return time.perf_counter() - started

    once(f"import {module}")  # the files are in the disk's cache from now on
    return once(f"import {module}") - once("pass")


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--keep", nargs="+", default=["none", "best:10"], help="--keep-models of the runs")
    parser.add_argument("--pruner", default="none")
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--engine", default="processes", help="processes or ray, a Ray of the run's own")
    parser.add_argument("--skip-imports", action="store_true")
    args = parser.parse_args()
    print(machine(), flush=True)
    if not args.skip_imports:
        modules = ("hpo.cli.app", "optuna", "mlflow", "torch")
        found = ", ".join(f"{module} {import_seconds(module):.2f} s" for module in modules)
        print(f"imports: {found}")
    print(
        f"{args.trials} trials of one epoch, digits, a perceptron of {HIDDEN}, {args.sampler}, "
        f"pruner {args.pruner}, {args.engine}\n"
    )
    print(f"{'':27}{'milliseconds a trial':^30}  {'seconds to the first':^30}")
    print(f"{'workers':>8}{'keep':>10}{'load':>9}{'training':>10}{'overhead':>10}{'tail':>10}", end="")
    print(f"{'opening':>12}{'trial':>10}{'epoch':>10}")
    for workers in args.workers:
        for keep in args.keep:
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
            with tempfile.TemporaryDirectory() as folder:
                spec = study(trials=args.trials, pruner=args.pruner, sampler=args.sampler)
                found = summary(
                    run(Path(folder), spec, workers=workers, keep=keep, engine=args.engine), workers=workers
                )
            row = "".join(f"{found[name]:10.1f}" for name in ("training", "overhead", "tail"))
            row += "  " + "".join(f"{found[name]:10.2f}" for name in ("opened", "started", "epoch"))
            print(f"{workers:8}{keep:>10}{load:9.1f}{row}", flush=True)


if __name__ == "__main__":
    main()
