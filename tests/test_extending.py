"""docs/extending.md: one entry of a table, and for some a name in the spec, adds a part to the platform."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
import pytest
import torch
from pydantic import TypeAdapter, ValidationError, create_model
from torch import nn

from formula import MIXED, NUMERIC, objective, run_in_pieces, run_whole, sequence
from formula_study import CARD, formula, formula_spec
from hpo.data.folders import Parts
from hpo.data.prepare import open_trial, prepare
from hpo.data.sources import DATASETS, Source
from hpo.errors import TrainingError
from hpo.events import TrialEnded
from hpo.execute.engines import ENGINES, engine_factory
from hpo.execute.engines.base import StudyWork, WorkerPlan
from hpo.execute.engines.in_process import InProcess
from hpo.execute.stack_size import largest_stack
from hpo.execute.workers.task import Task
from hpo.metrics import METRICS, Metric, label_of
from hpo.models import MODELS
from hpo.options import RunOptions
from hpo.records import TrialResult, TrialState
from hpo.report.statistics import score_intervals
from hpo.search.pruners import PRUNERS, Pruner
from hpo.search.samplers import SAMPLERS, Sampler
from hpo.spec import space
from hpo.spec.load import load_study
from hpo.spec.models import FAMILIES, model_type
from hpo.spec.schema import study_schema
from hpo.spec.search import SearchSpec
from hpo.spec.space import Part
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec
from hpo.training.augment import AUGMENTATIONS, Augmentation, build_augment
from hpo.training.optimizers import OPTIMIZERS, eager
from search_fixtures import bare_home, home, make_spec  # noqa: F401 - fixtures
from study_fixtures import run_formula  # noqa: F401 - a fixture

SETUP = load_study("digits-mlp", overrides=["training.epochs=1", "training.precision=float32"]).setup


def train(setup: Setup, card, folder) -> TrialResult:
    """One trial in this process."""
    torch.set_num_threads(1)
    engine = InProcess()
    engine.submit(0, Task(0, setup, 7, card, str(folder)))
    while True:
        for _, message in engine.poll(1.0):
            if isinstance(message, TrialEnded):
                return message.result


def other(home):  # noqa: F811
    root = home.root / "b"
    return replace(home, root=root, storage_url=f"sqlite:///{root / 'optuna.db'}")


def test_the_diffs_of_the_page_apply_to_the_code_as_it_is():
    root = Path(__file__).parents[1]
    blocks = (root / "docs" / "extending.md").read_text(encoding="utf-8").split("```diff\n")[1:]
    assert len(blocks) >= 9
    for block in blocks:
        lines: list[str] = []
        for line in block.partition("```")[0].splitlines():
            if line.startswith("--- a/"):
                lines = (root / line.removeprefix("--- a/")).read_text(encoding="utf-8").splitlines()
            elif line.startswith((" ", "-")) and not line.startswith("--- "):
                assert line[1:] in lines, line


def test_names_of_the_spec_are_those_of_the_tables():
    assert SAMPLERS.keys() == set(space.SAMPLER_NAMES)
    assert PRUNERS.keys() == set(space.PRUNER_NAMES)
    assert OPTIMIZERS.keys() == set(space.OPTIMIZER_NAMES)
    assert MODELS.keys() == FAMILIES.keys()


def test_a_metric_is_scored_aimed_at_labelled_and_has_intervals(monkeypatch, card, tmp_path):
    error = Metric("error_rate", "error rate", "minimize", lambda hits, true, _: 1 - hits.sum(-1) / true.sum(-1))
    monkeypatch.setitem(METRICS, "error_rate", error)
    space = {"training.optimizer.lr": {"float": [0.001, 0.1]}}
    search = SearchSpec(objective="valid_error_rate", space=space, constraints=["valid_error_rate <= 0.3"])
    assert search.better == "minimize"
    assert "valid_error_rate" in str(study_schema())
    assert label_of("valid_error_rate") == "validation error rate"

    training = SETUP.training.model_validate({**SETUP.training.model_dump(), "monitor": "valid_error_rate"})
    result = train(SETUP.model_copy(update={"training": training}), card, tmp_path / "0")
    assert result.scores["valid_error_rate"] == pytest.approx(1 - result.scores["valid_accuracy"])

    labels, predicted = np.array([0, 0, 0, 0, 1, 1]), np.array([[0, 0, 0, 1, 1, 0]])
    (interval,), _ = score_intervals(labels, predicted, classes=2, seed=0, resamples=200)
    assert interval["error_rate"].value == pytest.approx(1 / 3)
    assert interval["error_rate"].low < 1 / 3 < interval["error_rate"].high


def test_a_sampler_runs_a_study_that_resumes_and_stacks(home, make_spec, monkeypatch):  # noqa: F811
    def build(stage, seed, ordinal):
        return optuna.samplers.TPESampler(n_startup_trials=2, seed=seed)

    monkeypatch.setattr(space, "SAMPLER_NAMES", (*space.SAMPLER_NAMES, "mine"))
    monkeypatch.setitem(SAMPLERS, "mine", Sampler(build, learns=True))
    spec = make_spec("mine", space=MIXED)
    expected = sequence(run_whole(home, spec, 11))
    assert sequence(run_in_pieces(other(home), spec, 11)) == expected
    assert largest_stack(spec, left=40, workers=2, by_default=True) == 4


class _Strict(optuna.pruners.BasePruner):
    """Prunes all but the best trial after its third report."""

    def prune(self, study, trial):
        finished = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        best = max((other.value for other in finished), default=-math.inf)
        return trial.last_step == 3 and trial.intermediate_values[3] < best / 3


def test_a_pruner_ends_the_poor_trials_of_a_study_that_resumes(home, make_spec, monkeypatch):  # noqa: F811
    monkeypatch.setattr(space, "PRUNER_NAMES", (*space.PRUNER_NAMES, "mine"))
    monkeypatch.setitem(PRUNERS, "mine", Pruner(lambda spec: _Strict()))
    spec = make_spec("tpe", "mine", NUMERIC)
    whole = run_whole(home, spec, 11, epochs=9)
    assert 0 < whole.count(TrialState.PRUNED) < 11
    assert whole.best.value == max(objective(trial.candidate.parameters) for trial in whole.trials)
    assert sequence(run_in_pieces(other(home), spec, 11, epochs=9)) == sequence(whole)


class _LinearSpec(Part):
    kind: Literal["linear"]
    bias: bool = True


def _build_linear(spec: _LinearSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), classes, bias=spec.bias))


def test_a_model_family_is_a_part_of_the_study_file_and_trains(monkeypatch, card, tmp_path):
    with pytest.raises(ValidationError, match="there is no kind 'linear'"):
        TypeAdapter(model_type()).validate_python({"kind": "linear"})
    monkeypatch.setitem(FAMILIES, "linear", _LinearSpec)
    monkeypatch.setitem(MODELS, "linear", _build_linear)
    # Setup and StudySpec read the table when they are imported.
    extended = create_model("Extended", __base__=Setup, model=(model_type(), ...))
    setup = extended.model_validate({**SETUP.model_dump(), "model": {"kind": "linear", "bias": False}})
    result = train(setup, card, tmp_path / "0")
    assert (result.state, result.reason) == (TrialState.COMPLETE, "")
    assert result.parameter_count == 64 * 10


def test_an_optimizer_trains(monkeypatch, card, tmp_path):
    made: list[Any] = []

    def build(weights, spec, **_):
        made.append(eager(torch.optim.Adagrad)(weights, spec.lr))
        return made[-1]

    monkeypatch.setattr(space, "OPTIMIZER_NAMES", (*space.OPTIMIZER_NAMES, "adagrad"))
    monkeypatch.setitem(OPTIMIZERS, "adagrad", build)
    training = SETUP.training.model_copy(update={"optimizer": OptimizerSpec(name="adagrad", lr=0.01)})
    result = train(SETUP.model_copy(update={"training": training}), card, tmp_path / "0")
    assert (result.state, result.reason) == (TrialState.COMPLETE, "")
    assert made


class _AlternatingFactory:
    """An engine of two slots in this process, each of which trains a formula."""

    stacks = False

    def __init__(self, options):
        self.device = options.device

    def connect(self):
        pass

    def plan(self, devices, *, most):
        return WorkerPlan((devices[0],) * min(2, most), 1, "two formulas")

    def start(self, plan, work, *, stack):
        return _Alternating(len(plan.devices))

    def close(self):
        pass


class _Alternating:
    def __init__(self, slots):
        self.slots = slots
        self._lanes = [InProcess(trainer=formula) for _ in range(slots)]

    def accepts(self, slot):
        return True

    def submit(self, slot, task):
        self._lanes[slot].submit(0, task)

    def poll(self, timeout):
        return [(slot, message) for slot, lane in enumerate(self._lanes) for _, message in lane.poll(timeout)]

    def verdict(self, slot, *, go_on):
        self._lanes[slot].verdict(0, go_on=go_on)

    def close(self):
        for lane in self._lanes:
            lane.close()


def test_an_engine_runs_a_study(monkeypatch, run_formula):  # noqa: F811
    monkeypatch.setitem(ENGINES, "alternating", f"{__name__}:_AlternatingFactory")
    spec = formula_spec()
    factory = engine_factory(RunOptions(engine="alternating"))
    factory.connect()
    plan = factory.plan(["cpu"], most=9)
    run = run_formula(spec, engine=factory.start(plan, StudyWork(spec, CARD, print), stack=1))
    factory.close()
    assert run.reason == "budget"
    assert [trial.state for trial in run.trials] == [TrialState.COMPLETE] * 6


class _Inverting(AugmentSpec):
    invert: bool = False


def test_an_augmentation_that_is_alone_changes_a_batch_or_is_refused(monkeypatch):
    images = torch.randint(256, (20, 12, 12, 3), dtype=torch.uint8)
    with pytest.raises(TrainingError, match=r"augment\.invert: is not implemented"):
        build_augment(_Inverting(invert=True))
    monkeypatch.setitem(AUGMENTATIONS, "invert", Augmentation(change=lambda _spec, batch, _generator: 255 - batch))
    assert torch.equal(build_augment(_Inverting(invert=True))(images, torch.Generator()), 255 - images)
    assert build_augment(_Inverting()) is None


def test_a_data_set_is_prepared_and_trials_train_on_its_images(monkeypatch, tmp_path):
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (90, 6, 6, 1), dtype=np.uint8), np.arange(90) % 2
    (tmp_path / "noise.bin").write_bytes(images.tobytes())
    source = Source(
        read=lambda place, asked: Parts({"train": (images, labels)}, ("odd", "even")),
        sizes=(6,),
        installed=lambda: tmp_path / "noise.bin",
        takes_path=False,
    )
    monkeypatch.setitem(DATASETS, "noise", source)
    data, split = DataSpec(name="noise"), SplitSpec(kind="holdout")
    card = prepare(data, split, cache=tmp_path / "cache")
    assert (card.class_names, card.image_shape) == (("odd", "even"), (6, 6, 1))
    opened = open_trial(card, split, device=torch.device("cpu"))
    known = {image.tobytes() for image in images}
    assert opened.images.shape == (card.development_count, 6, 6, 1)
    assert all(image.numpy().tobytes() in known for image in opened.images)
    result = train(SETUP.model_copy(update={"data": data, "split": split}), card, tmp_path / "0")
    assert (result.state, result.reason) == (TrialState.COMPLETE, "")
