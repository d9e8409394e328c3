"""Eight processes on one embedded store, started in the same second in an empty folder: does anyone see it locked?

    OMP_NUM_THREADS=1 uv run python benchmarks/crowd.py --seconds 120

Five write: two `hpo run` of one study, and one of each of three others. Three read in a loop: `hpo trials` and
`hpo models`.
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
from pathlib import Path
from typing import Any

import yaml

from agreement import Findings, check
from hpo.home import Home
from hpo.records import TrialState
from hpo.storage.reader import read_snapshots
from lives import members

WRITERS = ("first", "first", "second", "third", "fourth")
READERS = (("trials", "first"), ("models",), ("trials", "second", "--json"))


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
        if event["event"] == "trial_ended" and TrialState(event["result"]["state"]).finished:
            self.results[event["result"]["number"]] = (event["result"]["state"], event["result"]["value"])

    @property
    def alive(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    @property
    def phase(self) -> str:
        """Where it is, as far as its lines say."""
        if self.heard[-1] == "start":
            return "opening"
        if self.heard[-1] == "study_ended":
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
        return members(self.process.pid, kind)

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


def write_study(folder: Path, name: str, *, trials: int) -> Path:
    """A study whose trials take a fraction of a second."""
    space = {"model.hidden": {"int": [8, 32]}, "training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True}}
    tree = {
        "data": {"name": "digits"},
        "split": {"kind": "holdout", "share": 0.2, "by": "stratified", "test_share": 0.2},
        "model": {"kind": "mlp", "hidden": 16},
        "training": {"epochs": 3, "precision": "float32"},
        "keep": {"models": "best:1", "figures": "none"},
        "search": {"trials": trials, "sampler": "random", "space": space},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def crowd(folder: Path, *, trials: int, seconds: float | None = None) -> Findings:
    """Let all of them loose until every study has its trials, or for so long once all train; what went wrong."""
    environment = {**os.environ, "HPO_DATA": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    findings, over, reads = Findings(), threading.Event(), 0

    def judge(what: str, code: int, expected: int, said: str) -> None:
        if code != expected or any(word in said for word in ("locked", "Traceback", "tracking")):
            findings.add("runs that ended badly", f"hpo {what}: exit code {code}: {said[-2000:]}")

    def read(*arguments: str) -> None:
        nonlocal reads
        while not over.is_set():
            command = [sys.executable, "-m", "hpo", *arguments]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
            said = done.stdout + done.stderr
            judge(arguments[0], done.returncode, 2 if "has run here" in said else 0, said)
            reads += 1

    studies = {name: write_study(folder, name, trials=trials) for name in WRITERS}
    writers = [Life(studies[name], folder, environment, workers=1) for name in WRITERS]
    readers = [threading.Thread(target=read, args=arguments) for arguments in READERS]
    for reader in readers:
        reader.start()
    if seconds is not None:
        for writer in writers:
            writer.wait_for("epoch_ended", timeout=600)
        time.sleep(seconds)
        for writer in writers:
            writer.process.send_signal(signal.SIGINT)
    for name, writer in zip(WRITERS, writers, strict=True):
        code = writer.join(600)
        judge(f"run {name}", code, 130 if seconds else 0, "\n".join([writer.said(), *writer.troubles]))
    over.set()
    for reader in readers:
        reader.join()
    home = Home.find(folder)
    found = [each.study for each in read_snapshots(home)]
    if sorted(study.title for study in found) != sorted(set(WRITERS)):
        findings.add("runs that ended badly", f"studies {[study.title for study in found]}")
    for study in found:
        check(home, study, {}, findings, budget=None if seconds else trials)
    print(f"{len(writers)} runs of {len(found)} studies, {findings.trials} trials, {reads} reads by {len(readers)}")
    return findings


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hpo-crowd-") as folder:
        findings = crowd(Path(folder), trials=100_000, seconds=options.seconds)
    print(findings.table())
    locked = sum("locked" in sentence for sentence in findings.sentences)
    print(f"{locked} times 'database is locked' in {time.monotonic() - began:.0f} s from start to end")
    for sentence in findings.sentences:
        print(sentence)
    sys.exit(bool(findings.wrong))


if __name__ == "__main__":
    main()
