"""Which places of a study a candidate can change, and when a change of them has an effect on its training.

StudySpec.with_values builds a candidate's setup. A training reads `model` and `training` of it; the images are
prepared and parted before any candidate exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_SAME_IMAGES = (
    "decides which images are trained on and judged, so its trials could not be compared, and the best would be the "
    "one with the easiest images. Fix it; to judge candidates on several parts of the data: split.kind: kfold"
)

# Places that are no search parameter, with all that lies below them -> why, and what to do instead.
NOT_SEARCHED: Mapping[str, str] = {
    "data": _SAME_IMAGES + ", and for several data sets one study each",
    "split": _SAME_IMAGES,
    "training.scores": "decides what else is measured of a training and changes nothing that comes out of it. Fix it",
    "training.checkpoint": "decides how often a training is saved and changes nothing that comes out of it. Fix it",
}


@dataclass(frozen=True)
class Effect:
    """A place has an effect only where one of the settings has a value that acts; advice says how to get there."""

    settings: tuple[str, ...]
    acts: Callable[[Any], bool]
    advice: str


def refusal_of(path: str) -> str:
    """Why a place is no search parameter, and what to do instead; "" where it may be searched."""
    return next((why for place, why in NOT_SEARCHED.items() if f"{path}.".startswith(f"{place}.")), "")


def effects_of(path: str, kind: str) -> tuple[Effect, ...]:
    """What has to be so for a place to have an effect on a network of this kind; () for one that always has."""
    return (*_EFFECTS.get(path, ()), *_MODEL_EFFECTS.get(kind, {}).get(path, ()))


def _one_of(setting: str, *values: Any) -> tuple[Effect, ...]:
    return (Effect((setting,), lambda value: value in values, f"Set {setting} to {' or '.join(map(str, values))}"),)


def _other_than(setting: str, *values: Any) -> tuple[Effect, ...]:
    return (Effect((setting,), lambda value: value not in values, f"Change {setting}"),)


_AUGMENT = "training.augment."
_MOVES = tuple(_AUGMENT + name for name in ("rotate", "shift", "crop", "zoom", "randaugment"))
_CHANGES = (
    *_MOVES,
    *(_AUGMENT + name for name in ("flip_horizontal", "flip_vertical", "rotate90", "brightness", "contrast")),
    *(_AUGMENT + name for name in ("saturation", "hue", "erase")),
)

_EFFECTS: Mapping[str, tuple[Effect, ...]] = {
    "training.optimizer.momentum": _one_of("training.optimizer.name", "sgd", "rmsprop"),
    "training.optimizer.nesterov": (
        *_one_of("training.optimizer.name", "sgd"),
        *_other_than("training.optimizer.momentum", 0),
    ),
    "training.optimizer.beta1": _one_of("training.optimizer.name", "adam", "adamw"),
    "training.optimizer.beta2": _one_of("training.optimizer.name", "adam", "adamw"),
    "training.schedule.gamma": _one_of("training.schedule.name", "step", "exponential"),
    "training.schedule.step_epochs": _one_of("training.schedule.name", "step"),
    "training.focal_gamma": _one_of("training.loss", "focal"),
    "training.augment.fill": (Effect(_MOVES, bool, "Set one of them above 0"),),
    "training.augment.magnitude": _other_than("training.augment.randaugment", 0),
    "training.augment.erase_area": _other_than("training.augment.erase", 0),
}

_HIDDEN = _other_than("model.hidden", [])
_DENSE = _other_than("model.dense", [])
_WITHOUT_LIST = (Effect(("model.filters",), lambda value: value is None, "Set model.filters to null"),)
_TUNED: Mapping[str, tuple[Effect, ...]] = {
    "model.activation": _DENSE,
    "model.unfreeze_epoch": _other_than("model.freeze", "none"),
    "model.views": (*_one_of("model.freeze", "all"), Effect(_CHANGES, bool, "Set one of them")),
    "training.optimizer.layer_decay": (
        Effect(
            ("model.freeze", "model.unfreeze_epoch"),
            lambda value: value not in ("all", None),
            "Set model.freeze to none or a number, or model.unfreeze_epoch",
        ),
    ),
}
_MODEL_EFFECTS: Mapping[str, Mapping[str, tuple[Effect, ...]]] = {
    "mlp": {"model.activation": _HIDDEN, "model.dropout": _HIDDEN, "model.batch_norm": _HIDDEN},
    "cnn": {"model.pool_type": _other_than("model.pool", 1)},
    "convnet": {
        "model.depth": _WITHOUT_LIST,
        "model.width": _WITHOUT_LIST,
        "model.growth": (*_WITHOUT_LIST, *_other_than("model.depth", 1)),
        "model.pool_size": _other_than("model.pool", "none"),
        "model.pool_after": _other_than("model.pool", "none"),
    },
    "torchvision": _TUNED,
    "timm": _TUNED,
    "fusion": _TUNED,
    "transfer": _TUNED,
}
