"""See whether storage, tracking and disk of a study that has ended agree, and what was seen before is still there."""

from __future__ import annotations

import contextlib
import sqlite3
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.home import Home
from hpo.records import FINAL, StudyResult, TrialState
from hpo.tracking import runs
from hpo.tracking.run_metrics import metric_name
from hpo.tracking.store import connect

Seen = dict[int, tuple[str, Any]]  # trial number -> (state, value)

WRONGS = (
    "finished trials lost or changed",
    "trials counted twice, or not at all",
    "runs left RUNNING",
    "trials on which MLflow and Optuna disagree",
    "epochs missing or doubled",
    "models or versions too many or too few",
    "files left over",
    "files outside touched",
    "runs that ended badly",
)


@dataclass
class Findings:
    """What was found wrong, counted by kind, each in a sentence; trials is how many counted against a budget."""

    wrong: Counter[str] = field(default_factory=Counter)
    sentences: list[str] = field(default_factory=list)
    trials: int = 0
    given_up: int = 0  # candidates whose process died three times: failed, as documented

    def add(self, kind: str, sentence: str) -> None:
        """One more finding of its kind."""
        self.wrong[kind] += 1
        self.sentences.append(f"{kind}: {sentence}")

    def merge(self, other: Findings) -> None:
        """Take in what another found."""
        self.wrong += other.wrong
        self.sentences += other.sentences
        self.trials += other.trials
        self.given_up += other.given_up

    def table(self) -> str:
        """One line for each kind, zeros too."""
        given_up = f"{self.given_up} candidates failed because their process died three times (as documented)"
        return "\n".join([given_up, *(f"{self.wrong[kind]} {kind}" for kind in WRONGS)])


def finished(study: StudyResult) -> dict[int, tuple[str, Any]]:
    return {trial.number: (trial.state.value, trial.value) for trial in study.trials if trial.state.finished}


def _load_all(home: Home) -> int:
    """Load every registered version, and the model of every alias, with MLflow alone; how many there are."""
    import mlflow
    import numpy as np

    mlflow.set_tracking_uri(home.tracking_uri)
    client = mlflow.MlflowClient()
    named = [f"models:/{one.name}/{one.version}" for one in client.search_model_versions()]
    named += [f"models:/{one.name}@{alias}" for one in client.search_registered_models() for alias in one.aliases]
    for uri in named:
        mlflow.pyfunc.load_model(uri).predict(np.zeros((1, 8, 8, 1), np.uint8))
    return len(named)


def judge(folder: Path, phase: str, seen: Seen, budget: int) -> Findings:
    """Look at a home with the study `short` after its last life: plain sqlite3, Optuna and MLflow, then check."""
    import optuna

    from hpo.storage.reader import read_study

    home, findings = Home.at(folder), Findings()
    for name in ("optuna.db", "mlflow.db"):
        with contextlib.closing(sqlite3.connect(home.root / name)) as database:
            answer = database.execute("PRAGMA integrity_check").fetchone()[0]
        if answer != "ok":
            findings.add("runs that ended badly", f"{folder}: {name}: {answer}")
    states = Counter(one.state.name for one in optuna.load_study(study_name="short", storage=home.storage_url).trials)
    if states["RUNNING"] or states["WAITING"] or states["COMPLETE"] + states["PRUNED"] + states["FAIL"] < budget:
        findings.add("runs left RUNNING", f"{folder}: plain Optuna: {dict(states)}")
    try:
        if not _load_all(home):
            findings.add("models or versions too many or too few", f"{folder}: no version")
        check(home, read_study(home, "short"), seen, findings, budget=budget)
        if phase == "promote":
            from hpo.tracking.champions import champions
            from hpo.tracking.registry import resolve

            version = resolve(home, "short@champion")
            if "test_accuracy" not in version.scores or champions(home, "short")[-1].version != version.version:
                findings.add("models or versions too many or too few", f"{folder}: champion {version}")
        if phase == "export":
            with zipfile.ZipFile(folder / "new.zip") as archive:
                assert archive.testzip() is None
    except Exception as error:  # noqa: BLE001 - whatever cannot be read is a finding
        findings.add("runs that ended badly", f"{folder}: {type(error).__name__}: {error}")
    return findings


def check(home: Home, study: StudyResult, seen: Seen, findings: Findings, *, budget: int | None) -> None:
    """Look at one study; budget None: it was stopped before its end."""
    folder = f"{home.root.parent} {study.title}"
    now = finished(study)
    for number, then in seen.items():
        if now.get(number) != then:
            findings.add("finished trials lost or changed", f"{folder}: trial {number}: {then} -> {now.get(number)}")
    _check_budget(folder, study, findings, budget=budget)
    _check_tracking(folder, home, study, findings, ended=budget is not None)
    _check_disk(home, study, findings)


def _check_budget(folder: str, study: StudyResult, findings: Findings, *, budget: int | None) -> None:
    kind = "trials counted twice, or not at all"
    counted = sorted(trial.candidate.ordinal for trial in study.trials if _counts(trial) and not _is_final(trial))
    findings.trials += len(counted)
    twice = len(counted) != len(set(counted))
    if twice or (budget is not None and (counted != list(range(budget)) or len(study.counted) != budget)):
        findings.add(kind, f"{folder}: ordinals {counted}, {len(study.counted)} counted")
    finals = sorted(trial.candidate.ordinal for trial in study.trials if _counts(trial) and _is_final(trial))
    if finals != list(range(study.spec["final"]["seeds"] if study.spec["final"] else 0)):
        findings.add(kind, f"{folder}: finals {finals}")
    for trial in study.trials:
        if trial.state is TrialState.RUNNING or (trial.state is TrialState.WAITING and budget is not None):
            findings.add("runs left RUNNING", f"{folder}: Optuna's trial {trial.number} is {trial.state}")
        if trial.state is TrialState.FAILED:
            reason = trial.result.reason if trial.result else ""
            findings.given_up += "its process died each time" in reason
            if "its process died each time" not in reason:
                findings.add(kind, f"{folder}: trial {trial.number} failed: {reason}")


