"""The searches that search_quality.py compares: the platform's own and its peers, each as it is documented."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from search_quality_tasks import Config, drawn


@dataclass
class Job:
    """One training, as a search asks for it: until this epoch, unless report says stop. One key, one training."""

    key: Any
    config: Config
    until: int


class System:
    """A search: ask gives the next job (None: there is none now), report takes a value after an epoch and returns
    whether to stop, tell ends a job with its best value."""

    def __init__(self, task: Any, *, seed: int, workers: int) -> None:
        self.task, self.seed, self.workers = task, seed, workers
        self.start()

    def start(self) -> None:
        """Prepare the search."""

    def ask(self) -> Job | None:
        raise NotImplementedError

    def report(self, key: Any, epoch: int, value: float) -> bool:  # noqa: ARG002
        return False

    def tell(self, key: Any, epoch: int, value: float, *, stopped: bool) -> None:
        pass

    def close(self) -> None:
        pass


class Random(System):
    """Full trainings of random settings."""

    def start(self) -> None:
        self._rng, self._count = np.random.default_rng(self.seed), 0

    def ask(self) -> Job:
        self._count += 1
        return Job(self._count, drawn(self.task.space, self._rng, 1)[0], self.task.epochs)


class Hpo(System):
    """The platform as `hpo run` searches; sampler and pruner are those of the study file."""

    sampler: Any = "auto"
    pruner: Any = "auto"
    prior: str = ""  # best or worst: every setting has a prior, at those of the best or worst of 2,000 random ones

    def start(self) -> None:
        from hpo.home import Home
        from hpo.search.lifecycle import open_study

        self._folder = tempfile.TemporaryDirectory()
        self._study = open_study(Home.at(self._folder.name), self.spec(), data_digest="curves")

    def spec(self) -> Any:
        from hpo.spec.load import parse_study

        space = {}
        for name, part in self.task.space.items():
            low, high = (int(part.low), int(part.high)) if part.whole else (part.low, part.high)
            space[f"model.options.{name}"] = {"int" if part.whole else "float": [low, high], "log": part.log}
        for name, value in self._priors().items():
            space[f"model.options.{name}"]["prior"] = value
        middle = {name: part.draw(0.5) for name, part in self.task.space.items()}
        plain = {
            "name": "quality",
            "data": {"name": "digits"},
            "model": {"kind": "search_quality:network", "options": middle},
            "training": {"epochs": self.task.epochs},
            "search": {
                "objective": "valid_accuracy" if self.task.maximize else "valid_loss",
                "sampler": self.sampler,
                "pruner": self.pruner,
                "trials": 100_000,
                "space": space,
            },
            "seed": self.seed,
        }
        return parse_study(plain, trust=True)

    def _priors(self) -> Config:
        if not self.prior:
            return {}
        configs = drawn(self.task.space, np.random.default_rng(0), 2000)
        values, _ = self.task.curves(configs)
        tops = values.max(1) if self.task.maximize else -values.min(1)
        return configs[int(tops.argmax() if self.prior == "best" else tops.argmin())]

    def ask(self) -> Job | None:
        candidate = self._study.ask(budget=100_000, worker="simulated")
        if candidate is None:
            return None
        config = {path.rsplit(".", 1)[1]: value for path, value in candidate.parameters.items()}
        return Job(candidate.number, config, self.task.epochs)

    def report(self, key: Any, epoch: int, value: float) -> bool:
        return self._study.report(key, epoch, value) and epoch < self.task.epochs

    def tell(self, key: Any, epoch: int, value: float, *, stopped: bool) -> None:
        from hpo.records import TrialResult, TrialState

        self._study.tell(TrialResult(key, TrialState.PRUNED if stopped else TrialState.COMPLETE, value, epoch))

    def close(self) -> None:
        self._study.close()
        self._folder.cleanup()


def _untrained(config: Any, seed: int, budget: float) -> float:  # noqa: ARG001 - SMAC looks at the names
    return 0.0


def network(*_: Any, **__: Any) -> None:
    """Stands for a network in the study files of this benchmark: nothing is trained."""


class OptunaDefaults(System):
    """Optuna as its documentation begins: TPESampler and MedianPruner, all else as it is."""

    def start(self) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._study = optuna.create_study(
            direction="maximize" if self.task.maximize else "minimize",
            sampler=optuna.samplers.TPESampler(seed=self.seed),
            pruner=self.pruner(optuna),
        )
        self._trials: dict[int, Any] = {}

    def pruner(self, optuna: Any) -> Any:
        return optuna.pruners.MedianPruner()

    def ask(self) -> Job:
        trial = self._study.ask()
        self._trials[trial.number] = trial
        config = {}
        for name, part in self.task.space.items():
            suggest = trial.suggest_int if part.whole else trial.suggest_float
            low, high = (int(part.low), int(part.high)) if part.whole else (part.low, part.high)
            config[name] = suggest(name, low, high, log=part.log)
        return Job(trial.number, config, self.task.epochs)

    def report(self, key: Any, epoch: int, value: float) -> bool:
        self._trials[key].report(value, epoch)
        return bool(self._trials[key].should_prune()) and epoch < self.task.epochs

    def tell(self, key: Any, epoch: int, value: float, *, stopped: bool) -> None:  # noqa: ARG002
        import optuna

        state = optuna.trial.TrialState.PRUNED if stopped else optuna.trial.TrialState.COMPLETE
        self._study.tell(self._trials.pop(key), None if stopped else value, state=state)


class OptunaHyperband(OptunaDefaults):
    """Optuna's TPESampler and HyperbandPruner."""

    def pruner(self, optuna: Any) -> Any:
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=self.task.epochs)


