"""Run the platform, then the script that users write today, on the same trials: how long each took, what each found."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

PEER = Path(__file__).with_name("peer.py")

# What is searched, and what the peer calls it. The same ranges stand in peer.py; the candidates come from here.
SHARED: dict[str, Any] = {
    "training.optimizer.name": {"choice": ["sgd", "adam", "adamw"]},
    "training.optimizer.lr": {"float": [1e-4, 1e-2], "log": True},
}
SPACES: dict[str, dict[str, Any]] = {
    "mlp": {
        "model.hidden": {"int": [64, 1024], "log": True},
        "model.dropout": {"float": [0.0, 0.5]},
        "training.batch_size": {"choice": [32, 64, 128]},
        **SHARED,
    },
    "cnn": {
        "model.filters": {"int": [8, 64], "log": True},
        "model.kernel": {"int": [3, 7], "step": 2},
        **SHARED,
    },
}
PEER_NAMES = {"training.optimizer.name": "optimizer"}


@dataclass(frozen=True)
class Side:
    """One side of the comparison. seconds are wall time from the start of the process to its end.

    phases are what the seconds were spent on, in order; scores are best validation accuracies of the trials, by trial.
    """

    seconds: float
    phases: dict[str, float]
    scores: dict[int, float]


def study(model: str, data: Path, *, epochs: int, trials: int, seed: int) -> dict[str, Any]:
    """The study file of the platform's side: random search without pruning, everything else at its default."""
    return {
        "data": {"name": "npz", "path": str(data)},
        "model": {"kind": model},
        "training": {"epochs": epochs, "batch_size": 64, "optimizer": {"momentum": 0.9}},
        "search": {"sampler": "random", "trials": trials, "space": SPACES[model]},
        "seed": seed,
    }


def lines_of(command: Sequence[str], folder: Path) -> tuple[list[tuple[float, dict[str, Any]]], float]:
    """The JSON lines that a command prints, each with the seconds from its start, and the seconds to its end.

    It runs in folder, with thread counts as they are by default. Raises SystemExit with its last words if it fails.
    """
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    environment |= {"HPO_DATA": str(folder / "data"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    words = folder / "words.txt"
    started = time.perf_counter()
    with (
        words.open("w") as stderr,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True) as run,
    ):
        stamped = ((time.perf_counter() - started, line) for line in run.stdout or ())
        heard = [(at, json.loads(line)) for at, line in stamped if line.startswith("{")]
    if run.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {run.returncode}:\n{words.read_text()[-3000:]}")
    return heard, time.perf_counter() - started


def run_platform(spec: dict[str, Any], folder: Path) -> tuple[Side, list[dict[str, Any]]]:
    """The platform's side, and the candidates that it tried, in order."""
    file = folder / "against-peer.yaml"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    command = [sys.executable, "-m", "hpo", "run", str(file), "--home", str(folder), "--json"]
    events, seconds = lines_of(command, folder)
    times: dict[str, list[float]] = {}
    for at, event in events:
        times.setdefault(event["event"], []).append(at)
    started, first, last = times["trial_started"][0], times["epoch_ended"][0], times["trial_ended"][-1]
    trials = sorted(events[-1][1]["study"]["trials"], key=lambda trial: trial["candidate"]["number"])
    unfinished = [trial["candidate"]["number"] for trial in trials if trial["state"] != "complete"]
    if unfinished:
        raise SystemExit(f"trials {unfinished} of the platform did not complete: nothing to compare")
    phases = {
        "start-up": started,
        "to the first epoch": first - started,
        "training": last - first,
        "tracking and models": times["study_ended"][-1] - last,
        "exit": seconds - times["study_ended"][-1],
    }
    scores = {trial["candidate"]["number"]: trial["result"]["value"] for trial in trials}
    return Side(seconds, phases, scores), [trial["candidate"]["parameters"] for trial in trials]


def run_peer(
    model: str, data: Path, candidates: list[dict[str, Any]], folder: Path, *, epochs: int, trials: int, form: str
) -> Side:
    """The peer's side, on the first `trials` candidates; its seconds are what all of them would take."""
    named = [
        {PEER_NAMES.get(path, path.rpartition(".")[2]): value for path, value in candidate.items()}
        for candidate in candidates
    ]
    file = folder / "candidates.json"
    file.write_text(json.dumps(named), encoding="utf-8")
    options = {"data": data, "model": model, "trials": trials, "epochs": epochs, "model-format": form}
    command = [sys.executable, str(PEER), "--candidates", str(file)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    heard, seconds = lines_of(command, folder)
    records = [record for _, record in heard]
    first, last = heard[0][0] - records[0]["seconds"], heard[-1][0]
    phases = {
        "start-up": first,
        "training": last - first - sum(record["log_model_seconds"] for record in records),
        "log_model": sum(record["log_model_seconds"] for record in records),
        "exit": seconds - last,
    }
    # The first trial pays for what happens once, such as late imports: it is not taken for typical.
    missing = len(candidates) - trials
    if missing:
        seconds += missing * statistics.mean(record["seconds"] for record in records[1:])
    return Side(seconds, phases, {record["trial"]: record["valid_accuracy"] for record in records})


def machine() -> str:
    """Cores, CPU and accelerator of this machine, and the versions that matter."""
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        facts = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in facts if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "mlflow", "optuna"))
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
    return (
        f"{cores} cores, {cpu}{gpu}, {load} before the start\n"
        f"Python {platform.python_version()}, {packages}\n"
        f"torch threads: peer {torch.get_num_threads()} (torch's default), platform divides the cores among its workers"
    )


