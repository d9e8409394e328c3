"""The importance of each parameter for the objective, by one or two methods with different blind spots."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from hpo.records import StudyResult, Trial
from hpo.search.stages import CARRIED, distribution, encode
from hpo.spec.space import Space

_FEWEST = 8  # trials; fewer say nothing about importance
_TREES = 32  # Optuna's 64 take twice the time and change the second decimal


def importances(study: StudyResult, *, fanova: bool = False, seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """Stage ("" without stages) -> method -> path -> share in [0, 1]; the shares of a method add up to 1.

    PED-ANOVA (Watanabe et al. 2023) compares the best tenth of the trials with the others; it can overlook a parameter
    with few options. fANOVA (Hutter et al. 2014), where asked for, explains the variance over all complete trials with
    scikit-learn, whose import takes seconds. Parameters that some trials lack are left out, and so are stages
    with fewer than eight complete trials or two such parameters.
    """
    search = study.spec.get("search") or {}
    stages = [(stage["name"], stage.get("space") or {}) for stage in search.get("stages") or ()]
    everything = {path: part for _, space in stages for path, part in space.items()}
    stage_shares = {}
    for name, space in [*stages] or [(None, search.get("space") or {})]:
        parts = Space.model_validate(space or everything)
        if shares := _shares(study.ranked(name), parts, direction=study.direction, fanova=fanova, seed=seed):
            stage_shares[name or ""] = shares
    return stage_shares


def _shares(
    trials: list[Trial], space: Space, *, direction: str, fanova: bool, seed: int
) -> dict[str, dict[str, float]]:
    finite = [trial for trial in trials if trial.value is not None and math.isfinite(trial.value)]
    held = [trial.candidate.parameters for trial in finite]
    paths = [
        path
        for path, _ in space.items()
        if path != CARRIED
        and all(path in values for values in held)
        and any(values[path] != held[0][path] for values in held)
    ]
    if len(finite) < _FEWEST or len(paths) < 2:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    view = optuna.create_study(direction=direction)
    ranges = {path: distribution(space[path]) for path in paths}
    for trial in sorted(finite, key=lambda trial: trial.number):
        values: Mapping[str, Any] = trial.candidate.parameters
        try:
            params = {path: encode(space[path], values[path]) for path in paths}
            view.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=trial.value))
        except ValueError:
            continue  # from before the space was changed: its value is no longer in it
    if len(view.trials) < _FEWEST:
        return {}
    importance = _optuna_importance(fanova=fanova)
    methods = {"PED-ANOVA (what sets the best tenth apart)": importance.PedAnovaImportanceEvaluator()}
    if fanova:
        forest = importance.FanovaImportanceEvaluator(n_trees=_TREES, max_depth=_TREES, seed=seed)
        methods["fANOVA (what explains all the variance)"] = forest
    shares = {name: importance.get_param_importances(view, evaluator=by) for name, by in methods.items()}
    return {name: {path: float(values.get(path, 0.0)) for path in paths} for name, values in shares.items()}


def _optuna_importance(*, fanova: bool) -> Any:
    """The package optuna.importance, which imports scikit-learn for fANOVA wherever it is installed.

    Without fanova that is held back: Optuna takes it for missing, and needs it for nothing else.
    """
    import importlib

    package = "optuna.importance"
    if fanova and not hasattr(sys.modules.get(f"{package}._fanova._fanova"), "RandomForestRegressor"):
        for name in [name for name in sys.modules if name.startswith(package)]:
            del sys.modules[name]
    missing = object()
    loaded: Any = sys.modules.get("sklearn", missing)
    if not fanova and loaded is missing:
        sys.modules["sklearn"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(package)
    finally:
        if loaded is missing and sys.modules.get("sklearn", missing) is None:
            del sys.modules["sklearn"]
