"""Many workers on one PostgreSQL: speed-up, what ask and tell take, what is lost by kills, and the limit.

A worker is what `hpo worker` is to the study storage: a supervisor with a handle of its own on the study, which asks,
waits as long as a trial takes, and tells; there is no training, and no MLflow. The server is started for the benchmark,
on this machine, with PostgreSQL's defaults but for the number of connections.

speedup: trials that sleep, one worker and several, seconds from the first ask to the last tell.
steps: what ask and tell take while a study of thousands of trials grows.
kills: workers on a full grid, one of them killed at random moments and replaced by one with a folder of its own.
crowd: more and more workers, each a thread of a few processes, trials that sleep longer; how many end in a second, and
what ask and tell take then. With --pool through pgbouncer in transaction mode.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from against_peer import machine
from hpo.database import server_address
from hpo.home import Home
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec
from hpo.storage.reader import read_study
from postgres import PASSWORD, Server, server

FORK = multiprocessing.get_context("fork")
SPACE = {
    "training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True},
    "model.hidden": {"int": [16, 512], "log": True},
    "model.dropout": {"float": [0.0, 0.5]},
    "training.optimizer.name": {"choice": ["sgd", "adam", "adamw"]},
    "training.batch_size": {"choice": [32, 64, 128]},
}
GRID = {
    "model.hidden": {"choice": [16, 32, 64, 128, 256]},
    "training.optimizer.name": {"choice": ["sgd", "adam", "adamw"]},
    "training.batch_size": {"choice": [16, 32, 64, 128]},
}


def spec_of(name: str, *, sampler: str, space: Mapping[str, Any], trials: int) -> StudySpec:
    """The study; only its search matters here."""
    search = {"sampler": sampler, "pruner": "none", "trials": trials, "space": space}
    return parse_study(
        {
            "name": name,
            "data": {"name": "digits"},
            "model": {"kind": "mlp"},
            "training": {"epochs": 5},
            "search": search,
        }
    )


def home_of(folder: Path, url: str) -> Home:
    """A machine's own folder, with the shared storage."""
    return replace(Home.at(folder), storage_url=server_address(url))


def work(home: Home, spec: StudySpec, *, sleep: float, reports: int, times: list[tuple[float, ...]]) -> None:
    """One worker, until the budget is spent; times gets (when asked, seconds of ask, of reports, of tell) a trial."""
    study = open_study(home, spec, data_digest="d", join=spec.name)
    budget, pause, reap_at = study.budget, 0.2, time.monotonic() + 15
    while True:
        if time.monotonic() > reap_at:
            study.reap()
            reap_at = time.monotonic() + min(15 * max(1, study.crowd), 120)
        asked = time.time()
        candidate = study.ask(budget=budget, worker="w")
        ask = time.time() - asked
        if candidate is None:
            if not study.blocked:
                break
            time.sleep(pause)
            pause = min(2 * pause, 5.0)
            continue
        pause = 0.2
        time.sleep(sleep)
        value = candidate.parameters.get("model.dropout", 0.0)
        began = time.time()
        for epoch in range(1, reports + 1):
            study.report(candidate.number, epoch, value)
        reported = time.time()
        study.tell(TrialResult(candidate.number, TrialState.COMPLETE, value, max(1, reports), ended=time.time()))
        times.append((asked, ask, reported - began, time.time() - reported))
    study.close()


def _process(home: Home, spec: StudySpec, out: Path, threads: int, sleep: float, reports: int) -> None:
    times: list[tuple[float, ...]] = []
    crew = [
        threading.Thread(target=work, args=(home, spec), kwargs={"sleep": sleep, "reports": reports, "times": times})
        for _ in range(threads)
    ]
    for each in crew:
        each.start()
    for each in crew:
        each.join()
    out.write_text(json.dumps(times), encoding="ascii")
    os._exit(0)


