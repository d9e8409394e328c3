"""The parts of a new study: networks from scratch and on frozen backbones, their training and their search spaces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpo.errors import DataError
from hpo.jobs.shared.presets import usable
from hpo.records import DataCard

_MANY = 30_000  # images, from which on larger batches lose nothing
_LEAST_SIDE = 8  # pixels; smaller images have nothing to convolve
_LARGE_SIDE = 40  # pixels; at the full resolution of larger images there is one block only
_INPUT_SIDES = (160, 128, 96, 64)  # of a backbone that is too slow at the size of its training


def in_folds(card: DataCard, split: Mapping[str, Any]) -> dict[str, Any] | None:
    """A split in 5 folds, or as many as there are groups, in place of a holdout; None where the images allow none."""
    from hpo.data.split import split_card
    from hpo.spec.study import SplitSpec

    file = Path(card.folder) / "development_groups.npy"  # fewer than card.groups, which counts the test part's
    groups = len(np.unique(np.load(file, allow_pickle=False))) if file.is_file() else 5
    folded = {**split, "kind": "kfold", "folds": max(2, min(5, groups))}
    folded.pop("share", None)
    try:
        split_card(card, SplitSpec(**folded))
    except DataError:
        return None
    return folded


def scratch_models(side: int, widths: Sequence[int]) -> list[dict[str, Any]]:
    """Networks for images of `side` pixels, each slower than the one before, with these rising widths of scratch_model.

    The first has one block at the full resolution, if the others have two.
    """
    models = [scratch_model(side, width) for width in widths]
    if _LEAST_SIDE <= side <= _LARGE_SIDE:
        models.insert(0, models[0] | {"pool_after": [block - 1 for block in models[0]["pool_after"]]})
    return models


def scratch_model(side: int, width: int) -> dict[str, Any]:
    """A network for images of `side` pixels whose first block has `width` filters.

    Two blocks at each resolution, the second of twice the filters, and one at the last, of at most 8 x 8 pixels.
    """
    if side < _LEAST_SIDE:
        return {"kind": "mlp", "hidden": 16 * width, "dropout": 0.1}
    halvings = max(1, math.ceil(math.log2(side / 8)))
    filters, pooled, wide = [width], [], width
    for level in range(halvings):
        if level or side <= _LARGE_SIDE:
            wide = min(2 * wide, 8 * width)
            filters.append(wide)
        pooled.append(len(filters))
        filters.append(wide)
    return {
        "kind": "convnet",
        "filters": filters,
        "pool_after": pooled,
        "head": "global",
        "dense_dropout": 0.2,
    }


def scratch_parts(card: DataCard, turns: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """Training and search of a network from scratch; epochs and trials are filled in later."""
    side = min(card.image_shape[:2])
    convolves = side >= _LEAST_SIDE
    shift = {"crop": max(1, side // 14)}
    dropout = "model.dense_dropout" if convolves else "model.dropout"
    space: dict[str, Any] = {
        "training.optimizer.lr": {"float": [1e-3, 1e-2], "log": True},
        "training.optimizer.weight_decay": {"float": [1e-2, 2e-1], "log": True},
        dropout: {"float": [0.0, 0.4]},
    }
    start = [
        {"training.optimizer.lr": 4e-3, "training.optimizer.weight_decay": 5e-2, dropout: 0.2},
        {"training.optimizer.lr": 2e-3, "training.optimizer.weight_decay": 1e-1, dropout: 0.1},
    ]
    return {
        "training": {
            "epochs": 2,
            "batch_size": 128 if card.development_count > _MANY else 64 if card.development_count > 4_000 else 32,
            "optimizer": {"name": "adamw", "lr": 4e-3, "weight_decay": 5e-2},
            "schedule": {"name": "one_cycle"},
            "augment": {**turns, **shift},
            **({} if card.several_labels else {"label_smoothing": 0.1}),
        },
        "search": {"objective": objective, "start": start, "space": space},
    }


def frozen_model(bodies: Sequence[Any]) -> dict[str, Any]:
    """A head on one frozen backbone, or on several side by side."""
    head = {"freeze": "all", "batch_norm": True, "dropout": 0.3}
    plain = [body.model_dump(exclude_defaults=True, mode="json") for body in bodies]
    if len(plain) == 1:
        return {**plain[0], **head}
    return {"kind": "fusion", "backbones": plain, **head}


def frozen_parts(card: DataCard, objective: str, epochs: int) -> dict[str, Any]:
    """Training and search of the head of a frozen backbone."""
    smooth = {} if card.several_labels else {"training.label_smoothing": {"choice": [0.0, 0.1]}}
    space = {
        "model.dropout": {"float": [0.1, 0.7]},
        "training.optimizer.lr": {"float": [3e-4, 2e-2], "log": True},
        "training.optimizer.weight_decay": {"float": [1e-3, 3e-1], "log": True},
        **smooth,
    }
    return {
        "training": {
            "epochs": epochs,
            "batch_size": 256 if card.development_count > 4_000 else 32,
            "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-2},
            "schedule": {"name": "one_cycle"},
        },
        "search": {"objective": objective, "space": space},
    }


def sized_bodies(
    features: Sequence[tuple[Any, float]], minutes: float, workers: int
) -> tuple[list[tuple[Any, float]], str]:
    """The backbones at the largest input at which the first one fits into a third of the time, and a note on that.

    The seconds of a backbone grow with the square of its input, which is 224 pixels at first.
    """
    budget = usable(minutes) / 3
    if features[0][1] / workers <= budget:
        return list(features), ""
    sides = [side for side in _INPUT_SIDES if features[0][1] * (side / 224) ** 2 / workers <= budget]
    side = sides[0] if sides else _INPUT_SIDES[-1]
    smaller = [(body.model_copy(update={"input_size": side}), each * (side / 224) ** 2) for body, each in features]
    return smaller, f" at 224 pixels, too long: they see {side}"
