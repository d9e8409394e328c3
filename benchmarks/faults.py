"""Kill studies and their commands at random moments, let them end, and see whether anything was lost, doubled or left.

    OMP_NUM_THREADS=1 uv run python benchmarks/faults.py --kills 1000 --seed 0

Every scenario is one phase of a study of seconds in a copy of a home that has it half or wholly done: its start, its
training, its end, promote, export, import, or a run after a move. SIGKILL hits a worker, the helper that exports
models, the main process, or the whole group; then the same is done again until it ends, and judged by plain Optuna,
plain MLflow and sqlite3. A process with all libraries forks each life, whose own fork server is forked too: a life
costs seconds instead of tens. A seed gives the same scenarios, victims and moments; where in the code a moment falls
depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agreement import Findings, Seen, judge
from lives import Child

TRIALS = 4
TARGETS = ("main", "all", "worker", "helper")
PHASES = ("start", "training", "end", "promote", "export", "import", "move")
MANY = 10  # findings after which it ends
_SUBREAPER = 36  # of prctl: orphans of a life become our children, and are not left to whoever is process 1


@dataclass
class Tally:
    """What was done to how many studies, and what was found wrong."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)  # (target, phase)
    lives: int = 0
    scenarios: int = 0
    findings: Findings = field(default_factory=Findings)

    @property
    def total(self) -> int:
        """The number of kills."""
        return sum(self.kills.values())

    def table(self) -> str:
        """Kills by target and phase, then what was found."""
        lines = [f"{'SIGKILL of':<10}" + "".join(f"{phase:>10}" for phase in PHASES) + f"{'sum':>8}"]
        for kind in TARGETS:
            row = [self.kills[kind, phase] for phase in PHASES]
            lines.append(f"{kind:<10}" + "".join(f"{number:>10}" for number in row) + f"{sum(row):>8}")
        trials = self.findings.trials
        lines += [
            "",
            f"{self.total} kills in {self.lives} lives of {self.scenarios} scenarios, {trials} trials counted",
        ]
        return "\n".join([*lines, self.findings.table()])


def write_study(folder: Path, *, final: bool) -> Path:
    """A study of seconds: final trainings, or a pruner and two models."""
    tree = {
        "data": {"name": "digits"},
        "split": {"kind": "holdout", "share": 0.2, "by": "stratified", "test_share": 0.2},
        "model": {"kind": "mlp", "hidden": 16},
        "training": {"epochs": 3, "precision": "float32", "checkpoint": 1},
        "keep": {"models": "best:1" if final else "best:2", "figures": "none"},
        "search": {
            "trials": TRIALS,
            "sampler": "random",
            "pruner": "none" if final else "median",
            "space": {
                "model.hidden": {"int": [8, 64], "log": True},
                "training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True},
            },
        },
    }
    if final:
        tree["final"] = {"seeds": 2}
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def _run(folder: Path, *, trials: int = TRIALS, workers: int = 1) -> Callable[[Any], None]:
    """The life of an `hpo run`."""

    def job(say: Callable[[dict[str, Any]], None]) -> None:
        from hpo.events import StudyOpened, TrialEnded
        from hpo.execute.run_study import run_study
        from hpo.spec.load import load_study

        def watch(event: object) -> None:
            said: dict[str, Any] = {"event": type(event).__name__}
            if isinstance(event, StudyOpened):
                said["finished"] = event.finished
            if isinstance(event, TrialEnded):
                result = event.result
                said |= {"number": result.number, "state": result.state.value, "value": result.value}
            say(said)

        run_study(load_study(str(folder / "short.yaml")), home=folder, trials=trials, workers=workers, watch=watch)

    return job


def _promote(folder: Path) -> None:
    from hpo.jobs.promote import promote

    promote("short", home=folder)


def _export(folder: Path) -> None:
    from hpo.jobs.transfer import export_study

    export_study("short", home=folder, file=folder / "new.zip")


def _import(folder: Path) -> None:
    from hpo.jobs.transfer import import_study

    import_study(folder / "study.zip", home=folder)


