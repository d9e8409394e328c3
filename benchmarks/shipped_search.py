"""Epochs until the search of a shipped study reaches the score of the search that it had before.

    OMP_NUM_THREADS=1 python shipped_search.py bloodmnist-mlp --set data.path=FILE --images 3000 --seeds 5

Both searches train the same candidates' networks on the same part of the images, through the platform's own ask,
report and tell: the earlier one as many trials as the study had, the shipped one until it has trained half as many
epochs. Only what the study file says differs. The target is the mean over seeds of what the earlier one ends with. The
test part is never read.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from curves import arguments, curve, loaded
from hpo.home import Home
from hpo.records import DataCard, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec

# What the study files of version 28a5243 (22 November 2026) had otherwise.
BEFORE: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "bloodmnist-mlp": {
        "search": {
            "sampler": {"name": "tpe", "startup_trials": 12},
            "pruner": {"name": "hyperband", "min_epochs": 2, "reduction_factor": 3},
        },
    },
    "fashionmnist-cnn": {
        "training": {"batch_size": 128, "label_smoothing": 0.0, "optimizer": {"name": "adamw", "lr": 2.0e-3}},
        "search": {
            "sampler": {"name": "tpe", "startup_trials": 4},
            "pruner": {"name": "successive_halving", "min_epochs": 3, "reduction_factor": 2},
            "trials": 6,
            "start": [{"training.optimizer.lr": 4.0e-3, "model.dropout": 0.0}],
        },
    },
}


def earlier(study: str, spec: StudySpec) -> StudySpec:
    """The study as its file was before: no prior was known."""
    plain = spec.model_dump(mode="json", exclude_unset=True)
    for part in plain["search"]["space"].values():
        part.pop("prior", None)
    for part, places in BEFORE[study].items():
        plain[part] |= places
    return parse_study(plain)


def best_so_far(
    spec: StudySpec, card: DataCard, seed: int, part: Mapping[str, int | None], *, epochs: int | None
) -> list[float]:
    """The best score after each epoch of a search; it ends after its trials, or after so many epochs."""
    spec = spec.model_copy(update={"seed": seed})
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        study = open_study(Home.at(folder), spec, data_digest=card.digest)
        try:
            budget = spec.search.trials if epochs is None else 10_000
            while len(found) != epochs and (candidate := study.ask(budget=budget, worker="alone")):
                setup = spec.with_values(candidate.parameters)
                state, best, number = TrialState.FAILED, -np.inf, 0
                for number, value in enumerate(curve(setup, card, spec.search.objective, seed=seed, **part), 1):
                    best = max(best, value)
                    found.append(max([*found[-1:], value]))
                    last = number == setup.training.epochs
                    state = TrialState.COMPLETE if last else state
                    if study.report(candidate.number, number, value) and not last:
                        state = TrialState.PRUNED
                    if state is TrialState.PRUNED or len(found) == epochs:
                        break
                study.tell(TrialResult(candidate.number, state, best, number))
        finally:
            study.close()
    return found


def reached(path: list[float], target: float) -> float:
    """Epochs until the path is as good as the target; inf where it never is."""
    return next((place for place, value in enumerate(path, 1) if value >= target), np.inf)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    asked = parser.parse_args()
    spec, card = loaded(asked.study, asked.places)
    before, part = earlier(asked.study, spec), {"images": asked.images, "valid": asked.valid}
    pairs = []
    for seed in range(asked.first, asked.first + asked.seeds):
        old = best_so_far(before, card, seed, part, epochs=None)
        new = best_so_far(spec, card, seed, part, epochs=len(old) // 2)
        pairs.append((old, new))
        print(json.dumps({"seed": seed, "before": old, "now": new}), flush=True)
        print(f"seed {seed}: {len(old)} epochs, {old[-1]:.4f} before; half, {new[-1]:.4f} now", file=sys.stderr)
    ends, spent = np.array([(old[-1], new[-1]) for old, new in pairs]), fmean(len(old) for old, _ in pairs)
    print(f"{asked.study}, n = {len(pairs)}: {ends[:, 0].mean():.4f} after {spent:.0f} epochs before,")
    print(f"  {ends[:, 1].mean():.4f} after half of them now; now less before {np.diff(ends)[:, 0].round(4)}")
    target = ends[:, 0].mean()
    print(f"  epochs until {target:.4f}: {[[reached(path, target) for path in pair] for pair in pairs]} (before, now)")


if __name__ == "__main__":
    main()
