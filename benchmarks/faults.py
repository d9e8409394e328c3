"""Kill running studies at random moments, let them end, and see whether anything was lost, doubled or left behind.

    OMP_NUM_THREADS=1 uv run python benchmarks/faults.py --kills 200 --seed 0

Every study is short (digits, small networks), its stores are real, and its processes are those of `hpo run`. SIGKILL
hits a worker, the helper that exports models, the main process, or the whole process group. A seed gives the same
studies, victims and moments; where in the code a moment falls depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agreement import Findings, Seen, check, finished
from hpo.errors import HpoError
from hpo.home import Home
from hpo.records import TrialState
from hpo.storage.optuna_storage import read_study

TRIALS = 10
KINDS = ("worker", "helper", "main", "all")
# When main or all of a run is killed: after which line of `hpo run --json`, and at most how many seconds later.
MOMENTS = (
    ("start", 5.0),
    ("start", 15.0),
    ("study_opened", 0.5),
    ("trial_started", 0.3),
    ("epoch_ended", 0.3),
    ("trial_ended", 0.5),
    ("trial_ended", 1.5),
    ("last trial", 3.0),
    ("last trial", 8.0),
)


@dataclass
class Tally:
    """What was done to how many studies, and what was found wrong."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, phase)
    starts: int = 0
    studies: int = 0
    findings: Findings = field(default_factory=Findings)

    def merge(self, other: Tally) -> None:
        """Take in what another tally counted."""
        self.kills += other.kills
        self.starts += other.starts
        self.studies += other.studies
        self.findings.merge(other.findings)

    def table(self) -> str:
        """Kills by kind and phase, then what was lost."""
        phases = ("opening", "asking", "training", "closing")
        lines = [f"{'SIGKILL of':<12}" + "".join(f"{phase:>10}" for phase in phases) + f"{'sum':>8}"]
        for kind in KINDS:
            row = [self.kills[kind, phase] for phase in phases]
            lines.append(f"{kind:<12}" + "".join(f"{number:>10}" for number in row) + f"{sum(row):>8}")
        total = sum(self.kills.values())
        trials = self.findings.trials
        lines += ["", f"{total} kills in {self.starts} runs of {self.studies} studies, {trials} trials counted"]
        return "\n".join([*lines, self.findings.table()])


class Life:
    """One `hpo run`, what it says, and the processes it has."""

    def __init__(self, study: Path, home: Path, environment: dict[str, str], *, workers: int) -> None:
        command = [sys.executable, "-m", "hpo", "run", str(study), "--home", str(home), "--json"]
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read at the end of the life
        self.process = subprocess.Popen(
            [*command, "--workers", str(workers)],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment,
            cwd=home,
            start_new_session=True,
        )
        self.heard = ["start"]
        self.troubles: list[str] = []
        self.ended = 0
        self.results: dict[int, tuple[str, Any]] = {}
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError), self._news:  # a kill may tear the last line
                self._hear(json.loads(line))
                self._news.notify_all()
        with self._news:
            self.heard.append("end")
            self._news.notify_all()

    def _hear(self, event: dict[str, Any]) -> None:
        if event["event"] != "notice":
            self.heard.append(event["event"])
        elif event["text"].startswith("tracking"):
            self.troubles.append(event["text"])
        if event["event"] == "study_opened":
            self.ended = event["finished"]
        if event["event"] == "trial_ended" and TrialState(event["result"]["state"]).finished:
            self.results[event["result"]["number"]] = (event["result"]["state"], event["result"]["value"])
            self.ended += 1

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def phase(self) -> str:
        """Where it is, as far as its lines say."""
        if self.heard[-1] == "start":
            return "opening"
        if self.ended >= TRIALS or self.heard[-1] == "study_ended":
            return "closing"
        return "asking" if self.heard[-1] in ("study_opened", "trial_ended") else "training"

    def wait_for(self, moment: str, *, timeout: float = 120.0) -> bool:
        """Until the next line of this kind, or the last trial's; False if the run ended."""
        known = len(self.heard)

        def come() -> bool:
            return moment in ("start", *self.heard[known:]) or self.phase == "closing" or self.heard[-1] == "end"

        with self._news:
            self._news.wait_for(come, timeout)
            return self.heard[-1] != "end"

    def pids(self, kind: str) -> list[int]:
        """The processes that are the main one, its workers or its helper, which is nicer by 5."""
        if kind in ("main", "all"):
            return [self.process.pid]
        mine = [pid for pid in _descendants(self.process.pid) if _is_forked(pid)]
        nice = os.getpriority(os.PRIO_PROCESS, self.process.pid)
        found = []
        for pid in mine:
            with contextlib.suppress(ProcessLookupError):
                if (os.getpriority(os.PRIO_PROCESS, pid) > nice) == (kind == "helper"):
                    found.append(pid)
        return found

    def kill(self, kind: str, chance: random.Random) -> bool:
        """SIGKILL; False where there is nobody of that kind."""
        if not self.alive:
            return False
        with contextlib.suppress(ProcessLookupError):
            if kind == "all":
                os.killpg(self.process.pid, signal.SIGKILL)
                return True
            victims = self.pids(kind)
            if victims:
                os.kill(chance.choice(victims), signal.SIGKILL)
                return True
        return False

    def join(self, timeout: float | None = None) -> int:
        """Wait for its end, and for that of its children; its exit code."""
        code = self.process.wait(timeout)
        self._reader.join(30)
        return code

    def said(self) -> str:
        """Standard error."""
        self.errors.seek(0)
        return self.errors.read()


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *_descendants(child)]
    return found


