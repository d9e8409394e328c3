"""Make a study of thousands of trials in seconds, as if it had been run: written straight into the study storage."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import random
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hpo.home import Home
from hpo.records import Epoch, TrialResult, TrialState, pack_classes
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec

EPOCHS, IMAGES, CLASSES = 10, 1712, 8  # of each trial; images are those of a validation part, as in BloodMNIST
SPACE: Mapping[str, Any] = {
    "model.hidden": {"int": [64, 1024], "log": True},
    "model.dropout": {"float": [0.0, 0.5]},
    "training.batch_size": {"choice": [32, 64, 128]},
    "training.optimizer.name": {"choice": ["sgd", "adam", "adamw"]},
    "training.optimizer.lr": {"float": [1e-4, 1e-2], "log": True},
}
CONDITIONAL: Mapping[str, Any] = {
    **SPACE,
    "training.optimizer.momentum": {"float": [0.0, 0.95], "when": {"training.optimizer.name": "sgd"}},
}
GRID: Mapping[str, Any] = {
    "model.hidden": {"choice": list(range(16, 416, 2))},
    "training.batch_size": {"choice": list(range(8, 408, 4))},
}  # 20,000 cells


def spec_of(
    name: str, *, sampler: str = "tpe", pruner: str = "none", space: Mapping[str, Any] = SPACE, trials: int = 20_000
) -> StudySpec:
    """A study of a perceptron on the digits, whose trials may be what make_study writes."""
    return parse_study(
        {
            "name": name,
            "data": {"name": "digits"},
            "split": {"kind": "holdout"},
            "model": {"kind": "mlp"},
            "training": {"epochs": EPOCHS},
            "keep": {"models": "none"},
            "search": {"sampler": sampler, "pruner": pruner, "trials": trials, "space": dict(space)},
        }
    )


def result_of(
    number: int, parameters: Mapping[str, Any], *, state: TrialState = TrialState.COMPLETE, images: int = IMAGES
) -> TrialResult:
    """A result with everything that a real one has; its value follows from the parameters, but for some noise."""
    chance = random.Random(number)  # noqa: S311
    lag = abs(math.log10(parameters.get("training.optimizer.lr", 1e-3)) + 3)
    best = 0.9 - lag / 10 - parameters.get("model.dropout", 0.2) / 10 + chance.gauss(0, 0.01)
    epochs = []
    for epoch in range(1, (EPOCHS if state is TrialState.COMPLETE else 3) + 1):
        accuracy = best * (1 - 0.5**epoch) + chance.gauss(0, 0.002)
        scores = {
            f"{part}_{name}": value + chance.gauss(0, 0.002)
            for part, names in (
                ("train", ("loss", "accuracy")),
                ("valid", ("loss", "accuracy", "macro_f1", "macro_auc")),
            )
            for name, value in zip(names, (1 - accuracy, accuracy, accuracy, accuracy), strict=False)
        }
        scores["valid_balanced_accuracy"] = accuracy
        epochs.append(Epoch(epoch, scores, 1e-3 / epoch, 0.3 + chance.random() / 100, last=epoch == EPOCHS))
    top = max(epochs, key=lambda epoch: epoch.scores["valid_accuracy"])
    return TrialResult(
        number,
        state,
        top.scores["valid_accuracy"],
        top.number,
        tuple(epochs),
        top.scores,
        seconds=sum(epoch.seconds for epoch in epochs),
        parameter_count=100_000,
        confusion=tuple(tuple(chance.randrange(200) for _ in range(CLASSES)) for _ in range(CLASSES)),
        settings={"device": "cpu", "precision": "float32", "threads": "1"},
        predicted=pack_classes([chance.randrange(CLASSES) for _ in range(images)]),
        ended=1e9 + number,
    )


def make_study(home: Home, spec: StudySpec, count: int, *, images: int = IMAGES, digest: str = "sha256:0") -> None:
    """Give a study without stages so many more trials that have ended, 17 of 20 complete, 2 pruned, 1 failed."""
    from optuna.storages._rdb import models

    from hpo.search.lifecycle import open_study

    study = open_study(home, spec, data_digest=digest)
    try:
        engine: Any = study._storage.database.engine
        tables = {
            name: getattr(models, f"{name}Model").__table__
            for name in ("Trial", "TrialParam", "TrialValue", "TrialUserAttribute", "TrialSystemAttribute")
        }
        tables["Report"] = models.TrialIntermediateValueModel.__table__
        with engine.begin() as connection:
            newest = connection.exec_driver_sql("SELECT COALESCE(MAX(trial_id), 0) FROM trials").scalar()
            known = len(study.result().trials)
            rows = _rows(spec, study._id, first=newest + 1, numbers=range(known, known + count), images=images)
            while part := list(itertools.islice(rows, 500)):
                for name, table in tables.items():
                    if found := [row for trial in part for kind, row in trial if kind == name]:
                        connection.execute(table.insert(), found)
    finally:
        study.close()


def _rows(
    spec: StudySpec, study: int, *, first: int, numbers: range, images: int
) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The rows of each trial, with the names of their tables."""
    from optuna.distributions import distribution_to_json

    from hpo.search.samplers import StageSampler
    from hpo.search.stages import decode, distribution, make_stage
    from hpo.storage.trial_attrs import RESULT, START, TrialAttrs

    stage = make_stage(spec, 0, origins={})
    sampler = StageSampler(stage, list)
    names = {path: distribution_to_json(distribution(part)) for path, part in spec.search.space.items()}
    cells = iter(sampler._cells if spec.search.sampler.name == "grid" else ())
    began = datetime.datetime(2026, 1, 1)
    for number in numbers:
        chance = random.Random(number)  # noqa: S311
        values, trial = dict(next(cells, (None, {}))[1]), first + number - numbers.start
        while active := sampler.active(values):
            path, parameter = active[0]
            values[path] = decode(parameter, _drawn(distribution(parameter), chance))
        state = [TrialState.FAILED, TrialState.PRUNED, TrialState.PRUNED, *[TrialState.COMPLETE] * 17][number % 20]
        result = result_of(number, values, state=state, images=images)
        start = TrialAttrs(
            number, seed=spec.seed_of(number), parameters=values, worker="worker 0", lease="lease-0.lock"
        )
        time = began + datetime.timedelta(seconds=3 * number)
        word = {"failed": "FAIL"}.get(state.value, state.name)
        ended = {"datetime_start": time, "datetime_complete": time + datetime.timedelta(seconds=3)}
        rows = [("Trial", {"trial_id": trial, "number": number, "study_id": study, "state": word, **ended})]
        for path, value in values.items():
            stored = distribution(spec.search.space[path]).to_internal_repr(value)
            rows.append(("TrialParam", {"param_name": path, "param_value": stored, "distribution_json": names[path]}))
        if state is not TrialState.FAILED:
            rows.append(("TrialValue", {"objective": 0, "value": result.value, "value_type": "FINITE"}))
        for key, record in ((START, start.to_json()), (RESULT, result.to_json())):
            rows.append(("TrialUserAttribute", {"key": key, "value_json": json.dumps(record)}))
        rows.append(("TrialSystemAttribute", {"key": "fixed_params", "value_json": "{}"}))
        for epoch in result.epochs:
            told = {"intermediate_value": epoch.scores["valid_accuracy"], "intermediate_value_type": "FINITE"}
            rows.append(("Report", {"step": epoch.number, **told}))
        yield [rows[0], *((kind, {"trial_id": trial, **row}) for kind, row in rows[1:])]


