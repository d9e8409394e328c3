"""Kill studies and their commands at random moments, let them end, and see whether anything was lost, doubled or left.

    OMP_NUM_THREADS=1 uv run python benchmarks/faults.py --kills 1000 --seed 0

Every scenario is one phase of a study of seconds in a copy of a home that has it half or wholly done: its start, its
training, its end, promote, export, import, or a run after a move. SIGKILL hits a worker, the helper that exports
models, the main process, or the whole group; then the same is done again until it ends, and judged by plain Optuna,
plain MLflow and sqlite3. A process with all libraries forks each life, whose own fork server is forked too: a life
costs seconds instead of tens. A seed gives the same scenarios, victims and moments; where in the code a moment falls
depends on the machine. Lives, judges and that process itself, should they hang, are ended with the stacks of their
processes printed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from agreement import Findings, Seen, judge
from lives import LONGEST, Child, Job

TRIALS = 4
TARGETS = ("main", "all", "worker", "helper")
PHASES = ("start", "training", "end", "promote", "export", "import", "move")
MANY = 10  # findings after which it ends


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


def _run(folder: Path, *, trials: int = TRIALS, workers: int = 1) -> Job:
    """The life of an `hpo run`."""

    def job(say: Any) -> None:
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


class Ended(Exception):  # noqa: N818 - no error
    """No time is left, or too much was found."""


class Torment:
    """A scratch folder with what scenarios begin with: homes without a trial, half done, and done; what was found."""

    def __init__(
        self, scratch: Path, *, say: Any = lambda _: None, longest: float = LONGEST, seconds: float = math.inf
    ) -> None:
        self.scratch, self.tally, self._told = scratch, Tally(), 0
        self._say, self._longest, self._until = say, longest, time.monotonic() + seconds
        self.templates, self._before = scratch / "templates", _tree()
        self.longest: dict[str, float] = {}  # phase -> seconds, of lives that were not killed

    def _template(self, stage: str, *, final: bool) -> Path:
        """The home that scenarios copy, or take the archive of; made when it is first asked for."""
        folder, found = self.templates / f"{stage}{final:d}", len(self.tally.findings.sentences)
        if folder.exists():
            return folder
        if stage == "archive":
            shutil.copytree(self._template("done", final=final), folder, symlinks=True)
            self._last(folder, lambda _: _export(folder), "export")
        else:
            folder.mkdir(parents=True)
            write_study(folder, final=final)
        if stage == "half":
            self._last(folder, _run(folder, trials=TRIALS // 2), "training")
        if stage == "done":
            self._last(folder, _run(folder), "end")
        if len(self.tally.findings.sentences) > found:
            raise Ended  # nothing can begin with this
        self._before |= _tree(folder)
        return folder

    def tell(self) -> None:
        """Print what was found since the last call."""
        for sentence in self.tally.findings.sentences[self._told :]:
            print(f"  {sentence}", flush=True)
        self._told = len(self.tally.findings.sentences)

    def _begin(self, folder: Path, job: Job, log: str = "log") -> Child:
        self.tell()
        if time.monotonic() > self._until or len(self.tally.findings.sentences) > MANY:
            raise Ended
        self._say({"event": "life"})
        return Child(job, folder / log, folder, longest=self._longest)

    def _last(self, folder: Path, job: Job, phase: str) -> Child:
        """A life that nobody kills."""
        life = self._begin(folder, job)
        self.tally.lives += 1
        opened = life.began
        if phase in ("start", "training", "end", "move"):
            life.wait_for(lambda event: event == "StudyOpened")
            opened = time.monotonic()
            self.longest["start"] = max(self.longest.get("start", 0.0), opened - life.began)
            life.wait_for(lambda _: life.ended_trials >= TRIALS)
            opened = time.monotonic()
        self._join(life, folder, phase)
        took = time.monotonic() - (life.began if phase == "move" else opened)
        self.longest[phase] = max(self.longest.get(phase, 0.0), took)
        said = (folder / "log").read_text()
        if "Traceback" in said or "locked" in said:
            self._wrong(f"{folder} ({phase}): {said[-4000:]}")
        return life

    def _join(self, life: Child, folder: Path, what: str, *codes: int) -> None:
        """It is to end with 0, or one of these exit codes, and to leave no process."""
        code = life.join()
        if life.hung or life.left or code not in (0, *codes):
            said = life.log.read_text() if life.log else ""
            said = said[said.find("It hangs, after ") :] if life.hung else said[-4000:]
            self._wrong(f"{folder} ({what}): exit code {code}, processes left {life.left}: {said}")

    def _wrong(self, sentence: str) -> None:
        self.tally.findings.add("runs that ended badly", sentence)

    def scenario(self, number: int, phase: str, target: str, chance: random.Random) -> None:
        """Some lives of one phase, killed, then one to its end, then the judges."""
        stage = {"start": "start", "training": "half", "end": "half", "move": "half", "import": "archive"}
        template = self._template(stage.get(phase, "done"), final=chance.random() < 0.5)
        folder = self.scratch / f"scenario{number}"
        if phase == "import":
            folder.mkdir()
            shutil.copy(template / "new.zip", folder / "study.zip")
        else:
            shutil.copytree(template, folder, symlinks=True)
        seen: Seen = {}
        for _ in range(chance.choice([1, 2, 3])):
            if phase == "move":
                folder = folder.rename(f"{folder}m")
            life = self._begin(folder, self._job(phase, folder, workers=chance.choice([1, 1, 2])))
            self.tally.lives += 1
            for _ in range(1 if target in ("main", "all") else chance.randint(1, 3)):
                if not (hit := self._strike(life, phase, target, chance)):
                    break
                self.tally.kills[hit, phase] += 1
            self._join(life, folder, phase, -signal.SIGKILL)
            seen |= life.results
        life = self._last(folder, self._job(phase, folder, workers=1), phase)
        seen |= life.results
        found = len(self.tally.findings.sentences)
        self.judged(folder, phase, seen)
        changed = _tree(*self.templates.iterdir()).items() ^ self._before.items()
        if changed:
            self.tally.findings.add("files outside touched", f"{folder} ({phase}): {sorted(changed)[:4]}")
        if len(self.tally.findings.sentences) == found:
            shutil.rmtree(folder)
        self.tally.scenarios += 1

    def judged(self, folder: Path, phase: str, seen: Seen) -> None:
        """Judge in a process of its own: no database stays open in the one that forks the lives."""

        def job(say: Any) -> None:
            found = judge(folder, phase, seen, TRIALS)
            # asdict would make another Counter of its items.
            say({"event": "judged", "found": asdict(found) | {"wrong": dict(found.wrong)}})

        judging = self._begin(folder, job, "judge.log")
        self._join(judging, folder, f"judge of {phase}")
        if judging.said:
            found = judging.said["found"]
            self.tally.findings.merge(Findings(**found | {"wrong": Counter(found["wrong"])}))

    def _job(self, phase: str, folder: Path, *, workers: int) -> Job:
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


def _clean_environment(scratch: Path) -> None:
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        os.environ.pop(name, None)
    os.environ |= {"HPO_DATA": str(scratch / "cache"), "OMP_NUM_THREADS": "1", "HOME": str(scratch)}


def _import_all(scratch: Path) -> None:
    """Import, and use once, what takes seconds at its first use in a process."""
    from hpo.tracking.store import load_mlflow

    load_mlflow()  # before MLflow is imported: without telemetry, whose thread would be there when this process forks
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

    torch.set_num_threads(1)
    example = (torch.zeros(2, 4),)
    program = torch.export.export(torch.nn.Linear(4, 2).eval(), example, dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, scratch / "first.pt2")
    (scratch / "first.pt2").unlink()


def run(torment: Torment, kills: int, *, seed: int) -> None:
    """Scenarios of all phases and targets in turn, until there were so many kills, or the torment has Ended."""
    began, tally = time.monotonic(), torment.tally
    for number in range(10 * kills):
        if tally.total >= kills:
            break
        phase, target = PHASES[number % len(PHASES)], TARGETS[number // len(PHASES) % len(TARGETS)]
        chance = random.Random(f"{seed}/{number}")  # noqa: S311 - nothing secret
        torment.scenario(number, phase, target, chance)
        wrong = sum(tally.findings.wrong.values())
        print(f"{time.monotonic() - began:6.0f} s: {phase}, {target}: {tally.total} kills, {wrong} wrong", flush=True)


def watched(job: Job, scratch: Path, *, longest: float) -> int:
    """The exit code of a job that says something at least every so many seconds; of one that does not, all is killed.

    Before, it prints the processes and the stacks of their threads.
    """
    life = Child(job, None, scratch, longest=longest)
    while life.wait_for(lambda _: True):
        life.until = time.monotonic() + longest
    return life.join()


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after that time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hpo-faults-") as scratch:

        def job(say: Any) -> int:
            _clean_environment(Path(scratch))
            torment = Torment(Path(scratch), say=say, seconds=options.seconds)
            tally = torment.tally
            with contextlib.suppress(Ended):
                _import_all(Path(scratch))
                run(torment, options.kills, seed=options.seed)
            torment.tell()
            print(tally.table())
            short = tally.total < options.kills and math.isinf(options.seconds)
            return bool(tally.findings.sentences) or short or not tally.scenarios

        sys.exit(watched(job, Path(scratch), longest=LONGEST + 100))


if __name__ == "__main__":
    main()
