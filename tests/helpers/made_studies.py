"""Studies as records, made by a formula: random and conditional, staged with folds, several objectives."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from hpo.records import Candidate, Epoch, StudyResult, Trial, TrialResult, TrialState

SPACE = {
    "model.kind": {"choice": ["mlp", "cnn", "a_kind_of_network_with_a_very_long_name"]},
    "model.hidden": {"choice": [[512], [256, 128]], "when": {"model.kind": "mlp"}},
    "training.optimizer.lr": {"float": [1e-4, 1.0], "log": True},
    "training.optimizer.weight_decay": {"float": [0.0, 0.1]},
    "training.batch_size": {"int": [16, 512], "log": True},
}
STAGES = [
    {
        "name": "augmentation",
        "space": {"training.flip": {"choice": [True, False]}, "training.weights": {"choice": ["none", "balanced"]}},
    },
    {
        "name": "size",
        "space": {
            "model.hidden": {"choice": [64, 128, 256, 512]},
            "training.optimizer.name": {"choice": ["sgd", "rmsprop", "adam"]},
        },
    },
    {"name": "activation", "space": {"model.activation": {"choice": ["relu", "tanh"]}}},
]


def epochs(value: float, *, count: int = 6, folds: int = 1) -> tuple[Epoch, ...]:
    return tuple(
        Epoch(
            number,
            {
                "train_loss": 2 / number,
                "train_accuracy": value * number / count,
                "valid_loss": 2.2 / number,
                "valid_accuracy": value * (1 - 0.5 / number),
                "valid_macro_f1": value * (1 - 0.6 / number),
            },
            0.1,
            1.0,
            fold=fold,
        )
        for fold in range(folds)
        for number in range(1, count + 1)
    )


def random_study(count: int = 30) -> StudyResult:
    """lr decides, batch_size does nothing; some trials are pruned or failed; a pause lies in the middle."""
    rng = random.Random(0)  # noqa: S311
    trials = []
    for number in range(count):
        parameters = {
            "model.kind": rng.choice(SPACE["model.kind"]["choice"]),
            "training.optimizer.lr": 10 ** rng.uniform(-4, 0),
            "training.optimizer.weight_decay": rng.uniform(0, 0.1),
            "training.batch_size": rng.randint(16, 512),
        }
        if parameters["model.kind"] == "mlp":
            parameters["model.hidden"] = rng.choice(SPACE["model.hidden"]["choice"])
        value = 0.95 - 0.1 * abs(parameters["training.optimizer.lr"] - 0.03) + rng.gauss(0, 0.003)
        state = {4: TrialState.FAILED, 9: TrialState.PRUNED}.get(number % 11, TrialState.COMPLETE)
        failed = state is TrialState.FAILED
        result = TrialResult(
            number,
            state,
            None if failed else value,
            3,
            () if failed else epochs(value),
            {"valid_accuracy": value, "valid_loss": 1 - value},
            parameter_count=10 ** rng.randint(3, 6),
        )
        started = 1.7e9 + 30 * number + (90_000 if number > count // 2 else 0)
        trials.append(
            Trial(Candidate(number, number, parameters, 0), state, result, started, 25.0, f"worker {number % 2}")
        )
    return StudyResult(
        "random", 1, "maximize", "valid_accuracy", tuple(trials), {"search": {"space": SPACE}, "question": "Why?"}
    )


def staged_study() -> StudyResult:
    """A grid in each stage with three folds, minimising the loss; the best of each is carried on."""
    rng = random.Random(1)  # noqa: S311
    trials: list[Trial] = []
    carried: dict[str, object] = {}
    for stage in STAGES:
        first = len(trials)
        for options in itertools.product(*(part["choice"] for part in stage["space"].values())):
            number, value = len(trials), 0.4 + rng.gauss(0, 0.05)
            parameters = {**carried, **dict(zip(stage["space"], options, strict=True))}
            scores = {"valid_loss": value, "valid_loss_std": 0.03, "valid_accuracy": 1 - value}
            folds = tuple({"valid_loss": value + shift, "valid_accuracy": 1 - value} for shift in (-0.03, 0.0, 0.03))
            result = TrialResult(number, TrialState.COMPLETE, value, 3, epochs(1 - value, folds=3), scores, folds=folds)
            candidate = Candidate(number, number, parameters, 0, stage=stage["name"])
            trials.append(Trial(candidate, TrialState.COMPLETE, result, 1.7e9 + 30 * number, 28.0, "worker 0"))
        carried = dict(min(trials[first:], key=lambda trial: trial.value).candidate.parameters)
    return StudyResult("staged", 1, "minimize", "valid_loss", tuple(trials), {"search": {"stages": STAGES}})


def two_objectives() -> StudyResult:
    study = random_study()
    trials = tuple(
        replace(trial, result=replace(trial.result, values=(trial.value, float(trial.result.parameter_count))))
        if trial.state is TrialState.COMPLETE
        else trial
        for trial in study.trials
    )
    aims = (("valid_accuracy", "maximize"), ("parameters", "minimize"))
    return replace(study, name="trade-off", trials=trials, objectives=aims)