def _drawn(found: Any, chance: random.Random) -> Any:
    """A value of one of Optuna's distributions."""
    if hasattr(found, "choices"):
        return chance.choice(found.choices)
    scale, back = (math.log, math.exp) if found.log else (float, float)
    value = back(chance.uniform(scale(found.low), scale(found.high)))
    return round(value) if isinstance(found.low, int) else min(max(value, found.low), found.high)


def copy_runs(home: Home, states: Sequence[TrialState]) -> None:
    """Give trials after the first, which must have its run in MLflow, a run each: copies of its rows, by these states.

    For the embedded database of a home with one study.
    """
    status = {TrialState.FAILED: "FAILED"}
    with contextlib.closing(sqlite3.connect(home.root / "mlflow.db")) as database, database:
        (original,) = database.execute("SELECT run_uuid FROM tags WHERE key = 'hpo.trial' AND value = '0'").fetchone()
        rows = {}
        for table in ("runs", "tags", "params", "metrics", "latest_metrics"):
            found = database.execute(f"SELECT * FROM {table} WHERE run_uuid = ?", (original,))  # noqa: S608
            rows[table] = [dict(zip([name for name, *_ in found.description], row, strict=True)) for row in found]
        found = database.execute("SELECT * FROM inputs WHERE destination_id = ?", (original,))
        rows["inputs"] = [dict(zip([name for name, *_ in found.description], row, strict=True)) for row in found]
        for number, state in enumerate(states[1:], start=1):
            key = f"{number:032x}"
            changed = {"hpo.trial": str(number), "hpo.state": state.value}
            for table, all_rows in rows.items():
                for row in all_rows:
                    new = {name: key if value == original else value for name, value in row.items()}
                    if table == "runs":
                        new |= {"status": status.get(state, "FINISHED"), "start_time": row["start_time"] + number}
                    elif table == "tags":
                        new["value"] = changed.get(row["key"], row["value"])
                    elif table == "inputs":
                        new["input_uuid"] = key
                    marks = ", ".join("?" * len(new))
                    names = ", ".join(new)
                    database.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(new.values()))  # noqa: S608