def run(folder: Path, url: str, spec: StudySpec, *, workers: int, sleep: float, reports: int = 0, processes: int = 0):
    """Have so many workers run the study; (times of all trials, seconds from the first ask to the last tell)."""
    open_study(home_of(folder / "first", url), spec, data_digest="d", budget=spec.search.trials).close()
    processes = processes or workers
    crew, outs = [], []
    for place in range(processes):
        threads = workers // processes + (place < workers % processes)
        outs.append(folder / f"times-{place}.json")
        home = home_of(folder / f"machine-{place}", url)
        crew.append(FORK.Process(target=_process, args=(home, spec, outs[-1], threads, sleep, reports)))
    for each in crew:
        each.start()
    for each in crew:
        each.join()
    times = [tuple(row) for out in outs for row in json.loads(out.read_text(encoding="ascii"))]
    seconds = max(sum(row) + sleep for row in times) - min(row[0] for row in times)
    return times, seconds


def _steps(times: list[tuple[float, ...]]) -> str:
    both = [1000 * (ask + tell) for _, ask, _, tell in times]
    ends = quantiles(both, n=100)
    return f"ask + tell {median(both):6.1f} ms (p95 {ends[94]:.0f}, p99 {ends[98]:.0f})"


def speedup(args: argparse.Namespace, started: Server, folder: Path) -> None:
    """One worker against several, in one run."""
    print(f"\nspeedup: {args.trials} trials of {args.sleep} s, {args.sampler}")
    seconds = {}
    for workers in (1, args.workers):
        count = args.trials if workers > 1 else max(10, args.trials // args.workers)
        spec = spec_of(f"speed-{workers}", sampler=args.sampler, space=SPACE, trials=count)
        times, taken = run(folder / str(workers), started.url("bench"), spec, workers=workers, sleep=args.sleep)
        seconds[workers] = taken / count
        print(f"  {workers:3d} workers: {count} trials in {taken:.1f} s, {_steps(times)}")
    print(f"  speed-up {seconds[1] / seconds[args.workers]:.2f}")


def steps(args: argparse.Namespace, started: Server, folder: Path) -> None:
    """What ask and tell take while a study grows."""
    print(f"\nsteps: {args.workers} workers, {args.steps} trials of {args.step_sleep} s, no reports, {args.sampler}")
    spec = spec_of("steps", sampler=args.sampler, space=SPACE, trials=args.steps)
    times, taken = run(folder / "steps", started.url("bench"), spec, workers=args.workers, sleep=args.step_sleep)
    for part in range(4):
        piece = sorted(times)[part * len(times) // 4 : (part + 1) * len(times) // 4]
        print(f"  trials {part * len(times) // 4:5d} to {(part + 1) * len(times) // 4:5d}: {_steps(piece)}")
    print(f"  all: {_steps(times)}, {len(times) / taken:.1f} trials a second")


def kills(args: argparse.Namespace, started: Server, folder: Path) -> None:
    """A grid by workers that are killed at random moments."""
    spec = spec_of("kills", sampler="grid", space=GRID, trials=1000)
    cells = spec.search.space.size(spec.fixed())
    url, chance = started.url("bench"), random.Random(args.seed)  # noqa: S311
    open_study(home_of(folder / "first", url), spec, data_digest="d", budget=1000).close()
    count, began, turn = 0, time.time(), 0

    def begin() -> Any:
        nonlocal turn
        turn += 1
        home = home_of(folder / f"machine-{turn}", url)  # a killed machine does not come back
        made = FORK.Process(target=_process, args=(home, spec, folder / f"kill-{turn}.json", 1, args.sleep, 2))
        made.start()
        return made

    crew = [begin() for _ in range(args.workers)]
    while any(each.is_alive() for each in crew):
        time.sleep(chance.uniform(0.1, 2 * args.sleep))
        if count < args.kills:
            place = chance.randrange(len(crew))
            if crew[place].is_alive():
                os.kill(crew[place].pid, signal.SIGKILL)
                crew[place].join()
                crew[place] = begin()
                count += 1
    trials = read_study(home_of(folder / "first", url), "kills").trials
    done = Counter(str(trial.candidate.parameters) for trial in trials if trial.state.finished)
    failed = sum(trial.state is TrialState.FAILED for trial in trials)
    odd = sum(not trial.state.finished and trial.state is not TrialState.STOPPED for trial in trials)
    print(
        f"\nkills: {count} of {args.workers} workers, {time.time() - began:.0f} s, grid of {cells}: "
        f"{len(done)} cells done, {sum(done.values()) - len(done)} twice, {cells - len(done)} lost, {odd} left open, "
        f"{failed} failed after three deaths"
    )


def crowd(args: argparse.Namespace, started: Server, folder: Path) -> None:
    """More and more workers."""
    print(f"\ncrowd: trials of {args.crowd_sleep} s, {args.sampler}, {args.processes} processes of threads")
    for workers in args.crowd:
        count = 3 * workers
        spec = spec_of(f"crowd-{workers}-{args.pool}", sampler=args.sampler, space=SPACE, trials=count)
        with _pool(started) if args.pool else contextlib.nullcontext(started.url("bench")) as url:
            times, taken = run(
                folder / f"crowd-{workers}",
                url,
                spec,
                workers=workers,
                sleep=args.crowd_sleep,
                processes=args.processes,
            )
        trials = read_study(home_of(folder / "first", started.url("bench")), spec.name).trials
        finished = sum(trial.state.finished for trial in trials)
        ideal = count * args.crowd_sleep / workers
        print(
            f"  {workers:5d} workers: {finished} of {count} trials in {taken:.1f} s, {count / taken:5.1f} a second, "
            f"{_steps(times)}, {ideal / taken:.0%} of the time waited for trials",
            flush=True,
        )


@contextlib.contextmanager
def _pool(started: Server) -> Iterator[str]:
    """A pgbouncer before the server, in transaction mode, with 40 connections to it."""
    place = Path(tempfile.mkdtemp(prefix="pgbouncer-"))
    port = started.port + 1
    (place / "users.txt").write_text(f'"hpo" "{PASSWORD}"\n', encoding="ascii")
    (place / "pgbouncer.ini").write_text(
        f"[databases]\n* = host=127.0.0.1 port={started.port}\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={port}\n"
        f"unix_socket_dir=\nauth_type=scram-sha-256\nauth_file={place}/users.txt\npool_mode=transaction\n"
        "default_pool_size=40\nmax_client_conn=5000\nignore_startup_parameters=options,extra_float_digits\n"
        f"logfile={place}/log\n",
        encoding="ascii",
    )
    options: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses to run as root
        for path in (place, *place.iterdir()):
            shutil.chown(path, "postgres")
        options["user"] = "postgres"
    bouncer = subprocess.Popen(["pgbouncer", "-q", str(place / "pgbouncer.ini")], cwd="/", **options)
    time.sleep(1)
    try:
        yield started.url("bench").replace(str(started.port), str(port))
    finally:
        bouncer.terminate()
        bouncer.wait()
        shutil.rmtree(place, ignore_errors=True)


PARTS = {"speedup": speedup, "steps": steps, "kills": kills, "crowd": crowd}


def main() -> None:
    """Parse, start a server, run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[*PARTS])
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--sleep", type=float, default=1.0, help="seconds of a trial (speedup, kills)")
    parser.add_argument("--trials", type=int, default=200, help="of the speed-up")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--step-sleep", type=float, default=0.5)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--crowd", type=int, nargs="*", default=[10, 50, 100, 200])
    parser.add_argument("--crowd-sleep", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--pool", action="store_true", help="through pgbouncer")
    args = parser.parse_args()
    print(machine())
    folder = Path(tempfile.mkdtemp())
    try:
        with server({"max_connections": "1500"}) as started:
            started.make("bench")
            for part in args.parts:
                PARTS[part](args, started, folder / part)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
