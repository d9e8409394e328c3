"""A study of thousands of trials: how long the commands take that look at it, one more trial, and a run that goes on.

Studies of each size are written straight into the storage (many_trials.py), each trial with ten epochs of scores and
the predicted classes of 1,712 images. Seconds and milliseconds are of CPU, of the process that asks; a busy machine
stretches the wall time, printed for the commands, and not these.

ask + tell: median of --asks candidates asked and told as complete, through the handle that hpo run uses; with a pruner,
the report of ten epochs too; in brackets the ask alone. run: `hpo run` for 10 trials more of a study that MLflow knows
all of, one worker: seconds to the first trial, and from the last to the end, with the study's pictures; CPU of all its
processes.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from against_peer import lines_of, machine
from hpo.home import Home
from many_trials import CONDITIONAL, GRID, copy_runs, make_study, result_of, spec_of

SEARCHES: dict[str, dict[str, Any]] = {
    "auto": {"sampler": "auto", "pruner": "auto"},
    "tpe": {},
    "tpe, conditional": {"space": CONDITIONAL},
    "random": {"sampler": "random"},
    "grid": {"sampler": "grid", "space": GRID},
    "random, median": {"sampler": "random", "pruner": "median"},
    "random, halving": {"sampler": "random", "pruner": "successive_halving"},
}


def one_more(home: Home, spec: Any, *, asks: int) -> tuple[float, float, float, float]:
    """CPU seconds to open the study, to read its result, of one more trial, and of its ask alone."""
    from hpo.search.lifecycle import open_study

    marks = [time.process_time()]
    study = open_study(home, spec, data_digest="sha256:0")
    marks.append(time.process_time())
    study.result()
    marks.append(time.process_time())
    spent, asked = [], []
    for _ in range(asks):
        began = time.process_time()
        candidate = study.ask(budget=10**6, worker="worker 0")
        asked.append(time.process_time() - began)
        result = result_of(candidate.number, candidate.parameters)
        began = time.process_time() - asked[-1]
        for epoch in result.epochs if spec.search.pruner.name != "none" else ():
            study.report(candidate.number, epoch.number, epoch.scores["valid_accuracy"])
        study.tell(result)
        spent.append(time.process_time() - began)
    study.close()
    return marks[1] - marks[0], marks[2] - marks[1], statistics.median(spent), statistics.median(asked)


def command(*words: str, home: Path) -> tuple[float, float]:
    """CPU and wall seconds of an hpo command, its output thrown away."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "hpo", *words, "--home", str(home)], check=True, stdout=subprocess.DEVNULL)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def go_on(folder: Path, count: int) -> tuple[float, float, float]:
    """Seconds of a run of 10 more trials to its first trial, from its last to the end, and of CPU in all."""
    from hpo.storage.reader import read_study

    home, file = Home.find(folder).create(), folder / "grown.yaml"
    spec = spec_of("grown", sampler="tpe", trials=1)
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude={"name"}, exclude_unset=True)))
    run = [sys.executable, "-m", "hpo", "run", str(file), "--home", str(folder), "--json", "--workers", "1"]
    lines_of([*run, "--trials", "1"], folder)  # so that the study's record is a run's own
    make_study(home, spec, count, digest=read_study(home, "grown").data_digest)
    copy_runs(home, [trial.state for trial in read_study(home, "grown").trials])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    events = lines_of([*run, "--trials", str(count + 11)], folder)[0]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    at = [(event["event"], when) for when, event in events]
    first = next(when for name, when in at if name == "trial_started")
    last = max(when for name, when in at if name == "trial_ended")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return first, at[-1][1] - last, cpu


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--asks", type=int, default=20)
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--skip-run", action="store_true")
    args = parser.parse_args()
    print(machine(), flush=True)
    print(f"\n{'ask + tell, ms of CPU':22}" + "".join(f"{size:>16,}" for size in args.sizes))
    with tempfile.TemporaryDirectory() as place:
        opened: dict[int, tuple[float, float]] = {}
        for search in args.searches:
            row = []
            for size in args.sizes:
                folder = Path(place) / f"{search}-{size}".replace(", ", "-")
                home, spec = Home.find(folder).create(), spec_of("grown", **SEARCHES[search])
                make_study(home, spec, size)
                opening, reading, more, ask = one_more(home, spec, asks=args.asks)
                opened[size] = (opening, reading)
                row.append(f"{f'{1000 * more:.1f} ({1000 * ask:.1f})':>16}")
            print(f"{search:22}{''.join(row)}", flush=True)
        print(f"\n{'s of CPU (wall)':22}" + "".join(f"{size:>16,}" for size in args.sizes))
        for place_of, name in ((0, "open the study"), (1, "read its result")):
            print(f"{name:22}" + "".join(f"{opened[size][place_of]:16.2f}" for size in args.sizes))
        for words in (("status",), ("trials", "grown"), ("trials", "grown", "--top", "20")):
            row = []
            for size in args.sizes:
                folder = Path(place) / f"{args.searches[0]}-{size}".replace(", ", "-")
                row.append("{:9.2f} ({:.2f})".format(*command(*words, home=folder)))
            print(f"{'hpo ' + ' '.join(words):22}" + "".join(f"{cell:>16}" for cell in row), flush=True)
    if args.skip_run:
        return
    print(f"\n{'hpo run, 10 more':22}{'first trial s':>16}{'end s':>10}{'CPU s':>10}")
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as place:
            print("{:<22,}{:16.1f}{:10.1f}{:10.1f}".format(size, *go_on(Path(place), size)), flush=True)


if __name__ == "__main__":
    main()
