"""Compare searches on learning curves that others have published, with simulated workers and a simulated clock.

LCBench is the surrogate of YAHPO Gym (Zimmer et al. 2021, Pfisterer et al. 2022): 7 settings of a funnel-shaped
network, epochs 1 to 52, accuracy in [0, 1], and the seconds of each epoch. TaskSet (Metz et al. 2020, as packed for
DyHPO) is a table of 1,000 settings of an Adam variant, 51 values of the validation loss each; a search that asks for
other settings gets the nearest row, and an epoch costs 1.
Workers train without pause; each epoch costs its time on the simulated clock,
asking and reporting cost none. A training that a system resumes goes on where it stopped, whether or not its real
implementation would train these epochs again. The budget is the time of 20 average full trainings, summed over the
workers (80 for 16 workers). What a search has reached is the best validation value that it has seen at any epoch.

    python search_quality.py run --data FOLDER --system hpo --workers 4 --seeds 20 --out hpo.jsonl
    python search_quality.py table *.jsonl

`run` needs onnxruntime and the system's own package: one environment each where they clash. `hpo` searches through the
platform's own ask, report and tell with a SQLite storage in a temporary folder.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

TRAININGS = 20  # of the budget
SHARES = (0.25, 0.5, 1.0)  # of the budget, at which searches are compared
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
CHOSEN_ON = TASKS[::2]
"""Those on which the search of `auto` was chosen; the others only confirm it."""
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


class TaskSet:
    """One table of losses; lower values are better. Rows whose loss is no number or explodes are left out."""

    maximize, epochs = False, 50

    def __init__(self, folder: Path, task: str) -> None:
        file = next((folder / "taskset").glob(f"*{task}*.json.gz"))
        with gzip.open(file) as stream:
            rows = json.load(stream)
        self.name = f"taskset {task}"
        curves = np.array([row["valid"]["loss"][1:] for row in rows], float)
        first = np.nanmedian([row["valid"]["loss"][0] for row in rows])
        sound = np.isfinite(curves).all(1) & (curves.max(1) < 5 * first)
        names = list(rows[0]["hp"])
        values = np.array([[row["hp"][name] for name in names] for row in rows], float)[sound]
        self._curves = curves[sound]
        self.space = {}
        columns = []
        for name, column in zip(names, values.T, strict=True):
            log = column.min() > 0 and column.max() / column.min() > 20
            self.space[name] = Range(column.min(), column.max(), log=log)
            scaled = np.log(column) if log else column
            columns.append((scaled - scaled.min()) / max(float(np.ptp(scaled)), 1e-12))
        self._units = np.column_stack(columns)

    def curves(self, configs: Sequence[Config]) -> tuple[Any, Any]:
        """(values, epochs) of the nearest rows, each (configs, epochs)."""
        units = np.array([[unit_of(part, config[name]) for name, part in self.space.items()] for config in configs])
        rows = ((units[:, None] - self._units) ** 2).sum(-1).argmin(1)
        return self._curves[rows], np.tile(np.arange(1.0, self.epochs + 1), (len(configs), 1))


def unit_of(part: Range, value: float) -> float:
    """The place of a value in its range, in [0, 1]."""
    scale = math.log if part.log else float
    width = scale(part.high) - scale(part.low)
    return (scale(value) - scale(part.low)) / width if width else 0.0


def drawn(space: Mapping[str, Range], rng: Any, count: int) -> list[Config]:
    """Random settings."""
    return [{name: part.draw(rng.random()) for name, part in space.items()} for _ in range(count)]


@dataclass
class _Training:
    """A training while it runs, or where it was left."""

    values: Any
    seconds: Any
    epoch: int = 0
    best: float = -math.inf


def simulate(system: Any, task: Any, *, workers: int, seconds: float) -> list[tuple[float, float]]:
    """(time, best value so far, higher is better) at each improvement, of asynchronous workers until `seconds`."""
    sign = 1.0 if task.maximize else -1.0
    trainings: dict[Any, _Training] = {}
    events: list[tuple[float, int, Any]] = []  # time, order, (job or None: ask)
    order, best, path = 0, -math.inf, []

    def push(when: float, job: Any) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (when, order, job))

    def begin(now: float) -> None:
        job = system.ask()
        if job is None:
            push(now + 1e-3 * seconds, None)
            return
        if job.key not in trainings:
            values, times = task.curves([job.config])
            trainings[job.key] = _Training(sign * values[0], np.diff(times[0], prepend=0.0))
        push(now + trainings[job.key].seconds[trainings[job.key].epoch], job)

    for _ in range(workers):
        push(0.0, None)
    while events and events[0][0] <= seconds:
        now, _, job = heapq.heappop(events)
        if job is None:
            begin(now)
            continue
        training = trainings[job.key]
        value = float(training.values[training.epoch])
        training.epoch += 1
        training.best = max(training.best, value)
        if value > best:
            best = value
            path.append((now, best))
        stopped = system.report(job.key, training.epoch, sign * value)
        if stopped or training.epoch >= job.until:
            system.tell(job.key, training.epoch, sign * training.best, stopped=stopped)
            begin(now)
        else:
            push(now + training.seconds[training.epoch], job)
    return path


def task_of(name: str, folder: Path) -> Any:
    return LcBench(folder, name) if name in TASKS else TaskSet(folder, name)


def scale_of(task: Any) -> tuple[float, float, float]:
    """(seconds of an average full training, worst and best value for the normalised regret; higher is better).

    From 2,000 random settings, the same for each system: regret 1 is their median best value, 0 their best or better.
    """
    sign = 1.0 if task.maximize else -1.0
    values, seconds = task.curves(drawn(task.space, np.random.default_rng(0), 2000))
    tops = (sign * values).max(1)
    return float(seconds[:, -1].mean()), float(np.median(tops)), float(tops.max())


def run(asked: argparse.Namespace) -> None:
    import search_quality_systems

    make: Callable[..., Any] = search_quality_systems.SYSTEMS[asked.system]
    tasks = [task_of(name, asked.data) for name in asked.tasks]
    scales = [scale_of(task) for task in tasks]
    label = asked.label or asked.system
    lines = asked.out.read_text().splitlines() if asked.out.exists() else []
    done = {tuple(json.loads(line)[key] for key in ("system", "task", "workers", "seed")) for line in lines}
    with asked.out.open("a") as out:
        # Seeds outermost: what is there when it is cut off has all tasks.
        for seed in range(asked.first, asked.first + asked.seeds):
            for task, (full, worst, top) in zip(tasks, scales, strict=True):
                for workers in asked.workers:
                    if (label, task.name, workers, seed) in done:
                        continue
                    total = TRAININGS * full * max(1, workers // 4)
                    began = time.perf_counter()
                    system = make(task, seed=seed, workers=workers)
                    try:
                        path = simulate(system, task, workers=workers, seconds=total / workers)
                    finally:
                        system.close()
                    line = {
                        "system": label,
                        "task": task.name,
                        "workers": workers,
                        "seed": seed,
                        "path": [(round(when * workers / total, 6), value) for when, value in path],
                        "worst": worst,
                        "top": top,
                        "wall": time.perf_counter() - began,
                    }
                    out.write(json.dumps(line) + "\n")
                    out.flush()
                    print(
                        f"{label}, {task.name}, {workers} workers, seed {seed}: {line['wall']:.1f} s", file=sys.stderr
                    )


GRID = np.round(np.arange(0.01, 1.0001, 0.01), 2)


def read(files: Sequence[Path]) -> dict[int, dict[str, dict[str, dict[int, Any]]]]:
    """Workers -> task -> system -> seed -> best value at each place of GRID (-inf before the first epoch)."""
    found: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for file in files:
        for text in file.read_text().splitlines():
            line = json.loads(text)
            times = np.array([when for when, _ in line["path"]] or [2.0])
            values = np.array([-math.inf, *(value for _, value in line["path"])] if line["path"] else [-math.inf] * 2)
            line["best"] = values[np.searchsorted(times, GRID + 1e-9, side="right")]
            found[line["workers"]][line["task"]][line["system"]][line["seed"]] = line
    return found


def interval(values: Any, rng: Any) -> str:
    """Mean over tasks, and the 95 % bootstrap interval over tasks and seeds; values (tasks, seeds)."""
    tasks, seeds = values.shape
    rows = rng.integers(tasks, size=(2000, tasks, 1))
    means = values[rows, rng.integers(seeds, size=(2000, tasks, seeds))].mean((1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def table(asked: argparse.Namespace) -> None:
    from scipy.stats import rankdata

    for workers, tasks in sorted(read(asked.files).items()):
        names = sorted({system for systems in tasks.values() for system in systems})
        kept = {task: part for task, part in sorted(tasks.items()) if len(part) == len(names)}
        for title, wanted in (
            ("all tasks", lambda _: True),
            ("chosen on", _is_chosen),
            ("held out", lambda task: not _is_chosen(task)),
        ):
            part = {task: systems for task, systems in kept.items() if wanted(task)}
            if not part:
                continue
            seeds = min(len(runs) for systems in part.values() for runs in systems.values())
            # Axes: system, task, seed, place.
            best = np.array(
                [
                    [[run["best"] for run in list(systems[name].values())[:seeds]] for systems in part.values()]
                    for name in names
                ]
            )
            lines = [next(iter(systems[names[0]].values())) for systems in part.values()]
            worst = np.array([line["worst"] for line in lines])[None, :, None, None]
            tops = np.maximum([line["top"] for line in lines], best.max((0, 2, 3)))[None, :, None, None]
            regret = np.clip((tops - best) / (tops - worst), 0, 1)
            ranks = rankdata(-best, axis=0)
            print(f"\n{workers} workers, {title}: {len(part)} tasks, {seeds} seeds\n")
            print(
                "| search | rank at 25 % | 50 % | 100 % | anytime | regret at 25 % | 50 % | 100 % | random's end at |"
            )
            print("|---|---|---|---|---|---|---|---|---|")
            # The first place at which a search has what random search has at the end of the same budget, or 1.
            reached = best >= best[names.index("random"), ..., -1:] if "random" in names else best > np.inf
            shares = np.where(reached.any(-1), GRID[reached.argmax(-1)], 1.0)
            places = [int(np.searchsorted(GRID, share)) for share in SHARES]
            for row in np.argsort(ranks[..., places].mean((1, 2, 3))):
                rng = np.random.default_rng(0)
                cells = [interval(ranks[row, ..., place], rng) for place in places]
                cells.append(interval(ranks[row].mean(-1), rng))
                cells += [interval(regret[row, ..., place], rng) for place in places]
                cells.append(interval(shares[row], rng))
                print(f"| {names[row]} | {' | '.join(cells)} |")


def _is_chosen(task: str) -> bool:
    return task.removeprefix("lcbench ") in CHOSEN_ON


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    part = commands.add_parser("run", help="run one system and append its runs to a file")
    part.add_argument("--data", type=Path, required=True, help="folder with lcbench/ and taskset/")
    part.add_argument("--system", required=True)
    part.add_argument("--label", help="its name in the tables")
    part.add_argument("--tasks", nargs="+", default=TASKS, help="ids of LCBench, or parts of names of TaskSet")
    part.add_argument("--workers", nargs="+", type=int, default=[4])
    part.add_argument("--seeds", type=int, default=20)
    part.add_argument("--first", type=int, default=0, help="the first seed")
    part.add_argument("--out", type=Path, required=True)
    part.set_defaults(call=run)
    part = commands.add_parser("table", help="ranks and regrets of all runs in these files")
    part.add_argument("files", nargs="+", type=Path)
    part.set_defaults(call=table)
    asked = parser.parse_args()
    asked.call(asked)


if __name__ == "__main__":
    main()
