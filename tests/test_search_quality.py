"""The benchmark of searches: its clock, its budget, and that it drives the platform's own ask, report and tell."""

from __future__ import annotations

import numpy as np
import pytest

from search_quality import simulate
from search_quality_systems import SYSTEMS, Job, System
from search_quality_tasks import Range, scale_of


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
