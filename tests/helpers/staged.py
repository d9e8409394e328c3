"""A staged search, and a formula whose best candidate each stage comes nearer to."""

from __future__ import annotations

import math

RATE = {"training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True}}
SIZES = {"model.hidden": {"choice": [8, 16, 32, 64]}}
DROPS = {"model.dropout": {"float": [0, 0.4], "step": 0.2}, "training.optimizer.name": {"choice": ["sgd", "adam"]}}
STAGES = [
    {"name": "neurons", "space": SIZES, "carry": 2},
    {"name": "rate", "space": RATE, "sampler": {"name": "tpe", "startup_trials": 3}, "trials": 6, "carry": 2},
    {"name": "drops", "space": DROPS},
    {"name": "joint", "refine": 0.5, "trials": 4},
]


def worth(parameters):
    """Best at 32 neurons, lr 0.01, dropout 0.2 and adam; each matters less than the one before."""
    lr = math.log10(parameters.get("training.optimizer.lr", 1e-3)) + 2
    size = math.log2(parameters["model.hidden"]) - 5
    drop = parameters.get("model.dropout", 0.0) - 0.2
    return 1 - size**2 / 10 - lr**2 / 20 - drop**2 / 2 - 0.01 * (parameters.get("training.optimizer.name") != "adam")
