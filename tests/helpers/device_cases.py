"""What a device must be able to train: each family of networks, and each way to train one, on small random images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpo.data.prepare import TrialData
from hpo.models import build_model
from hpo.spec.study import Setup
from hpo.training.augment import AUGMENTATIONS, FLIPS, MIXES
from hpo.training.loop import train
from hpo.training.optimizers import OPTIMIZERS, SCHEDULES
from small_nets import SQUEEZE, TINY

SIDE, CLASSES, TRAIN, VALID = 16, 4, 100, 40

FAMILIES: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [24, 16], "dropout": 0.2, "batch_norm": True},
    "cnn": {"filters": 6, "batch_norm": True, "dropout": 0.2},
    "convnet": {"depth": 2, "width": 6, "dropout": 0.1, "dense": [12], "whiten": 2},
    "resnet": {"blocks": 2, "width": 6, "dense": [12], "shortcut_batch_norm": True},
    "torchvision": {"name": SQUEEZE["name"], "weights": "none", "input_size": 32},
    "timm": {"name": TINY["name"], "weights": "none", "input_size": 32},
    "fusion": {"backbones": [{**net, "weights": "none", "input_size": 32} for net in (SQUEEZE, TINY)]},
}
MLP, CNN = (
    {"kind": "mlp", "hidden": 24, "dropout": 0.2},
    {"kind": "cnn", "filters": 6, "batch_norm": True, "dropout": 0.2},
)

# A value with which each augmentation is on.
_AMOUNTS: dict[str, Any] = {
    "rotate": 30.0,
    "crop": 2,
    "randaugment": 2,
    "erase": 0.5,
    "hue": 0.1,
    "mixup": 0.4,
    "cutmix": 1.0,
}
_ON = dict.fromkeys(FLIPS, True) | {name: _AMOUNTS.get(name, 0.2) for name in (*AUGMENTATIONS, *MIXES)}

TRAININGS: dict[str, dict[str, Any]] = {
    **{f"optimizer-{name}": {"optimizer": {"name": name, "momentum": 0.5}} for name in OPTIMIZERS},
    **{f"optimizer-timm/{name}": {"optimizer": {"name": f"timm/{name}"}} for name in ("muon", "lion", "lamb")},
    **{f"schedule-{name}": {"schedule": {"name": name, "warmup": 0.2, "step_epochs": 1}} for name in SCHEDULES},
    **{f"augment-{name}": {"augment": {name: value}} for name, value in _ON.items()},
    "augment-all": {"augment": _ON},
    "augment-edge": {"augment": {"shift": 0.3, "rotate90": True, "fill": "edge"}},
    "class_weights": {"class_weights": "balanced"},
    "label_smoothing": {"label_smoothing": 0.1},
    "focal": {"loss": "focal", "class_weights": "balanced"},
    "balanced": {"sampling": "balanced"},
    "ema": {"ema": 0.9},
    "clip": {"clip_norm": 0.5},
    "micro_batch": {"micro_batch": 12, "augment": {"mixup": 0.4}},
    "layer_decay": {"optimizer": {"layer_decay": 0.7}},
    "growth": {"data_growth": 0.5},
    "scores": {"scores": ["valid_mcc", "valid_macro_f1"], "monitor": "valid_loss"},
}


def setup(model: dict[str, Any], **training: Any) -> Setup:
    """A setup of two epochs in batches of 32, the last of which is smaller."""
    plain = {"epochs": 2, "batch_size": 32, "precision": "float32", "seed": 3}
    given = {
        "data": {"name": "digits"},
        "split": {"kind": "holdout"},
        "model": model,
        "training": {**plain, **training},
    }
    return Setup.model_validate(given)


def images(device: str) -> TrialData:
    """Images of noise, brighter on one side, which depends on the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (TRAIN + VALID,), generator=generator)
    pixels = torch.randint(0, 120, (TRAIN + VALID, SIDE, SIDE, 3), generator=generator)
    for label in range(CLASSES):
        pixels[labels == label] += 120 * (torch.arange(SIDE) // (SIDE // CLASSES) == label).view(1, 1, SIDE, 1)
    rows, where = torch.arange(TRAIN + VALID), torch.device(device)
    return TrialData(
        images=pixels.to(torch.uint8).to(where),
        labels=labels.to(where),
        train=rows[:TRAIN].to(where),
        valid=rows[TRAIN:].to(where),
        class_names=tuple("abcd"),
        mean=(0.3,) * 3,
        std=(0.3,) * 3,
    )


def learn(model: dict[str, Any], device: str, *, precision: str = "float32", **training: Any):
    """Train a network on the device; it, and its epochs."""
    made, data = setup(model, **training), images(device)
    net = build_model(made.model, image_shape=(SIDE, SIDE, 3), classes=CLASSES, seed=0).to(torch.device(device))
    return net, list(train(net, data, made.training, seed=3, precision=precision))


def write_images(folder: Path) -> Path:
    """The same images as a file for data.path."""
    data = images("cpu")
    np.savez(folder / "images.npz", images=data.images.numpy(), labels=data.labels.numpy())
    return folder / "images.npz"
