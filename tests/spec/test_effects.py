"""A searched place changes the training, or it is refused: every place of the spec is trained with two values."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
from pydantic.fields import FieldInfo

from hpo.data.prepare import prepare
from hpo.errors import SpecError, TrainingError
from hpo.records import DataCard
from hpo.spec.agreement import conflicts
from hpo.spec.load import parse_study
from hpo.spec.models import CnnSpec, ConvnetSpec, MlpSpec, ResnetSpec
from hpo.spec.search import NOT_SEARCHED, effects_of, refusal_of
from hpo.spec.space import Part
from hpo.spec.study import DataSpec, Setup, SplitSpec, StudySpec
from hpo.spec.training import TrainingSpec
from hpo.training.loop import train
from hpo.training.trial import build_full

KINDS: Mapping[str, type[Part]] = {"mlp": MlpSpec, "cnn": CnnSpec, "convnet": ConvnetSpec, "resnet": ResnetSpec}
SMALL: Mapping[str, dict[str, Any]] = {
    "mlp": {"hidden": [5]},
    "cnn": {"filters": 3},
    "convnet": {"depth": 2, "width": 3, "dense": [4]},
    "resnet": {"blocks": 2, "width": 4, "convs_per_block": 2, "dense": [4]},
}
LEARNS_WITH = {"training.first_size": "resnet"}  # the network that a setting of the training is tried with, else mlp
# Settings under which places have an effect that has none otherwise, and the other way round.
BASES: Mapping[str, dict[str, Any]] = {
    "as written": {},
    "sgd": {"training.optimizer.name": "sgd", "training.optimizer.momentum": 0.5},
    "step": {"training.schedule.name": "step", "training.schedule.step_epochs": 1},
    "augmented": {
        "training.augment.rotate": 20.0,
        "training.augment.randaugment": 2,
        "training.augment.erase": 0.5,
    },
    "focal": {"training.loss": "focal"},
    "of timm": {"training.optimizer.name": "timm/lion", "training.optimizer.options": {"betas": [0.9, 0.99]}},
    "restarted": {"training.epochs": 4, "training.schedule.name": "cosine", "training.schedule.restarts": 1},
    "linear": {"model.hidden": []},
    "pooled by one": {"model.pool": 1},
    "without pooling": {"model.pool": "none"},
    "listed": {"model.filters": [3, 4]},
}
# What shows only elsewhere: in which epoch is kept, how long a training lasts, on which device and in which memory,
# and with a teacher, which tests/jobs/test_ensemble.py trains with.
ELSEWHERE = {
    "training.monitor",
    "training.scores",
    "training.patience",
    "training.precision",
    "training.micro_batch",
    "training.teacher",
    "model.kind",
}
OTHERS: Mapping[str, list[Any]] = {  # where the kind of the place does not tell a sensible other value
    "training.optimizer.lr": [0.01],
    "training.batch_size": [7],
    "training.class_weights": ["balanced"],
    "training.loss": ["focal"],
    "training.clip_norm": [0.01],
    "training.seed": [5],
    "model.pool_after": [[1]],
    "model.filters": [[3, 5]],
    "model.padding": ["valid"],
    "model.dropout": [0.5],
    "training.optimizer.name": ["sgd", "adam", "rmsprop"],
    "training.optimizer.options": [{"betas": [0.5, 0.6]}],
    "training.schedule.period_growth": [2.0],
}


def leaves(part: type[Part], stem: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in part.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Part):
            yield from leaves(kind, f"{stem}{name}.")
        else:
            yield f"{stem}{name}", field


def others(kind: Any, value: Any) -> Iterator[Any]:
    """Values of a kind that may be tried in place of a value."""
    if get_origin(kind) in (Union, types.UnionType):
        for one in get_args(kind):
            yield from others(one, value)
    elif get_origin(kind) is Literal:
        yield from (one for one in get_args(kind) if one != value)
    elif hasattr(kind, "__metadata__"):
        yield from others(get_args(kind)[0], value)
    elif kind is bool:
        yield not value
    elif kind is int:
        yield from (value + 1, value + 2) if isinstance(value, int) else (2,)
    elif kind is float:
        yield from (value * 0.5, 0.3, 0.7) if isinstance(value, float) else (0.5,)
    elif get_origin(kind) is list:
        yield [6]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> DataCard:
    folder: Path = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 9, 9, 3), dtype=np.uint8)
    np.savez(folder / "x.npz", train_images=images, train_labels=(np.arange(60) % 5 > 1).astype(np.int64))
    return prepare(DataSpec(name="npz", path=str(folder / "x.npz")), SplitSpec(kind="holdout"), cache=folder / "cache")


def study(kind: str, values: Mapping[str, Any], space: Mapping[str, Any] | None = None) -> StudySpec:
    tree: dict[str, Any] = {
        "name": "effects",
        "data": {"name": "npz", "path": "x.npz"},
        "split": {"kind": "holdout"},
        "model": {"kind": kind, **SMALL[kind]},
        "training": {"epochs": 2, "batch_size": 16, "optimizer": {"lr": 0.02}},
        "search": {"space": space or {"training.optimizer.lr": {"float": [0.1, 1.0]}}},
    }
    spec = parse_study(tree)
    setup = spec.with_values(values)
    return spec.model_copy(update={"model": setup.model, "training": setup.training})


_CARDS: list[DataCard] = []


@cache
def outcome(text: str) -> tuple[Any, ...]:
    """What comes out of a training: every score of every epoch, and the number of weights."""
    setup = Setup.model_validate_json(text)
    net, data = build_full(setup, _CARDS[-1], seed=1, device_name="cpu")
    seed = 1 if setup.training.seed is None else setup.training.seed
    epochs = list(train(net, data, setup.training, seed=seed, precision="float32"))
    weights = [weight.detach().double().sum().item() for weight in net.parameters()]
    return tuple(tuple(sorted(epoch.scores.items())) for epoch in epochs), tuple(weights)


def value_of(setup: Setup, path: str) -> Any:
    found: Any = setup
    for key in path.split("."):
        found = getattr(found, key)
    return found


def cases() -> Iterator[Any]:
    training = list(leaves(TrainingSpec, "training."))
    for kind, part in KINDS.items():
        learns = [(path, field) for path, field in training if LEARNS_WITH.get(path, "mlp") == kind]
        for path, field in [*leaves(part, "model."), *learns]:
            if path not in ELSEWHERE:
                yield pytest.param(kind, path, field, id=f"{kind} {path}")


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "path", "field"), list(cases()))
def test_a_searched_place_changes_the_training_or_is_refused(card, kind, path, field):
    _CARDS.append(card)
    settings = {setting for effect in effects_of(path, kind) for setting in effect.settings}
    tried = 0
    for base in BASES.values():
        # What concerns the other half of the setup makes no difference, and a training costs time.
        if (
            base
            and not settings & base.keys()
            and not all(key.startswith("model.") and key[:6] == path[:6] for key in base)
        ):
            continue
        try:
            plain = study(kind, base)
        except SpecError:
            continue  # a setting that this kind has not
        value, others_tried, differs = value_of(plain.setup, path), [], False
        before = outcome(plain.setup.model_dump_json())
        for other in [*OTHERS.get(path, []), *others(field.annotation, value)]:
            try:
                setup = study(kind, {**base, path: other}).setup
            except SpecError:
                continue
            if value_of(setup, path) != value:
                with contextlib.suppress(TrainingError):  # the images are too small for it
                    differs = outcome(setup.model_dump_json()) != before
                    others_tried.append(other)
            if differs or len(others_tried) == 2:
                break
        if others_tried:
            tried += 1
            space = {path: {"choice": [value, *others_tried]}}
            search = plain.search.model_copy(update={"space": type(plain.search.space).model_validate(space)})
            refused = [one.message for one in conflicts(plain.model_copy(update={"search": search}))]
            assert differs != bool(refused), f"{base}: {value} or {others_tried}: {differs=} {refused=}"
    assert tried, "no other value was found to try"


@pytest.mark.parametrize("path", [path for path in NOT_SEARCHED if "." not in path])
def test_every_place_of_the_data_and_its_parts_is_refused(path):
    part = {"data": DataSpec, "split": SplitSpec}[path]
    assert all(refusal_of(leaf) for leaf, _ in leaves(part, f"{path}."))
    assert refusal_of(path)


def test_every_part_of_a_setup_is_looked_at():
    """What is added to the setup of a training has to be added here, or to the places that are not searched."""
    assert set(Setup.model_fields) == {"data", "split", "model", "training", "task"}