def _is_forked(pid: int) -> bool:
    """A child of the fork server: its command is the server's, and its parent is too."""
    with contextlib.suppress(OSError):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return all(b"forkserver" in Path(f"/proc/{each}/cmdline").read_bytes() for each in (pid, parent))
    return False


def write_study(folder: Path, chance: random.Random) -> Path:
    """A study of seconds; one in three has final trainings, half of them prune."""
    tree = {
        "data": {"name": "digits"},
        "split": {"kind": "holdout", "share": 0.2, "by": "stratified", "test_share": 0.2},
        "model": {"kind": "mlp", "hidden": 16},
        "training": {
            "epochs": chance.choice([3, 6, 12]),
            "precision": "float32",
            "checkpoint": chance.choice([None, 1, 2]),
        },
        "keep": {"models": f"best:{chance.choice([1, 2])}", "figures": chance.choice(["none", "best:1"])},
        "search": {
            "trials": TRIALS,
            "sampler": chance.choice(["tpe", "random"]),
            "pruner": chance.choice(["none", "median"]),
            "space": {
                "model.hidden": {"int": [8, 64], "log": True},
                "training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True},
            },
        },
    }
    if chance.random() < 1 / 3:
        tree["final"] = {"seeds": 2}
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def torment(folder: Path, *, seed: str, kills: int, cache: Path) -> Tally:
    """One study in an empty folder: so many kills or until it is done, then a run to the end, then the checks."""
    chance, tally = random.Random(seed), Tally(studies=1)  # noqa: S311 - nothing secret
    folder.mkdir(parents=True)
    study = write_study(folder, chance)
    environment = {**os.environ, "HPO_DATA": str(cache), "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    seen: Seen = {}
    code = -signal.SIGKILL
    while code != 0:
        life = Life(study, folder, environment, workers=chance.choice([1, 2]))
        tally.starts += 1
        _kill_in(life, chance, tally, left=kills - sum(tally.kills.values()))
        try:
            code = life.join(600)
        except subprocess.TimeoutExpired:
            os.killpg(life.process.pid, signal.SIGKILL)
            tally.findings.add("runs that ended badly", f"{folder}: hangs: {life.said()}")
            return tally
        said = life.said()
        seen |= life.results
        with contextlib.suppress(Exception):
            seen |= finished(read_study(Home.find(folder), "short"))
        if code not in (0, -signal.SIGKILL) or "Traceback" in said or "locked" in said:
            tally.findings.add("runs that ended badly", f"{folder}: exit code {code}: {said}")
            break
    home = Home.find(folder)
    for text in life.troubles:
        tally.findings.add("runs that ended badly", f"{folder}: {text}")
    try:
        check(home, read_study(home, "short"), seen, tally.findings, budget=TRIALS)
    except HpoError as error:
        tally.findings.add("runs that ended badly", f"{folder}: {error}")
    return tally


def _kill_in(life: Life, chance: random.Random, tally: Tally, *, left: int) -> None:
    """Some workers or the helper along the way, then main or all of it, `left` in all at most."""
    moment, longest = chance.choice(MOMENTS)
    small = 0 if moment == "start" else min(left - 1, chance.choice([1, 2, 4, 6]))
    for turn in range(small):
        if not life.wait_for(chance.choice(["epoch_ended", "trial_ended"]) if turn else "study_opened"):
            return
        time.sleep(chance.uniform(0.0, 0.3))
        kind, phase = chance.choice(["worker"] * 5 + ["helper"]), life.phase
        tally.kills[kind, phase] += life.kill(kind, chance)
    if left > 0 and life.wait_for(moment):
        time.sleep(chance.uniform(0, longest))
        kind, phase = chance.choice(["main", "all"]), life.phase
        tally.kills[kind, phase] += life.kill(kind, chance)


def run(kills: int, *, seed: int, stores: int, each: int = 16, report: bool = True) -> Tally:
    """Studies with `each` kills, `stores` of them at a time, until there were so many kills in all."""
    tally, began, lock = Tally(), time.monotonic(), threading.Lock()
    with tempfile.TemporaryDirectory(prefix="hpo-faults-") as scratch, ThreadPoolExecutor(stores) as pool:
        wanted = iter(range(10**6))

        def worker() -> None:
            while True:
                with lock:
                    left = kills - sum(tally.kills.values())
                    if left <= 0:
                        return
                    index = next(wanted)
                folder = Path(scratch) / f"study{index}"
                own = Path(scratch) / ("cache" if index % 4 else f"cache{index}")  # some prepare their data, too
                mine = torment(folder, seed=f"{seed}/{index}", kills=min(each, left), cache=own)
                with lock:
                    tally.merge(mine)
                    if report:
                        total, wrong = sum(tally.kills.values()), sum(tally.findings.wrong.values())
                        print(f"{time.monotonic() - began:6.0f} s: {total} kills, {wrong} wrong", flush=True)
                        for sentence in mine.findings.sentences:
                            print(f"  {sentence}", flush=True)

        for job in [pool.submit(worker) for _ in range(stores)]:
            job.result()
    return tally


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stores", type=int, default=2, help="studies at a time")
    options = parser.parse_args()
    tally = run(options.kills, seed=options.seed, stores=options.stores)
    print(tally.table())
    sys.exit(bool(tally.findings.wrong))


if __name__ == "__main__":
    main()