class SyneTune(System):
    """A scheduler of Syne Tune, all else as it is."""

    scheduler = "ASHA"

    def start(self) -> None:
        import logging

        from syne_tune import config_space
        from syne_tune.optimizer import baselines

        logging.disable(logging.WARNING)
        space = {}
        for name, part in self.task.space.items():
            kind = ("lograndint" if part.log else "randint") if part.whole else "loguniform" if part.log else "uniform"
            ends = (int(part.low), int(part.high)) if part.whole else (part.low, part.high)
            space[name] = getattr(config_space, kind)(*ends)
        self._scheduler = getattr(baselines, self.scheduler)(
            space,
            metric="value",
            time_attr="epoch",
            max_t=self.task.epochs,
            do_minimize=not self.task.maximize,
            random_seed=self.seed,
        )
        self._trials: dict[int, Any] = {}

    def ask(self) -> Job:
        import datetime

        from syne_tune.backend.trial_status import Trial

        suggestion = self._scheduler.suggest()
        key = len(self._trials)
        self._trials[key] = Trial(trial_id=key, config=suggestion.config, creation_time=datetime.datetime.now())
        self._scheduler.on_trial_add(self._trials[key])
        return Job(key, suggestion.config, self.task.epochs)

    def report(self, key: Any, epoch: int, value: float) -> bool:
        if epoch == self.task.epochs:  # it is told by tell, which calls the same again
            return False
        return self._scheduler.on_trial_result(self._trials[key], {"value": value, "epoch": epoch}) != "CONTINUE"

    def tell(self, key: Any, epoch: int, value: float, *, stopped: bool) -> None:
        if not stopped:
            self._scheduler.on_trial_complete(self._trials[key], {"value": value, "epoch": epoch})


class Smac(System):
    """SMAC's multi-fidelity facade, epochs 1 to all; what it evaluates at a higher budget goes on where it was."""

    def start(self) -> None:
        import logging
        from pathlib import Path

        import ConfigSpace
        from smac import MultiFidelityFacade, Scenario

        logging.disable(logging.WARNING)
        space = ConfigSpace.ConfigurationSpace(seed=self.seed)
        for name, part in self.task.space.items():
            kind = ConfigSpace.UniformIntegerHyperparameter if part.whole else ConfigSpace.UniformFloatHyperparameter
            ends = (int(part.low), int(part.high)) if part.whole else (part.low, part.high)
            space.add(kind(name, *ends, log=part.log))
        self._folder = tempfile.TemporaryDirectory()
        scenario = Scenario(
            space,
            deterministic=True,
            n_trials=100_000,
            min_budget=1,
            max_budget=self.task.epochs,
            seed=self.seed,
            output_directory=Path(self._folder.name),
        )
        self._facade = MultiFidelityFacade(scenario, _untrained, logging_level=False)
        self._jobs: dict[Any, Any] = {}
        self._keys: dict[Any, int] = {}

    def ask(self) -> Job:
        info = self._facade.ask()
        key = self._keys.setdefault(info.config, len(self._keys))
        self._jobs[key] = info
        return Job(key, dict(info.config), round(info.budget))

    def tell(self, key: Any, epoch: int, value: float, *, stopped: bool) -> None:  # noqa: ARG002
        from smac.runhistory.dataclasses import TrialValue

        cost = -value if self.task.maximize else value
        self._facade.tell(self._jobs.pop(key), TrialValue(cost=cost), save=False)

    def close(self) -> None:
        self._folder.cleanup()


class Neps(System):
    """NePS with PriorBand's brackets and no prior; what it evaluates at a higher fidelity goes on where it was."""

    algorithm = "priorband"

    def start(self) -> None:
        import random

        import neps
        import torch

        torch.manual_seed(self.seed), np.random.seed(self.seed), random.seed(self.seed)
        torch.set_num_threads(1)
        space: dict[str, Any] = {}
        for name, part in self.task.space.items():
            kind = neps.HPOInteger if part.whole else neps.HPOFloat
            ends = (int(part.low), int(part.high)) if part.whole else (part.low, part.high)
            space[name] = kind(*ends, log=part.log)
        space["epochs"] = neps.HPOInteger(1, self.task.epochs, is_fidelity=True)
        self._neps = neps.AskAndTell(getattr(neps.algorithms, self.algorithm)(neps.SearchSpace(space)))
        self._jobs: dict[str, Any] = {}

    def ask(self) -> Job:
        trial = self._neps.ask()
        key = trial.metadata.id.rsplit("_", 1)[0]  # then comes the rung
        self._jobs[key] = trial
        config = {name: value for name, value in trial.config.items() if name != "epochs"}
        return Job(key, config, int(trial.config["epochs"]))

    def tell(self, key: Any, epoch: int, value: float, *, stopped: bool) -> None:  # noqa: ARG002
        self._neps.tell(self._jobs.pop(key), -value if self.task.maximize else value)


def _named(base: type[System], **settings: Any) -> type[System]:
    return type(base.__name__, (base,), settings)


SYSTEMS: dict[str, type[System]] = {
    "random": Random,
    "hpo": Hpo,
    "hpo-good-priors": _named(Hpo, prior="best"),
    "hpo-bad-priors": _named(Hpo, prior="worst"),
    "hpo-tpe-halving": _named(Hpo, sampler="tpe", pruner={"name": "successive_halving"}),
    "optuna": OptunaDefaults,
    "optuna-hyperband": OptunaHyperband,
    "smac": Smac,
    "neps-priorband": Neps,
    "neps-asha": _named(Neps, algorithm="asha"),
    "syne-asha": SyneTune,
    "syne-asha-cqr": _named(SyneTune, scheduler="ASHACQR"),
    "syne-bohb": _named(SyneTune, scheduler="BOHB"),
}