def _counts(trial: Any) -> bool:
    return bool(trial.state.finished)


def _is_final(trial: Any) -> bool:
    return bool(trial.candidate.stage == FINAL)


def _check_tracking(folder: str, home: Home, study: StudyResult, findings: Findings, *, ended: bool) -> None:
    client = connect(home)
    (experiment,) = client.search_experiments(filter_string=f"name = '{study.name}'")
    every = list(client.search_runs([experiment.experiment_id], max_results=1000))
    for run in every:
        if run.info.status == "RUNNING":
            findings.add("runs left RUNNING", f"{folder}: MLflow's {run.info.run_name}")
    disagree = "trials on which MLflow and Optuna disagree"
    parents = [run for run in every if run.data.tags.get(runs.KIND) == "study"]
    if len(parents) != 1:
        findings.add(disagree, f"{folder}: {len(parents)} parent runs")
    mine: dict[int, list[Any]] = {}
    for run in every:
        if runs.TRIAL in run.data.tags:
            mine.setdefault(int(run.data.tags[runs.TRIAL]), []).append(run)
    if set(mine) - {trial.number for trial in study.trials}:
        findings.add(disagree, f"{folder}: runs of trials that are none: {sorted(mine)}")
    for trial in study.trials:
        if trial.state is TrialState.WAITING:
            continue
        found = mine.get(trial.number, [])
        where = f"{folder}: trial {trial.number} ({trial.state})"
        if len(found) != 1:
            findings.add(disagree, f"{where} has {len(found)} runs")
            continue
        run, result = found[0], trial.result
        facts = (run.info.status, run.data.tags.get(runs.STATE), run.data.metrics.get("objective"))
        expected = (runs.STATUS[trial.state], trial.state.value, trial.value)
        if facts != expected:
            findings.add(disagree, f"{where}: {facts} is not {expected}")
        if "seed" not in run.data.params or not run.inputs.dataset_inputs:
            findings.add(disagree, f"{where}: its parameters or its data set are missing")
        wanted: dict[str, dict[int, float]] = {}
        for epoch in result.epochs if result else ():
            for name, value in epoch.scores.items():
                wanted.setdefault(metric_name(name), {})[epoch.number] = value
        for name in wanted or ["train/loss"]:
            history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
            if sorted(history) != sorted(wanted.get(name, {}).items()):
                steps = sorted(step for step, _ in history)
                findings.add("epochs missing or doubled", f"{where}: {name}: {steps} of {sorted(wanted.get(name, {}))}")
        for name in ("objective", "system/training_seconds"):
            if len(client.get_metric_history(run.info.run_id, name)) > 1:
                findings.add("epochs missing or doubled", f"{where}: {name} is written twice")
    firsts = {number: found[0] for number, found in mine.items()}
    _check_models(folder, home, study, experiment.experiment_id, firsts, findings, ended=ended)


def _check_models(
    folder: str, home: Home, study: StudyResult, experiment: str, mine: Any, findings: Findings, *, ended: bool
) -> None:
    """A study that was stopped before its end has no winner yet, so nothing of it is registered."""
    kind, client = "models or versions too many or too few", connect(home)
    policy = study.spec["keep"]["models"]
    most = 0 if policy == "none" else int(policy.removeprefix("best:"))
    kept = {trial.number for trial in [*study.ranked()[:most], *study.ranked(FINAL)]}
    tagged = {number: run.data.tags[runs.MODEL] for number, run in mine.items() if runs.MODEL in run.data.tags}
    if set(tagged) != kept:
        findings.add(kind, f"{folder}: models of trials {sorted(tagged)}, not {sorted(kept)}")
    logged = client.search_logged_models([experiment])
    if sorted(f"models:/{model.model_id}" for model in logged) != sorted(tagged.values()):
        findings.add(kind, f"{folder}: {len(logged)} logged models, {len(tagged)} kept")
    on_disk = sorted(path.name for path in home.artifacts.glob(f"{study.name}/models/*"))
    if on_disk != sorted(uri.removeprefix("models:/") for uri in tagged.values()):
        findings.add(kind, f"{folder}: on disk {on_disk}, kept {sorted(tagged.values())}")
    for model in logged:
        if str(model.status) not in ("READY", "LoggedModelStatus.READY"):
            findings.add(kind, f"{folder}: {model.name} is {model.status}")
    versions = client.search_model_versions(f"name = '{study.name}'")
    best = ended and most and bool(study.ranked(FINAL) if study.spec["final"] else study.ranked())
    aliases = client.get_registered_model(study.name).aliases if versions else {}
    if len(versions) != bool(best) or (
        best and aliases.get("challenger", aliases.get("champion")) != versions[0].version
    ):
        findings.add(kind, f"{folder}: versions {[version.version for version in versions]}, aliases {aliases}")


def _check_disk(home: Home, study: StudyResult, findings: Findings) -> None:
    left = [*home.work.glob(f"{study.title}/**/*"), *home.locks.glob("lease-*")]
    left += [*home.root.rglob(".write-*"), *home.root.rglob("*.part"), *home.root.rglob("*.tmp")]
    for path in left:
        findings.add("files left over", f"{path}")