def show(model: str, ours: Side, peer: Side, *, trials: int, epochs: int, peer_trials: int) -> None:
    """Print one comparison."""
    scaled = "" if peer_trials == trials else f" (scaled from the first {peer_trials} trials)"
    print(f"\n{model}: n = {trials} trials of {epochs} epochs, the same candidates on both sides")
    print(f"{'':10}{'seconds':>9}{'a trial':>9}{'best valid accuracy':>21}")
    for name, side in (("platform", ours), ("peer", peer)):
        best = max(side.scores.values())
        note = scaled if side is peer else ""
        print(f"{name:10}{side.seconds:9.1f}{side.seconds / trials:9.2f}{best:21.4f}{note}")
    print(f"ratio     {peer.seconds / ours.seconds:9.1f}{scaled}")
    apart = [abs(ours.scores[number] - value) for number, value in peer.scores.items()]
    print(f"accuracy of the same candidate: {statistics.mean(apart):.4f} apart on average, {max(apart):.4f} at most")
    if scaled:
        first = max(ours.scores[number] for number in peer.scores)
        print(f"the platform's best among those {peer_trials} trials: {first:.4f}")
    for name, side in (("platform", ours), ("peer", peer)):
        measured = scaled.replace("scaled from", "measured on") if side is peer else ""
        print(f"{name}{measured}: " + ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in side.phases.items()))


def main() -> None:
    """Compare as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="npz file with medmnist's keys, such as bloodmnist.npz"
    )
    parser.add_argument("--model", choices=["mlp", "cnn", "both"], default="both")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the random candidates")
    parser.add_argument("--peer-trials", type=int, help="run the peer on so many (2 or more) and scale its time")
    parser.add_argument("--peer-format", choices=["pt2", "pickle"], default="pt2", help="how the peer logs its models")
    parser.add_argument("--until", type=float, help="a test accuracy: see until_score.py; of one --model")
    parser.add_argument("--limit", type=float, default=1200, help="with --until: seconds for each search")
    args = parser.parse_args()
    if args.until is not None and args.model == "both":
        parser.error("--until: give --model, too")
    peer_trials = min(args.trials, args.peer_trials or args.trials)
    if peer_trials < min(2, args.trials):
        parser.error("--peer-trials must be at least 2: the first trial is not typical")
    print(machine(), flush=True)
    # Both sides find the libraries in the disk cache, whoever runs first.
    subprocess.run([sys.executable, "-c", "import mlflow.pytorch, optuna, torch, torchvision"], check=True)
    if args.until is not None:
        from until_score import compare

        compare(args.model, args.data.resolve(), score=args.until, limit=args.limit)
        return
    for model in ("mlp", "cnn") if args.model == "both" else (args.model,):
        with tempfile.TemporaryDirectory() as ours_folder, tempfile.TemporaryDirectory() as peer_folder:
            data = args.data.resolve()
            spec = study(model, data, epochs=args.epochs, trials=args.trials, seed=args.seed)
            ours, candidates = run_platform(spec, Path(ours_folder))
            print(f"{model}: the platform took {ours.seconds:.1f} s; now the peer", file=sys.stderr, flush=True)
            peer = run_peer(
                model,
                data,
                candidates,
                Path(peer_folder),
                epochs=args.epochs,
                trials=peer_trials,
                form=args.peer_format,
            )
            show(model, ours, peer, trials=args.trials, epochs=args.epochs, peer_trials=peer_trials)


if __name__ == "__main__":
    main()
