"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hpo.spec.training import OptimizerSpec, ScheduleSpec


def _sgd(weights: Any, spec: OptimizerSpec, **fast: bool) -> torch.optim.Optimizer:
    # torch refuses Nesterov without momentum; a search over both may propose it, and it means plain SGD.
    nesterov = spec.nesterov and spec.momentum > 0
    return torch.optim.SGD(
        weights, spec.lr, momentum=spec.momentum, nesterov=nesterov, weight_decay=spec.weight_decay, **fast
    )


def _rmsprop(weights: Any, spec: OptimizerSpec, **_: bool) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(weights, spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)


def _adam(weights: Any, spec: OptimizerSpec, **fast: bool) -> torch.optim.Optimizer:
    betas = (spec.beta1, spec.beta2)
    return torch.optim.Adam(weights, spec.lr, betas=betas, weight_decay=spec.weight_decay, **fast)


def _adamw(weights: Any, spec: OptimizerSpec, **fast: bool) -> torch.optim.Optimizer:
    betas = (spec.beta1, spec.beta2)
    return torch.optim.AdamW(weights, spec.lr, betas=betas, weight_decay=spec.weight_decay, **fast)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adamw,
}


def build_optimizer(spec: OptimizerSpec, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer over these weights, as one fused kernel where torch has one."""
    trained = [weight for weight in weights if weight.requires_grad]
    # Fused loops over the weights once instead of once per operation: 1.2 to 3 times faster steps for small networks.
    return OPTIMIZERS[spec.name](trained, spec, fused=trained[0].device.type in ("cpu", "cuda"))


def learning_rate_factor(spec: ScheduleSpec, *, step: int, steps: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied by in batch `step` of `steps`, both counted from 0; in [0, 1]."""
    warmup = (spec.warmup or 0.3) if spec.name == "one_cycle" else spec.warmup
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    epoch = step // steps_per_epoch
    if spec.name in ("cosine", "one_cycle"):
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
    if spec.name == "step":
        return spec.gamma ** (epoch // spec.step_epochs)
    if spec.name == "exponential":
        return float(spec.gamma**epoch)
    return 1.0
