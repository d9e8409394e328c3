"""Count the epochs that a search spends until it first sees a given validation score, pruner by pruner.

Every cell of a small grid of perceptrons is trained once to the end, and once more with `training.data_growth`; what
the validation part said after each epoch is kept in a file of the cache folder. Searches then replay these curves
through real studies of the platform, one worker: its samplers and pruners, but a storage in memory. That is honest,
since the curve of a pruned training is the beginning of its whole curve, and growing data have curves of their own.
Epochs are counted in full passes over the training images: one over a tenth of them is a tenth. Seeds are those of
samplers: a search with another pruner and the same seed of a random sampler draws the same candidates. The test part
is never read.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna

from curves import curve
from hpo.home import Home
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec

GROWTH = 0.1


class Data(NamedTuple):
    """Part of the study, the epochs of a training, and how many training and validation images take part (None: all).

    Each is cut down by a stratified draw.
    """

    study: Mapping[str, Any]
    epochs: int
    train: int | None = None
    valid: int | None = None


DATA: Mapping[str, Data] = {
    "digits": Data({"data": {"name": "digits"}, "split": {"kind": "holdout"}}, 50),
    "fashionmnist": Data(
        {"data": {"name": "fashionmnist"}, "split": {"kind": "holdout", "share": 1 / 6, "by": "order"}},
        27,
        train=5_000,
        valid=5_000,
    ),
}
SPACE = {
    "training.optimizer.lr": {"choice": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]},
    "training.optimizer.name": {"choice": ["sgd", "adam"]},
    "model.hidden": {"choice": [32, 64, 128]},
    "model.dropout": {"choice": [0.0, 0.2]},
}
HALVING = {"name": "successive_halving", "min_epochs": 1, "reduction_factor": 3}
# name -> (sampler, pruner, whether the data grow)
METHODS: Mapping[str, tuple[str, Any, bool]] = {
    "random": ("random", "none", False),
    "random, growing data": ("random", "none", True),
    "random + median": ("random", {"name": "median", "warmup_epochs": 1}, False),
    "random + ASHA": ("random", HALVING, False),
    "random + ASHA from epoch 3": ("random", {**HALVING, "min_epochs": 3}, False),
    "random + ASHA, growing data": ("random", HALVING, True),
    "random + ASHA from epoch 3, growing data": ("random", {**HALVING, "min_epochs": 3}, True),
    "random + hyperband": ("random", {**HALVING, "name": "hyperband"}, False),
    "random + curve": ("random", "curve", False),
    "random + curve, growing data": ("random", "curve", True),
    "tpe": ("tpe", "none", False),
    "tpe + ASHA": ("tpe", HALVING, False),
    "tpe + ASHA, growing data": ("tpe", HALVING, True),
    "tpe + curve": ("tpe", "curve", False),
}
Table = Mapping[str, list[float]]


def spec_of(data: str, sampler: str = "random", pruner: Any = "none", *, growing: bool = False, seed: int = 0) -> Any:
    search = {"sampler": sampler, "pruner": pruner, "space": SPACE, "duplicates": "reject", "trials": 1000}
    training = {"batch_size": 64, "precision": "float32", "data_growth": GROWTH if growing else 1.0}
    training["epochs"] = DATA[data].epochs
    plain = {"name": data, **DATA[data].study, "model": {"kind": "mlp"}, "training": training, "search": search}
    return parse_study({**plain, "seed": seed})


def key_of(parameters: Mapping[str, Any]) -> str:
    return json.dumps({path: parameters[path] for path in SPACE})


def table_of(data: str, *, growing: bool, cache: Path) -> Table:
    """Cell of the grid -> validation accuracy after each epoch; cells that the cache lacks are trained first."""
    file = cache / f"{data}-{'growing' if growing else 'whole'}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    # The learning rate is constant, so that longer trainings of the cache begin as shorter ones do.
    known: dict[str, list[float]] = {line["cell"]: line["values"][: DATA[data].epochs] for line in lines}
    lacking = [cell for cell in spec_of(data).search.space.cells({}) if key_of(cell) not in known]
    if not lacking:
        return known
    from hpo.data.prepare import prepare

    spec: StudySpec = spec_of(data, growing=growing)
    card = prepare(spec.data, spec.split)
    for count, cell in enumerate(lacking, 1):
        started = time.perf_counter()
        part = {"images": DATA[data].train, "valid": DATA[data].valid}
        values = list(curve(spec.with_values(cell), card, "valid_accuracy", seed=0, **part))
        line = {"cell": key_of(cell), "values": values, "seconds": time.perf_counter() - started}
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        known[line["cell"]] = values
        print(f"{file.name}: {count} of {len(lacking)}, {line['seconds']:.1f} s", end="\r", flush=True)
    print()
    return known


def spent(spec: StudySpec, table: Table, aims: list[float], folder: Path) -> list[float]:
    """For each of the rising aims: full epochs until a training of this search first sees it; inf where none does."""
    home = Home.at(folder)
    epochs, prunes = spec.training.epochs, spec.search.pruner.name != "none"
    total, seen = 0.0, []
    study = open_study(home, spec, data_digest="curves")
    try:
        while len(seen) < len(aims) and (candidate := study.ask(budget=spec.search.trials, worker="replay")):
            curve = table[key_of(candidate.parameters)]
            state, best, number = TrialState.COMPLETE if len(curve) == epochs else TrialState.FAILED, 0.0, 0
            for number, value in enumerate(curve, 1):
                total, best = total + spec.training.share(number), max(best, value)
                seen += [total for aim in aims[len(seen) :] if best >= aim]
                # Nobody reads the reports of a search without a pruner.
                if prunes and study.report(candidate.number, number, value) and number < epochs:
                    state = TrialState.PRUNED
                    break
            study.tell(TrialResult(candidate.number, state, best, number))
    finally:
        study.close()
    return seen + [math.inf] * (len(aims) - len(seen))


def ratio(method: list[float], random: list[float], most: int) -> tuple[float, float, float]:
    """Geometric mean over seeds of epochs of random / epochs of the method, with its 95 % bootstrap interval.

    most counts for a search that never saw the target: as if all of the grid were then trained to the end.
    """
    logs = np.array([math.log(min(r, most) / min(m, most)) for m, r in zip(method, random, strict=True)])
    drawn = np.random.default_rng(0).choice(logs, (10_000, len(logs))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return math.exp(logs.mean()), math.exp(low), math.exp(high)


def targets(table: Table, shares: list[float]) -> list[float]:
    """For each share the lowest score that at most so much of the grid reaches; the best one where none is so rare."""
    finals = [max(curve, default=0.0) for curve in table.values()]
    scores = sorted(set(finals))
    rare = {score: sum(value >= score for value in finals) / len(finals) for score in scores}
    return [next((score for score in scores if rare[score] <= share), scores[-1]) for share in shares]


def compare(data: str, tables: Mapping[bool, Table], aims: list[float], methods: list[str], seeds: int) -> None:
    """Every method with every seed, until the highest aim is seen; a table for each aim."""
    spend: dict[str, list[list[float]]] = {}
    for name in methods:
        sampler, pruner, growing = METHODS[name]
        spend[name] = []
        for seed in range(seeds):
            spec = spec_of(data, sampler, pruner, growing=growing, seed=seed)
            with tempfile.TemporaryDirectory() as folder:
                spend[name].append(spent(spec, tables[growing], aims, Path(folder)))
            print(f"{data}, {name}, seed {seed}: {spend[name][-1]}", file=sys.stderr)
    for place, aim in enumerate(aims):
        reach = [sum(max(curve, default=0.0) >= aim for curve in tables[growing].values()) for growing in (False, True)]
        print(
            f"\n{data}, {DATA[data].epochs} epochs, {seeds} seeds: validation accuracy {aim:.4f}, which {reach[0]} of"
        )
        print(f"{len(tables[False])} candidates reach ({reach[1]} with growing data)\n")
        print("| search | epochs, median | quartiles | seeds that got there | random / this (95 %) |")
        print("|---|---|---|---|---|")
        columns = {name: [row[place] for row in rows] for name, rows in spend.items()}
        for name, found in columns.items():
            low, middle, high = np.quantile(found, [0.25, 0.5, 0.75], method="inverted_cdf")
            there = sum(map(math.isfinite, found))
            mean, least, most = ratio(found, columns[methods[0]], len(tables[False]) * DATA[data].epochs)
            lead = f"{mean:.2f} ({least:.2f} to {most:.2f})"
            print(f"| {name} | {middle:.0f} | {low:.0f} to {high:.0f} | {there} of {seeds} | {lead} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--top", nargs="+", type=float, default=[0.2, 0.05], help="targets: so much of the grid gets there"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="the first is compared with"
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "hpo-fidelity")
    parser.add_argument("--train-only", action="store_true")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    asked.cache.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for data in asked.data:
        tables = {growing: table_of(data, growing=growing, cache=asked.cache) for growing in (False, True)}
        if not asked.train_only:
            compare(data, tables, targets(tables[False], sorted(asked.top, reverse=True)), asked.methods, asked.seeds)


if __name__ == "__main__":
    main()
