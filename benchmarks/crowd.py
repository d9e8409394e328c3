"""Eight processes on one embedded store, started in the same second in an empty folder: does anyone see it locked?

    OMP_NUM_THREADS=1 uv run python benchmarks/crowd.py --seconds 120

Five write: two `hpo run` of one study, and one of each of three others. Three read in a loop: `hpo trials` and
`hpo models`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import yaml

from agreement import Findings, check
from hpo.home import Home
from hpo.search.storage import list_studies

WRITERS = ("first", "first", "second", "third", "fourth")
READERS = (("trials", "first"), ("models",), ("trials", "second", "--json"))


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
    """Let all of them loose until every study has its trials, or for so long; what went wrong."""
    environment = {**os.environ, "HPO_DATA": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    findings, over = Findings(), threading.Event()
    options = ["--workers", "1", *(["--timeout", f"{seconds:.0f}s"] if seconds else [])]

    def hpo(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "hpo", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
        said = done.stdout + done.stderr
        if "locked" in said or "Traceback" in said:
            findings.add("runs that ended badly", f"hpo {arguments[0]}: {said[-2000:]}")
        return done.returncode, said

    def write(study: Path) -> None:
        code, said = hpo("run", str(study), *options)
        if code != 0 or "tracking" in said:
            findings.add("runs that ended badly", f"hpo run {study.stem}: exit code {code}: {said[-2000:]}")

    def read(*arguments: str) -> None:
        while not over.is_set():
            code, said = hpo(*arguments)
            if code != 0 and "has run here" not in said:
                findings.add("runs that ended badly", f"hpo {arguments[0]}: exit code {code}: {said[-2000:]}")
            reads.append(arguments[0])

    reads: list[str] = []
    studies = {name: write_study(folder, name, trials=trials) for name in WRITERS}
    writers = [threading.Thread(target=write, args=(studies[name],)) for name in WRITERS]
    readers = [threading.Thread(target=read, args=arguments) for arguments in READERS]
    for thread in (*writers, *readers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    for thread in readers:
        thread.join()
    home = Home.find(folder)
    found = list_studies(home)
    if sorted(study.title for study in found) != sorted(set(WRITERS)):
        findings.add("runs that ended badly", f"studies {[study.title for study in found]}")
    for study in found:
        check(home, study, {}, findings, budget=None if seconds else trials)
    print(
        f"{len(writers)} runs of {len(found)} studies, {findings.trials} trials, {len(reads)} reads by {len(readers)}"
    )
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
    print(f"{locked} times 'database is locked' in {time.monotonic() - began:.0f} s")
    for sentence in findings.sentences:
        print(sentence)
    sys.exit(bool(findings.wrong))


if __name__ == "__main__":
    main()