def _tree(*folders: Path) -> dict[str, tuple[int, int, int]]:
    """Every file below: when it was written, its size and its inode."""
    paths = [path for folder in folders for path in [folder, *folder.rglob("*")]]
    return {str(path): ((facts := path.lstat()).st_mtime_ns, facts.st_size, facts.st_ino) for path in paths}


class Torment:
    """A scratch folder with what scenarios begin with: homes without a trial, half done, and done, each twice."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.tally = scratch, Tally()
        self.templates = scratch / "templates"
        self.longest: dict[str, float] = {}  # phase -> seconds, of lives that were not killed
        for final in (False, True):
            for stage, trials in (("start", 0), ("half", TRIALS // 2), ("done", TRIALS)):
                folder = self.templates / f"{stage}{final:d}"
                folder.mkdir(parents=True)
                write_study(folder, final=final)
                if trials:
                    self._last(folder, _run(folder, trials=trials), "end" if stage == "done" else "training")
            _, archive = folder, self.templates / f"study{final:d}.zip"
            self._last(folder, lambda _, folder=folder: _export(folder), "export")
            shutil.move(folder / "new.zip", archive)
        self.templates_before = _tree(self.templates)

    def _last(self, folder: Path, job: Any, phase: str) -> Child:
        """A life that nobody kills."""
        life = Child(job, folder / "log", folder)
        self.tally.lives += 1
        opened = life.began
        if phase in ("start", "training", "end", "move"):
            life.wait_for(lambda event: event == "StudyOpened")
            opened = time.monotonic()
            self.longest["start"] = max(self.longest.get("start", 0.0), opened - life.began)
            life.wait_for(lambda _: life.ended_trials >= TRIALS)
            opened = time.monotonic()
        code = life.join()
        took = time.monotonic() - (life.began if phase == "move" else opened)
        self.longest[phase] = max(self.longest.get(phase, 0.0), took)
        said = (folder / "log").read_text()
        if code or "Traceback" in said or "locked" in said or life.left:
            self._wrong(f"{folder} ({phase}): exit code {code}, processes left {life.left}: {said[-4000:]}")
        return life

    def _wrong(self, sentence: str) -> None:
        self.tally.findings.add("runs that ended badly", sentence)

    def scenario(self, number: int, phase: str, target: str, chance: random.Random) -> None:
        """Some lives of one phase, killed, then one to its end, then the judges."""
        template = {"start": "start", "training": "half", "end": "half", "move": "half"}.get(phase, "done")
        final = chance.random() < 0.5
        folder = self.scratch / f"scenario{number}"
        if phase == "import":
            folder.mkdir()
            shutil.copy(self.templates / f"study{final:d}.zip", folder / "study.zip")
        else:
            shutil.copytree(self.templates / f"{template}{final:d}", folder, symlinks=True)
        seen: Seen = {}
        self.tally.scenarios += 1
        for _ in range(chance.choice([1, 2, 3])):
            if phase == "move":
                folder = folder.rename(f"{folder}m")
            job = self._job(phase, folder, workers=chance.choice([1, 1, 2]))
            life = Child(job, folder / "log", folder)
            self.tally.lives += 1
            for _ in range(1 if target in ("main", "all") else chance.randint(1, 3)):
                if not (hit := self._strike(life, phase, target, chance)):
                    break
                self.tally.kills[hit, phase] += 1
            code = life.join()
            seen |= life.results
            if code not in (0, -signal.SIGKILL) or life.left or life.hung:
                self._wrong(f"{folder} ({phase}): {code}, left {life.left}: {(folder / 'log').read_text()[-4000:]}")
        life = self._last(folder, self._job(phase, folder, workers=1), phase)
        seen |= life.results
        self._judged(folder, phase, seen)

    def _judged(self, folder: Path, phase: str, seen: Seen) -> None:
        wrong = len(self.tally.findings.sentences)
        with multiprocessing.get_context("fork").Pool(1) as pool:  # no database stays open in who forks the lives
            found = pool.apply_async(judge, (folder, phase, seen, TRIALS)).get(300)
        self.tally.findings.merge(found)
        changed = _tree(self.templates).items() ^ self.templates_before.items()
        if changed:
            self.tally.findings.add("files outside touched", f"{folder} ({phase}): {sorted(changed)[:4]}")
        if len(self.tally.findings.sentences) == wrong:
            shutil.rmtree(folder)

    def _job(self, phase: str, folder: Path, *, workers: int) -> Any:
        plain = {"promote": _promote, "export": _export, "import": _import}.get(phase)
        return (lambda _: plain(folder)) if plain else _run(folder, workers=workers)

    def _strike(self, life: Child, phase: str, target: str, chance: random.Random) -> str:
        """Wait for a moment of the phase, and kill."""
        longest = self.longest.get(phase, 2.0)
        if phase == "training":
            for _ in range(chance.randint(1, 5)):
                life.wait_for(lambda event: event in ("TrialStarted", "EpochEnded", "TrialEnded"))
            longest = 0.2
        elif phase == "end":
            life.wait_for(lambda _: life.ended_trials >= TRIALS)
        life.wait_for(lambda _: False, chance.uniform(0, longest))
        return life.kill(target, chance)


@contextlib.contextmanager
def tormentor(cache: Path | None = None) -> Iterator[Torment]:
    """A torment, in this process: it imports all that lives need, once, and adopts their orphans."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory(prefix="hpo-faults-") as scratch, _environment(Path(scratch), cache):
        _import_all(Path(scratch))
        yield Torment(Path(scratch))


