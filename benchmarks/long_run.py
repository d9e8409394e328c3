"""Run a study of thousands of trials end to end: what a trial costs, and what the supervisor holds, at both ends.

    OMP_NUM_THREADS=1 uv run python benchmarks/long_run.py --trials 10000

Trials are trained by a formula, in no time; all else is real: search, pruning, storage, tracking in MLflow, and the end
of the study. A row is a tenth of the trials: milliseconds a trial from its first result to its last, and the resident
memory of the supervisor's process at its end, less that of the first row in the last column. The tail is from the last
trial to the end of the study.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Generator
from pathlib import Path

from against_peer import machine
from hpo.events import EpochEnded, Event, TrialEnded
from hpo.execute.engines import in_process
from hpo.execute.run_study import run_study
from hpo.execute.workers.task import Task
from hpo.records import Epoch, TrialResult, TrialState
from hpo.spec.load import parse_study

ROWS = 10


def formula(task: Task, device: str) -> Generator[EpochEnded | TrialEnded, bool, None]:  # noqa: ARG001 - a Trainer
    """Ten epochs whose accuracy falls with dropout and rises with time."""
    epochs: list[Epoch] = []
    state = TrialState.COMPLETE
    for number in range(1, 11):
        accuracy = (1 - task.setup.model.dropout) * number / 10
        scores = {"train_loss": 1.0, "train_accuracy": accuracy, "valid_loss": 1 - accuracy, "valid_accuracy": accuracy}
        epochs.append(Epoch(number=number, scores=scores, learning_rate=0.1, seconds=0.001))
        if not (yield EpochEnded(task.number, epochs[-1])):
            state = TrialState.PRUNED
            break
    yield TrialEnded(TrialResult(task.number, state, None, len(epochs), tuple(epochs), epochs[-1].scores, 0.01))


def resident() -> float:
    """MB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Run, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--pruner", default="median")
    args = parser.parse_args()
    spec = parse_study(
        {
            "name": "long",
            "data": {"name": "digits"},
            "split": {"kind": "holdout"},
            "model": {"kind": "mlp"},
            "keep": {"models": "none"},
            "search": {
                "sampler": args.sampler,
                "pruner": args.pruner,
                "trials": args.trials,
                "space": {"model.dropout": {"float": [0.0, 0.9]}, "model.hidden": {"int": [1, 1000]}},
            },
        }
    )
    in_process.InProcessFactory.start = lambda *_, **__: in_process.InProcess(trainer=formula)  # type: ignore[method-assign]
    print(machine(), flush=True)
    print(f"{'trials':>8}{'ms a trial':>12}{'MB':>8}{'more':>8}", flush=True)
    step, ended, since, first = max(1, args.trials // ROWS), 0, time.perf_counter(), 0.0

    def watch(event: Event) -> None:
        nonlocal ended, since, first
        if not isinstance(event, TrialEnded):
            return
        ended += 1
        if ended % step == 0:
            now, held = time.perf_counter(), resident()
            first = first or held
            print(f"{ended:8}{1000 * (now - since) / step:12.1f}{held:8.0f}{held - first:8.0f}", flush=True)
            since = now

    with tempfile.TemporaryDirectory() as folder:
        run_study(spec, home=folder, engine="in_process", watch=watch)
    print(f"tail: {time.perf_counter() - since:.1f} s", flush=True)


if __name__ == "__main__":
    main()
