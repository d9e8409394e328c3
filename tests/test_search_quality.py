"""The benchmark of searches: its clock, its budget, and that it drives the platform's own ask, report and tell."""

from __future__ import annotations

import numpy as np
import pytest

import curves
import shipped_search
from search_quality import simulate
from search_quality_systems import SYSTEMS, Job, System
from search_quality_tasks import Range, recorded, scale_of


class Bowl:
    """Best at x = 0.3; epoch e reaches 1 - 1 / e of a training's value and takes a second."""

    name, maximize, epochs = "bowl", True, 9
    space = {"x": Range(0.0, 1.0), "width": Range(16, 256, log=True, whole=True)}

    def curves(self, configs):
        ends = np.array([1 - (config["x"] - 0.3) ** 2 for config in configs])
        epochs = np.arange(1, self.epochs + 1)
        return ends[:, None] * (1 - 0.5 / epochs), np.tile(epochs.astype(float), (len(configs), 1))


class Halves(System):
    """Asks for the first half of a training, then for the rest of the same one."""

    def start(self):
        self.asked = 0

    def ask(self):
        self.asked += 1
        return Job("a", {"x": 0.3, "width": 16}, 5 if self.asked == 1 else 9) if self.asked < 3 else None


def test_a_training_that_is_resumed_costs_only_its_further_epochs():
    task = Bowl()
    path = simulate(Halves(task, seed=0, workers=1), task, workers=1, seconds=9.0)
    assert [when for when, _ in path] == list(range(1, 10))
    assert path[-1][1] == pytest.approx(1 - 0.5 / 9)


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_spend_the_budget_and_no_more(workers):
    task = Bowl()
    system = SYSTEMS["random"](task, seed=0, workers=workers)
    path = simulate(system, task, workers=workers, seconds=18.0)
    assert path[-1][0] <= 18.0
    assert system.ask().key == 3 * workers + 1  # two whole trainings a worker, and one that the end cut off


def test_the_platform_searches_through_its_own_study():
    task = Bowl()
    full, worst, top = scale_of(task)
    system = SYSTEMS["hpo"](task, seed=0, workers=2)
    try:
        path = simulate(system, task, workers=2, seconds=8 * full)
        states = {trial.state.value for trial in system._study.result().trials}
    finally:
        system.close()
    assert full == 9.0
    assert "pruned" in states
    assert path[-1][1] > (worst + top) / 2


@pytest.mark.slow
def test_curves_of_a_study_become_a_task(digits_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    file, part = tmp_path / "own.json.gz", {"images": 100, "valid": None}
    words = ["digits-mlp", "--set", "training.epochs=2", "--images", "100", "--candidates", "3", "--out", str(file)]
    monkeypatch.setattr("sys.argv", ["curves.py", *words])
    curves.main()
    task = recorded(file)
    assert list(task.space) == [f"model_{name}" for name in ("hidden", "dropout")] + [
        f"training_optimizer_{name}" for name in ("lr", "weight_decay")
    ]
    spec, card = curves.loaded("digits-mlp", ["training.epochs=2"])
    config = curves.candidates_of(spec, 3)[1]
    near = {path.replace(".", "_"): value * 1.01 for path, value in config.items()}
    values, seconds = task.curves([near])
    assert (task.epochs, seconds.tolist()) == (2, [[1.0, 2.0]])
    trained = curves.curve(spec.with_values(config), card, "valid_accuracy", seed=0, **part)
    assert values[0].tolist() == list(trained)


@pytest.mark.slow
def test_a_search_is_followed_epoch_by_epoch_to_its_last_trial_or_for_so_many_epochs(digits_cache, monkeypatch):
    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    places = ["training.epochs=9", "search.trials=4", "search.sampler=auto", "search.pruner=auto"]
    spec, card = curves.loaded("digits-mlp", places)
    part = {"images": 100, "valid": None}
    whole = shipped_search.best_so_far(spec, card, 0, part, epochs=None)
    assert whole == sorted(whole)
    assert 9 < len(whole) < 4 * 9  # the first trial is whole, and not all of the others
    assert shipped_search.best_so_far(spec, card, 0, part, epochs=len(whole) + 9)[: len(whole)] == whole
    for epochs in (9, 10):  # at the end of a trial and within one
        assert shipped_search.best_so_far(spec, card, 0, part, epochs=epochs) == whole[:epochs]
    assert shipped_search.reached(whole, whole[-1]) <= len(whole)
    assert shipped_search.reached(whole, 1.1) == np.inf