@contextlib.contextmanager
def _environment(scratch: Path, cache: Path | None) -> Iterator[None]:
    before = dict(os.environ)
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    os.environ |= {"HPO_DATA": str(cache or scratch / "cache"), "OMP_NUM_THREADS": "1", "HOME": str(scratch)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _import_all(scratch: Path) -> None:
    """Import, and use once, what takes seconds at its first use in a process."""
    import matplotlib.font_manager  # noqa: F401
    import mlflow.pyfunc  # noqa: F401
    import sklearn.datasets
    import sklearn.ensemble  # noqa: F401
    import torch

    import hpo.execute.run_study
    import hpo.execute.workers.main
    import hpo.jobs.promote
    import hpo.jobs.transfer
    import hpo.models
    import hpo.report.figures.space
    import hpo.report.figures.study
    import hpo.search.importance
    import hpo.search.lifecycle
    import hpo.search.results
    import hpo.training.trial  # noqa: F401
    from hpo.tracking.store import load_mlflow

    load_mlflow()
    torch.set_num_threads(1)
    example = (torch.zeros(2, 4),)
    program = torch.export.export(torch.nn.Linear(4, 2).eval(), example, dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, scratch / "first.pt2")
    (scratch / "first.pt2").unlink()


def run(kills: int, *, seed: int, seconds: float = float("inf"), report: bool = True) -> Tally:
    """Scenarios of all phases and targets in turn, until there were so many kills, or seconds have passed."""
    began = time.monotonic()
    with tormentor() as torment:
        tally = torment.tally
        for number in range(10 * kills):
            if tally.total >= kills or time.monotonic() - began > seconds or len(tally.findings.sentences) > MANY:
                break
            phase, target = PHASES[number % len(PHASES)], TARGETS[number // len(PHASES) % len(TARGETS)]
            told = len(tally.findings.sentences)
            chance = random.Random(f"{seed}/{number}")  # noqa: S311 - nothing secret
            torment.scenario(number, phase, target, chance)
            if report:
                wrong = sum(tally.findings.wrong.values())
                print(
                    f"{time.monotonic() - began:6.0f} s: {phase}, {target}: {tally.total} kills, {wrong} wrong",
                    flush=True,
                )
                for sentence in tally.findings.sentences[told:]:
                    print(f"  {sentence}", flush=True)
    return tally


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after that time")
    options = parser.parse_args()
    tally = run(options.kills, seed=options.seed, seconds=options.seconds)
    print(tally.table())
    sys.exit(bool(tally.findings.sentences) or (tally.total < options.kills and math.isinf(options.seconds)))


if __name__ == "__main__":
    main()
