"""Replay a finished study's learning curves with successive halving from several first rungs.

    hpo run curves.yaml                        # sampler random, pruner none, models none
    python benchmarks/rungs.py curves [--home DIR] [--trials 40] [--seeds 100]

The study has trained every trial to its end. Each replay draws so many of its trials in random order and reports their
epochs to the platform's pruner, one after the other. Its regret is the best value of the whole study less the best that
the replay has seen, in points. Beside it stands a random search without a pruner that spends as many epochs. Trials
that stopped early keep their last value. Nothing is trained.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import numpy as np
import optuna

from hpo.home import Home
from hpo.search.pruners import build_pruner
from hpo.spec.automatic import chosen_pruner
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec
from hpo.storage.reader import read_study


def curves_of(home: Home, name: str) -> tuple[StudySpec, Any]:
    """The study, and the objective (trials, epochs) of its complete trials, more is better."""
    study = read_study(home, name)
    spec = parse_study(study.spec)
    sign = 1.0 if study.direction == "maximize" else -1.0
    found = []
    for trial in study.ranked():
        values = [sign * epoch.scores[spec.search.objective] for epoch in trial.result.epochs]
        found.append(values + values[-1:] * (spec.training.epochs - len(values)))
    return spec, np.array(found)


def replay(curves: Any, pruner: Any, order: Any) -> tuple[int, float, int]:
    """(epochs spent, best value seen, complete trials) of one search."""
    study = optuna.create_study(direction="maximize", pruner=pruner)
    spent, best, complete = 0, -np.inf, 0
    for place in order:
        trial, last = study.ask(), len(curves[place])
        for epoch, value in enumerate(curves[place].tolist(), 1):
            trial.report(value, epoch)
            spent, best = spent + 1, max(best, value)
            if epoch < last and trial.should_prune():
                break
        else:
            complete += 1
        study.tell(trial, best)
    return spent, best, complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--home", help="Where its mlruns is; by default as in hpo.")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--rungs", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    asked = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    spec, curves = curves_of(Home.find(asked.home), asked.study)
    whole, ends = curves.shape[1], curves.max(1)
    draw = np.random.default_rng(0)
    orders = [draw.choice(len(curves), asked.trials, replace=asked.trials > len(curves)) for _ in range(asked.seeds)]
    print(
        f"{asked.study}: {len(curves)} curves of {whole} epochs, {asked.trials} trials a search, {asked.seeds} seeds\n"
    )
    print("| first rung | epochs | complete | regret | random at as many epochs |")
    print("|---|---|---|---|---|")
    for rung in asked.rungs:
        part = spec.search.pruner.model_copy(update={"name": "auto", "min_epochs": rung})
        used = spec.model_copy(update={"search": spec.search.model_copy(update={"pruner": part})})
        if chosen_pruner(used)[0].name == "none":
            raise SystemExit(f"{asked.study}: auto prunes no trial of it: {chosen_pruner(used)[1]}.")
        found = np.array([replay(curves, build_pruner(used), order) for order in orders])
        regrets = 100 * (ends.max() - found[:, 1])
        means = draw.choice(regrets, (10_000, len(regrets))).mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        fewer = [max(1, round(spent / whole)) for spent in found[:, 0]]
        plain = np.mean(
            [100 * (ends.max() - ends[order[:few]].max()) for few, order in zip(fewer, orders, strict=True)]
        )
        share = found[:, 0].mean() / (asked.trials * whole)
        print(
            f"| {rung} | {share:.0%} | {found[:, 2].mean():.1f} | {regrets.mean():.2f} ({low:.2f} to {high:.2f}) "
            f"| {plain:.2f} |"
        )


if __name__ == "__main__":
    main()
