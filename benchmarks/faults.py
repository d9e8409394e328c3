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

from hpo.home import Home
from hpo.records import FINAL, StudyResult, TrialState
from hpo.run.engines import process_context
from hpo.search.storage import read_study
from hpo.track import runs
from hpo.track.store import connect

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
FINISHED = {"complete", "pruned", "failed"}


@dataclass
class Tally:
    """What happened and what was found wrong; every wrong is also a sentence."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, phase)
    starts: int = 0
    studies: int = 0
    trials: int = 0
    given_up: int = 0  # candidates whose process died three times: failed, as documented
    wrong: Counter[str] = field(default_factory=Counter)
    sentences: list[str] = field(default_factory=list)

    def add(self, kind: str, sentence: str) -> None:
        """One more finding of its kind."""
        self.wrong[kind] += 1
        self.sentences.append(f"{kind}: {sentence}")

    def merge(self, other: Tally) -> None:
        """Take in what another tally counted."""
        self.kills += other.kills
        self.starts += other.starts
        self.studies += other.studies
        self.trials += other.trials
        self.given_up += other.given_up
        self.wrong += other.wrong
        self.sentences += other.sentences

    def table(self) -> str:
        """Kills by kind and phase, then what was lost."""
        phases = ("opening", "asking", "training", "closing")
        lines = [f"{'SIGKILL of':<12}" + "".join(f"{phase:>10}" for phase in phases) + f"{'sum':>8}"]
        for kind in KINDS:
            row = [self.kills[kind, phase] for phase in phases]
            lines.append(f"{kind:<12}" + "".join(f"{number:>10}" for number in row) + f"{sum(row):>8}")
        total = sum(self.kills.values())
        lines += [
            "",
            f"{total} kills in {self.starts} runs of {self.studies} studies, {self.trials} trials counted",
            f"{self.given_up} candidates failed because their process died three times (as documented)",
        ]
        lines += [f"{self.wrong[kind]} {kind}" for kind in WRONGS]
        return "\n".join(lines)


WRONGS = (
    "finished trials lost or changed",
    "trials counted twice, or not at all",
    "runs left RUNNING",
    "trials on which MLflow and Optuna disagree",
    "epochs missing or doubled",
    "models or versions too many or too few",
    "files left over",
    "runs that ended badly",
)


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
        if event["event"] == "study_opened":
            self.ended = event["finished"]
        if event["event"] == "trial_ended" and event["result"]["state"] in FINISHED:
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
        "training": {"epochs": chance.choice([3, 6, 12]), "precision": "float32"},
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
    seen: dict[int, tuple[str, Any]] = {}
    code = -signal.SIGKILL
    while code != 0:
        life = Life(study, folder, environment, workers=chance.choice([1, 2]))
        tally.starts += 1
        _kill_in(life, chance, tally, left=kills - sum(tally.kills.values()))
        try:
            code = life.join(600)
        except subprocess.TimeoutExpired:
            os.killpg(life.process.pid, signal.SIGKILL)
            tally.add("runs that ended badly", f"{folder}: hangs: {life.said()}")
            return tally
        said = life.said()
        seen |= life.results
        with contextlib.suppress(Exception):
            seen |= _finished(read_study(Home.find(folder), "short"))
        if code not in (0, -signal.SIGKILL) or "Traceback" in said or "locked" in said:
            tally.add("runs that ended badly", f"{folder}: exit code {code}: {said}")
            break
    check(folder, seen, tally)
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


def _finished(study: StudyResult) -> dict[int, tuple[str, Any]]:
    return {trial.number: (trial.state.value, trial.value) for trial in study.trials if trial.state.finished}


def check(folder: Path, seen: dict[int, tuple[str, Any]], tally: Tally) -> None:
    """Compare storage, tracking and disk of a study that has ended with each other and with what was seen before."""
    home = Home.find(folder)
    study = read_study(home, "short")
    now = _finished(study)
    for number, then in seen.items():
        if now.get(number) != then:
            tally.add("finished trials lost or changed", f"{folder}: trial {number}: {then} -> {now.get(number)}")
    _check_budget(folder, study, tally)
    _check_tracking(folder, home, study, tally)
    _check_disk(home, tally)


def _check_budget(folder: Path, study: StudyResult, tally: Tally) -> None:
    kind = "trials counted twice, or not at all"
    counted = sorted(trial.candidate.ordinal for trial in study.trials if _counts(trial) and not _is_final(trial))
    tally.trials += len(counted)
    if counted != list(range(TRIALS)) or len(study.counted) != TRIALS:
        tally.add(kind, f"{folder}: ordinals {counted}, {len(study.counted)} counted")
    finals = sorted(trial.candidate.ordinal for trial in study.trials if _counts(trial) and _is_final(trial))
    if finals != list(range(study.spec["final"]["seeds"] if study.spec["final"] else 0)):
        tally.add(kind, f"{folder}: finals {finals}")
    for trial in study.trials:
        if not trial.state.finished and trial.state is not TrialState.STOPPED:
            tally.add("runs left RUNNING", f"{folder}: Optuna's trial {trial.number} is {trial.state}")
        if trial.state is TrialState.FAILED:
            reason = trial.result.reason if trial.result else ""
            tally.given_up += "its process died each time" in reason
            if "its process died each time" not in reason:
                tally.add(kind, f"{folder}: trial {trial.number} failed: {reason}")


def _counts(trial: Any) -> bool:
    return bool(trial.state.finished)


def _is_final(trial: Any) -> bool:
    return bool(trial.candidate.stage == FINAL)


def _check_tracking(folder: Path, home: Home, study: StudyResult, tally: Tally) -> None:
    client = connect(home)
    (experiment,) = client.search_experiments(filter_string="name = 'short'")
    every = list(client.search_runs([experiment.experiment_id], max_results=1000))
    for run in every:
        if run.info.status == "RUNNING":
            tally.add("runs left RUNNING", f"{folder}: MLflow's {run.info.run_name}")
    disagree = "trials on which MLflow and Optuna disagree"
    parents = [run for run in every if run.data.tags.get(runs.KIND) == "study"]
    if len(parents) != 1:
        tally.add(disagree, f"{folder}: {len(parents)} parent runs")
    mine: dict[int, list[Any]] = {}
    for run in every:
        if runs.TRIAL in run.data.tags:
            mine.setdefault(int(run.data.tags[runs.TRIAL]), []).append(run)
    if set(mine) - {trial.number for trial in study.trials}:
        tally.add(disagree, f"{folder}: runs of trials that are none: {sorted(mine)}")
    for trial in study.trials:
        found = mine.get(trial.number, [])
        where = f"{folder}: trial {trial.number} ({trial.state})"
        if len(found) != 1:
            tally.add(disagree, f"{where} has {len(found)} runs")
            continue
        run, result = found[0], trial.result
        facts = (run.info.status, run.data.tags.get(runs.STATE), run.data.metrics.get("objective"))
        expected = (runs.STATUS[trial.state], trial.state.value, trial.value)
        if facts != expected:
            tally.add(disagree, f"{where}: {facts} is not {expected}")
        if "training.epochs" not in run.data.params or not run.inputs.dataset_inputs:
            tally.add(disagree, f"{where}: its parameters or its data set are missing")
        wanted: dict[str, dict[int, float]] = {}
        for epoch in result.epochs if result else ():
            for name, value in epoch.scores.items():
                wanted.setdefault(name, {})[epoch.number] = value
        for name in wanted or ["train_loss"]:
            history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
            if sorted(history) != sorted(wanted.get(name, {}).items()):
                steps = sorted(step for step, _ in history)
                tally.add("epochs missing or doubled", f"{where}: {name}: {steps} of {sorted(wanted.get(name, {}))}")
        for name in ("objective", "duration_seconds"):
            if len(client.get_metric_history(run.info.run_id, name)) > 1:
                tally.add("epochs missing or doubled", f"{where}: {name} is written twice")
    _check_models(folder, home, study, experiment.experiment_id, {n: found[0] for n, found in mine.items()}, tally)


def _check_models(folder: Path, home: Home, study: StudyResult, experiment: str, mine: Any, tally: Tally) -> None:
    kind, client = "models or versions too many or too few", connect(home)
    most = int(study.spec["keep"]["models"].removeprefix("best:"))
    kept = {trial.number for trial in [*study.ranked()[:most], *study.ranked(FINAL)]}
    tagged = {number: run.data.tags[runs.MODEL] for number, run in mine.items() if runs.MODEL in run.data.tags}
    if set(tagged) != kept:
        tally.add(kind, f"{folder}: models of trials {sorted(tagged)}, not {sorted(kept)}")
    logged = client.search_logged_models([experiment])
    if sorted(f"models:/{model.model_id}" for model in logged) != sorted(tagged.values()):
        tally.add(kind, f"{folder}: {len(logged)} logged models, {len(tagged)} kept")
    on_disk = sorted(path.name for path in home.artifacts.glob("short/models/*"))
    if on_disk != sorted(uri.removeprefix("models:/") for uri in tagged.values()):
        tally.add(kind, f"{folder}: on disk {on_disk}, kept {sorted(tagged.values())}")
    for model in logged:
        if str(model.status) not in ("READY", "LoggedModelStatus.READY"):
            tally.add(kind, f"{folder}: {model.name} is {model.status}")
    versions = client.search_model_versions("name = 'short'")
    best = study.ranked(FINAL) if study.spec["final"] else study.ranked()
    aliases = client.get_registered_model("short").aliases if versions else {}
    if len(versions) != bool(best) or (best and aliases != {"challenger": versions[0].version}):
        tally.add(kind, f"{folder}: versions {[version.version for version in versions]}, aliases {aliases}")


def _check_disk(home: Home, tally: Tally) -> None:
    left = [*home.work.glob("short*/**/*"), *home.locks.glob("lease-*")]
    left += [*home.root.rglob(".write-*"), *home.root.rglob("*.part"), *home.root.rglob("*.tmp")]
    for path in left:
        tally.add("files left over", f"{path}")


def run(kills: int, *, seed: int, stores: int, each: int = 16, report: bool = True) -> Tally:
    """Studies with `each` kills, `stores` of them at a time, until there were so many kills in all."""
    tally, began, lock = Tally(), time.monotonic(), threading.Lock()
    process_context()
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
                        total, wrong = sum(tally.kills.values()), sum(tally.wrong.values())
                        print(f"{time.monotonic() - began:6.0f} s: {total} kills, {wrong} wrong", flush=True)
                        for sentence in mine.sentences:
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
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
