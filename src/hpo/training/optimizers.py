"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from hpo.models.backbones import stages
from hpo.models.transfer import transfer_of
from hpo.spec.training import OptimizerSpec, ScheduleSpec

Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def eager(kind: type[Kind]) -> type[Kind]:
    """The same optimizer without torch's compiler, whose import at the first step takes longer than that of torch.

    torch decorates `step` and the methods of Optimizer for its compiler. `step` loses its decorator here; the others
    get the answer that the compiler would give outside of a compiled function: the method itself.
    """
    for method in vars(torch.optim.Optimizer).values():
        plain = inspect.unwrap(method) if callable(method) else method
        if plain is not method:
            plain.__dynamo_disable = plain
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return cast("type[Kind]", type(kind.__name__, (kind,), {"step": step}))


def _sgd(weights: Any, spec: OptimizerSpec, **fast: bool) -> torch.optim.Optimizer:
    # torch refuses Nesterov without momentum; a search over both may propose it, and it means plain SGD.
    nesterov = spec.nesterov and spec.momentum > 0
    return eager(torch.optim.SGD)(
        weights, spec.lr, momentum=spec.momentum, nesterov=nesterov, weight_decay=spec.weight_decay, **fast
    )


def _rmsprop(weights: Any, spec: OptimizerSpec, **_: bool) -> torch.optim.Optimizer:
    return eager(torch.optim.RMSprop)(weights, spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)


def _adam(weights: Any, spec: OptimizerSpec, **fast: bool) -> torch.optim.Optimizer:
    betas = (spec.beta1, spec.beta2)
    return eager(torch.optim.Adam)(weights, spec.lr, betas=betas, weight_decay=spec.weight_decay, **fast)


def _adamw(weights: Any, spec: OptimizerSpec, **fast: bool) -> torch.optim.Optimizer:
    betas = (spec.beta1, spec.beta2)
    return eager(torch.optim.AdamW)(weights, spec.lr, betas=betas, weight_decay=spec.weight_decay, **fast)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adamw,
}


def build_optimizer(spec: OptimizerSpec, net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the weights of net that train, now or later; as one fused kernel where torch has one.

    Each group has a `scale`, the factor of its learning rate: layer_decay to the power of its distance from the head.
    """
    transfer = transfer_of(net)
    later = transfer is not None and transfer.unfreeze_epoch is not None
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.requires_grad or later], "scale": spec.layer_decay**distance}
        for distance, weights in by_depth(net).items()
    ]
    groups = [group for group in groups if group["params"]]
    # A fused optimizer loops over the weights once, not once per operation: steps of small networks are 1.2 to 3 times
    # as fast.
    return OPTIMIZERS[spec.name](groups, spec, fused=groups[0]["params"][0].device.type in ("cpu", "cuda"))


def by_depth(net: nn.Module) -> dict[int, list[nn.Parameter]]:
    """The weights of net by their distance from the head, in stages; the head's is 0."""
    transfer = transfer_of(net)
    columns = [[*stages(body), transfer.head] for body in transfer.bodies] if transfer else [stages(net)]
    far = max(map(len, columns))  # weights outside of any stage, such as a class token, go with the first
    distance = {
        id(weight): place
        for column in columns
        for place, part in enumerate(reversed(column))
        for weight in part.parameters()
    }
    found: dict[int, list[nn.Parameter]] = {}
    for weight in net.parameters():
        found.setdefault(distance.get(id(weight), far - 1), []).append(weight)
    return found


# Name -> factor of the learning rate after the warm-up: (spec, share of the remaining batches that are done, epochs
# that are done).
SCHEDULES: dict[str, Callable[[ScheduleSpec, float, int], float]] = {
    "constant": lambda _spec, _done, _epoch: 1.0,
    "cosine": lambda _spec, done, _epoch: 0.5 * (1 + math.cos(math.pi * done)),
    "one_cycle": lambda _spec, done, _epoch: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda spec, _done, epoch: float(spec.gamma ** (epoch // spec.step_epochs)),
    "exponential": lambda spec, _done, epoch: float(spec.gamma**epoch),
}


def learning_rate_factor(spec: ScheduleSpec, *, step: int, steps: int, steps_per_epoch: int) -> float:
    """The factor, in [0, 1], of the learning rate in batch `step` of `steps`, counted from 0."""
    warmup = (spec.warmup or 0.3) if spec.name == "one_cycle" else spec.warmup
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return SCHEDULES[spec.name](spec, (step - rising) / max(1, steps - rising), step // steps_per_epoch)
