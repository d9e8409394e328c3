"""Which parameters matter: two methods, told apart from noise."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from hpo.records import Candidate, StudyResult, Trial, TrialResult, TrialState
from hpo.search.importance import importances

SPACE = {
    "model.kind": {"choice": [[8], [16], "mlp"]},
    "training.optimizer.lr": {"float": [1e-4, 1.0], "log": True},
    "training.batch_size": {"int": [1, 100]},
    "model.depth": {"int": [1, 3], "when": {"model.kind": "mlp"}},
}


def _study(count: int, *, worth, direction: str = "maximize", stages: bool = False) -> StudyResult:
    rng = random.Random(0)  # noqa: S311
    trials = []
    for number in range(count):
        values = {
            "model.kind": rng.choice(SPACE["model.kind"]["choice"]),
            "training.optimizer.lr": 10 ** rng.uniform(-4, 0),
            "training.batch_size": rng.randint(1, 100),
        }
        if values["model.kind"] == "mlp":
            values["model.depth"] = 2
        result = TrialResult(number, TrialState.COMPLETE, worth(values) + rng.gauss(0, 0.001))
        candidate = Candidate(number, number, values, 0, stage="wide" if stages else None)
        trials.append(Trial(candidate, TrialState.COMPLETE, result))
    search = (
        {"stages": [{"name": "wide", "space": SPACE}, {"name": "close", "space": {}}]} if stages else {"space": SPACE}
    )
    return StudyResult("s", 1, direction, "valid_accuracy", tuple(trials), {"search": search})


def _kind(values):
    return 0.2 * (values["model.kind"] == [16])


def _lr(values):
    return values["training.optimizer.lr"]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_both_methods_find_the_range_that_decides(direction):
    for shares in importances(_study(60, worth=_lr, direction=direction), fanova=True)[""].values():
        assert max(shares, key=shares.get) == "training.optimizer.lr"
        assert sum(shares.values()) == pytest.approx(1)


def test_a_list_option_that_decides_is_found_by_fanova():
    shares = list(importances(_study(60, worth=_kind), fanova=True)[""].values())[-1]
    assert max(shares, key=shares.get) == "model.kind"


def test_parameters_that_some_trials_lack_are_left_out():
    assert all("model.depth" not in shares for shares in importances(_study(40, worth=_lr))[""].values())


def test_few_trials_say_nothing():
    assert importances(_study(5, worth=_lr)) == {}


def test_stages_are_asked_one_by_one():
    assert list(importances(_study(20, worth=_lr, stages=True))) == ["wide"]


def test_the_same_study_has_the_same_importances():
    study = _study(30, worth=_lr)
    assert importances(study) == importances(study)


def test_scikit_learn_is_imported_for_fanova_alone():
    script = """
import sys
from test_importance import _lr, _study, importances
study = _study(60, worth=_lr)
first = importances(study)
assert "sklearn" not in sys.modules
import sklearn
both = importances(study, fanova=True)[""]
assert len(both) == 2 and list(first[""].values())[0] == list(both.values())[0]
assert importances(study) == first
"""
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, check=True)
