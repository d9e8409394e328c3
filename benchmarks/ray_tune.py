"""Run one search with Ray Tune (OptunaSearch, ASHA) and with the platform (TPE, successive halving), on one trainable.

Ray is no dependency of the project: uv run --with "ray[tune]" python benchmarks/ray_tune.py

Same on both sides: the search space, the number of trials, the most epochs of each, the first rung (one epoch) and the
reduction factor (3), two trials at once with one thread each, the data, and the training itself: Ray's trainable goes
through the platform's own epochs (hpo.training) and reports each. Not the same: the platform writes every epoch to
MLflow and to its study storage, Ray its result files; which candidates are drawn and stopped, so the epochs differ.

start-up: seconds from the start of the process to the first trial that could begin (Ray: ray.init and imports; the
platform: the study is opened). trials/min: trials by the seconds from there to the end of the search. overhead: what a
trial costs beside training, (2 * those seconds - seconds inside training, summed) / trials. Training counts what each
trial trained until it ended or was stopped, on Ray's side until its last report.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from against_peer import lines_of, machine

WORKERS, FACTOR = 2, 3
SPACE: Mapping[str, Any] = {
    "model.hidden": {"int": [16, 256], "log": True},
    "model.dropout": {"float": [0.0, 0.5]},
    "training.batch_size": {"choice": [32, 64, 128]},
    "training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True},
}


def study(args: argparse.Namespace) -> dict[str, Any]:
    """The study file; Ray's side takes setup and space from it."""
    data = {"name": "npz", "path": str(args.data.resolve())} if args.data else {"name": "digits"}
    return {
        "data": data,
        "split": {"kind": "holdout"},
        "model": {"kind": "mlp"},
        "training": {"epochs": args.epochs, "precision": "float32"},
        "search": {
            "sampler": "tpe",
            "pruner": {"name": "successive_halving", "min_epochs": 1, "reduction_factor": FACTOR},
            "trials": args.trials,
            "space": SPACE,
        },
    }


def train(config: Mapping[str, Any], *, file: str, card: Any) -> None:
    """Ray's trainable: the platform's training of one candidate, each epoch reported."""
    from ray import tune

    from hpo.spec.load import load_study
    from hpo.training.device import use_threads
    from hpo.training.trial import TrialPlan, train_trial

    use_threads(1)
    setup = load_study(file).with_values(config)
    seconds, began = 0.0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        epochs = train_trial(TrialPlan(setup, card, 0, 0, Path(folder), "cpu"))
        go_on: bool | None = None
        while True:
            try:
                epoch = next(epochs) if go_on is None else epochs.send(go_on)
            except StopIteration:
                return
            seconds += time.perf_counter() - began
            tune.report({"valid_accuracy": epoch.scores["valid_accuracy"], "training_seconds": seconds})
            go_on, began = True, time.perf_counter()


def ray_side(file: Path) -> None:
    """Search with Ray Tune, and print what came of it as lines of JSON."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else Ray installs the environment once more
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from hpo.execute.workers.job_process import prepare
    from hpo.spec.load import load_study

    spec = load_study(file)
    card = prepare(spec, "cpu").data
    kinds = {
        "int": lambda part: tune.lograndint(part["int"][0], part["int"][1] + 1),
        "choice": lambda part: tune.choice(part["choice"]),
        "float": lambda part: (tune.loguniform if part.get("log") else tune.uniform)(*part["float"]),
    }
    space = {path: kinds[next(iter(part))](part) for path, part in SPACE.items()}
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    print(json.dumps({"event": "opened"}), flush=True)
    asha = ASHAScheduler(max_t=spec.training.epochs, grace_period=1, reduction_factor=FACTOR)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(train, file=str(file), card=card), {"cpu": 1}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="valid_accuracy",
            mode="max",
            search_alg=OptunaSearch(),
            scheduler=asha,
            num_samples=spec.search.trials,
            max_concurrent_trials=WORKERS,
            reuse_actors=True,  # else every trial imports torch again
        ),
        run_config=tune.RunConfig(storage_path=str(file.parent / "ray"), verbose=0),
    )
    found = tuner.fit()
    metrics = [result.metrics for result in found if result.metrics and "training_seconds" in result.metrics]
    told = {
        "trials": len(metrics),
        "epochs": sum(one["training_iteration"] for one in metrics),
        "seconds": sum(one["training_seconds"] for one in metrics),
        "best": max(one["valid_accuracy"] for one in metrics),
    }
    print(json.dumps({"event": "ended", **told}), flush=True)


def ray(spec: dict[str, Any], folder: Path) -> dict[str, float]:
    """Ray's side in a process of its own."""
    file = folder / "ray-tune.yaml"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    (opened, _), (ended, told) = lines_of([sys.executable, __file__, "--side", str(file)], folder)[0]
    return {**told, "start-up": opened, "search": ended - opened}


def platform(spec: dict[str, Any], folder: Path) -> dict[str, float]:
    """The platform's side, as `hpo run` does it; no models are kept, as Ray keeps none."""
    file = folder / "ray-tune.yaml"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    command = [sys.executable, "-m", "hpo", "run", str(file), "--home", str(folder), "--json"]
    events = lines_of([*command, "--workers", str(WORKERS), "--stack", "1", "--keep-models", "none"], folder)[0]
    at = {event["event"]: when for when, event in events}
    results = [event["result"] for _, event in events if event["event"] == "trial_ended"]
    return {
        "trials": len(results),
        "epochs": sum(event["event"] == "epoch_ended" for _, event in events),
        "seconds": sum(result["seconds"] for result in results),
        "best": max(result["value"] for result in results if result["value"] is not None),
        "start-up": at["study_opened"],
        "search": at["study_ended"] - at["study_opened"],
    }


def main() -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="npz file with medmnist's keys; the digits without it")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        sys.exit(
            'Ray is not installed here, and no dependency: uv run --with "ray[tune]" python benchmarks/ray_tune.py'
        )
    if args.side:
        ray_side(args.side)
        return
    from importlib.metadata import version

    print(f"{machine()}, ray {version('ray')}")
    print(f"{args.trials} trials of at most {args.epochs} epochs, {args.data or 'digits'}, {WORKERS} at once\n")
    print(f"{'':12}{'start-up s':>11}{'search s':>10}{'trials/min':>12}{'epochs':>8}{'overhead ms':>13}{'best':>8}")
    rates = {}
    for name, side in (("platform", platform), ("Ray Tune", ray)):
        with tempfile.TemporaryDirectory() as folder:
            found = side(study(args), Path(folder))
        rates[name] = 60 * found["trials"] / found["search"]
        overhead = 1000 * (WORKERS * found["search"] - found["seconds"]) / found["trials"]
        print(f"{name:12}{found['start-up']:11.1f}{found['search']:10.1f}{rates[name]:12.1f}", end="")
        print(f"{found['epochs']:8.0f}{overhead:13.0f}{found['best']:8.4f}", flush=True)
    print(f"\ntrials a minute, platform by Ray Tune: {rates['platform'] / rates['Ray Tune']:.1f}")


if __name__ == "__main__":
    main()
