"""Several trainings in one loop: each with its own rates, order of images and end, all with one computation."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from hpo.errors import TrainingError
from hpo.learn.augment import build_augment, mix_batch
from hpo.learn.data import TrialData
from hpo.learn.features import pick_view
from hpo.learn.metrics import scores
from hpo.learn.optimizers import OPTIMIZERS, learning_rate_factor
from hpo.learn.stack_layers import StackedNets, UnstackableError, shape_of, sort_key
from hpo.learn.train import class_weights, input_of, moving_average, predict_logits
from hpo.records import Epoch
from hpo.spec.scores import SCORES
from hpo.spec.training import TrainingSpec


@dataclass
class Member:
    """One training of a stack: what train() knows in its local variables."""

    net: nn.Module
    data: TrialData
    spec: TrainingSpec
    generator: torch.Generator  # data order and augmentation
    noise: torch.Generator  # dropout
    averaged: AveragedModel | None
    ready: deque[Epoch | TrainingError] = field(default_factory=deque)
    waits: bool = False
    epoch: int = 0
    step: int = 0
    best_score: float = -float("inf")
    best_epoch: int = 0
    best_state: dict[str, Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    group: dict[str, Any] = field(default_factory=dict)
    weights: list[nn.Parameter] = field(default_factory=list)
    order: Tensor = field(default_factory=lambda: torch.empty(0))
    rate: float = 0.0

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated and kept."""
        kept: nn.Module = self.net if self.averaged is None else self.averaged.module
        return kept


def key_of(net: nn.Module, data: TrialData, spec: TrainingSpec, precision: str) -> tuple[Any, ...]:
    """Trainings with the same key can share a stack. Raises UnstackableError, with the reason."""
    if spec.micro_batch is not None:
        raise UnstackableError("micro-batches")
    if spec.optimizer.layer_decay != 1:
        raise UnstackableError("layer_decay")
    place = (data.images.data_ptr(), data.images.shape, len(data.train), data.mean, data.std)
    return (*shape_of(net), place, str(data.images.device), spec.batch_size, spec.class_weights, precision)


class Stack:
    """Trainings of one key. They join and leave between epochs; each is iterated by its own trial.

    An iteration of a member gives None once in each epoch, for "everyone is to be asked before I train", and then the
    Epoch: so a worker asks all its trials once, and those that gave None again.
    """

    def __init__(self, *, precision: str) -> None:
        self._precision = precision
        self._members: list[Member] = []
        self._stacked: StackedNets | None = None
        self._in_stack: list[Member] = []  # in the order of its rows
        self._optimizers: list[torch.optim.Optimizer] = []

    def join(self, net: nn.Module, data: TrialData, spec: TrainingSpec, *, seed: int) -> Iterator[Epoch | None]:
        """The epochs of one training, as train() gives them, with a None before each."""
        net.to(data.images.device)
        member = Member(
            net=net,
            data=data,
            spec=spec,
            generator=torch.Generator().manual_seed(seed),
            noise=torch.Generator(data.images.device).manual_seed(seed),
            averaged=moving_average(net, spec.ema) if spec.ema else None,
        )
        self._dissolve()
        self._members.append(member)
        try:
            while True:
                member.waits = True
                yield None
                if not member.ready:
                    self._train_epoch([each for each in self._members if each.waits])
                member.waits = False
                epoch = member.ready.popleft()
                if isinstance(epoch, TrainingError):
                    raise epoch
                yield epoch
                if epoch.last:
                    return
        finally:
            self._dissolve()
            self._members.remove(member)
            if member.best_state is not None or member.averaged is not None:
                net.load_state_dict(member.best_state or member.judged.state_dict())

    def _dissolve(self) -> None:
        """Give every member its own weights and optimizer state, before another stack is made of others."""
        if self._stacked is None:
            return
        self._stacked.release()
        self._stacked = None

    def _form(self, members: list[Member]) -> StackedNets:
        members.sort(key=lambda member: sort_key(member.net))
        stacked = StackedNets([member.net for member in members])
        optimizers: dict[str, torch.optim.Optimizer] = {}
        for row, member in enumerate(members):
            weights = stacked.weights_of(row)
            spec = member.spec.optimizer
            optimizer = OPTIMIZERS[spec.name](weights, spec, fused=weights[0].device.type in ("cpu", "cuda"))
            _carry_over(member, optimizer, weights)
            member.weights, member.group = weights, optimizer.param_groups[0]
            # One optimizer for all of a kind, each member with a group of its own, steps in half the time.
            member.optimizer = optimizers.setdefault(spec.name, optimizer)
            if member.optimizer is not optimizer:
                member.optimizer.add_param_group(member.group)
                member.optimizer.state.update(optimizer.state)
        self._optimizers = list(optimizers.values())
        return stacked

    def _train_epoch(self, members: list[Member]) -> None:
        """Train one epoch of all of these and leave each its Epoch."""
        started = time.perf_counter()
        if self._stacked is None or len(members) != len(self._in_stack):
            self._dissolve()
            self._stacked, self._in_stack = self._form(members), members
        members = self._in_stack
        torch.set_flush_denormal(True)
        try:
            totals = self._steps(self._stacked, members)
        finally:
            torch.set_flush_denormal(False)
        judged = [self._judge(member, *total) for member, total in zip(members, totals, strict=True)]
        # What each of them would have taken alone is unknown: they share the time.
        seconds = (time.perf_counter() - started) / len(members)
        for member, epoch in zip(members, judged, strict=True):
            member.ready.append(replace(epoch, seconds=seconds) if isinstance(epoch, Epoch) else epoch)

    def _steps(self, stacked: StackedNets, members: list[Member]) -> list[tuple[float, float]]:
        """The batches of an epoch; mean loss and accuracy over them, of each member."""
        data, spec = members[0].data, members[0].spec
        device = data.images.device
        normalise = input_of(data)
        weights = (
            class_weights(data.labels[data.train], len(data.class_names)) if spec.class_weights == "balanced" else None
        )
        smoothing = torch.tensor([member.spec.label_smoothing for member in members], device=device)
        noises = [member.noise for member in members]
        parameters = list(stacked.parameters())
        pixels = data.images.dtype == torch.uint8
        augments = [build_augment(member.spec.augment) if pixels else pick_view for member in members]
        mixes = any(member.spec.augment.mixup or member.spec.augment.cutmix for member in members)
        # Images that nobody changes are gathered and normalised in one go.
        together = not mixes and not any(augments)
        batches = -(-len(data.train) // spec.batch_size)
        totals = torch.zeros(len(members), 2, dtype=torch.float64, device=device)
        seen = 0
        for member in members:
            member.epoch += 1
            member.order = data.train[torch.randperm(len(data.train), generator=member.generator).to(device)]
        orders = torch.stack([member.order for member in members])
        for rows in torch.split(orders, spec.batch_size, dim=1):
            count = rows.shape[1]
            for member in members:
                factor = learning_rate_factor(
                    member.spec.schedule, step=member.step, steps=member.spec.epochs * batches, steps_per_epoch=batches
                )
                member.step += 1
                member.rate = member.spec.optimizer.lr * factor
            if count == 1 and len(data.train) > 1:
                continue
            labels = data.labels.index_select(0, rows.flatten()).view(rows.shape)
            others, shares = labels, None
            if together:
                inputs = normalise(data.images.index_select(0, rows.flatten())).reshape(len(members), count, -1)
            else:
                pieces, mixed = [], []
                for member, own, augment, theirs in zip(members, rows, augments, labels, strict=True):
                    images = data.images.index_select(0, own)
                    if augment is not None:
                        images = augment(images, member.generator)
                    piece, _, other, share = mix_batch(normalise(images), theirs, member.spec.augment, member.generator)
                    pieces.append(piece.flatten(1))
                    mixed.append((other, share))
                inputs = torch.stack(pieces)
                if mixes:
                    others = torch.stack([other for other, _ in mixed])
                    shares = torch.tensor([share for _, share in mixed], device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
                logits = stacked(inputs, noises)
            logits = logits.float()
            losses = cross_entropies(logits, labels, smoothing, weights)
            if shares is not None:
                losses = shares * losses + (1 - shares) * cross_entropies(logits, others, smoothing, weights)
            # Fused optimizers read memory in order, whatever the strides of a gradient say.
            gradients = [found.contiguous() for found in torch.autograd.grad(losses.sum(), parameters)]
            for row, member in enumerate(members):
                member.group["lr"] = member.rate
                for weight, gradient in zip(member.weights, gradients, strict=True):
                    weight.grad = gradient[row]
                if member.spec.clip_norm is not None:
                    nn.utils.clip_grad_norm_(member.weights, member.spec.clip_norm)
            for optimizer in self._optimizers:
                optimizer.step()
            for member in members:
                if member.averaged is not None:
                    member.averaged.update_parameters(member.net)
            with torch.no_grad():
                hits = (logits.argmax(2) == labels).sum(1)
                totals += torch.stack([losses.double() * count, hits.double()], dim=1)
            seen += count
        return [(loss / seen, hits / seen) for loss, hits in totals.tolist()]

    def _judge(self, member: Member, loss: float, accuracy: float) -> Epoch | TrainingError:
        """Evaluate a member after an epoch, and note its best weights."""
        spec, data = member.spec, member.data
        measured = {"train_loss": loss, "train_accuracy": accuracy}
        if len(data.valid):
            logits = predict_logits(member.judged, data, data.valid, precision=self._precision)
            member.net.train()
            measured |= {f"valid_{name}": value for name, value in scores(logits, data.labels[data.valid]).items()}
        losses = {name: value for name, value in measured.items() if name.endswith("_loss")}
        if not all(map(math.isfinite, losses.values())):
            shown = ", ".join(f"{name} {value}" for name, value in losses.items())
            return TrainingError(f"epoch {member.epoch}: {shown}.", "It diverged: a lower learning rate usually helps.")
        sign = 1.0 if SCORES[spec.monitor] == "maximize" else -1.0
        if len(data.valid) and sign * measured[spec.monitor] > member.best_score:
            member.best_score, member.best_epoch = sign * measured[spec.monitor], member.epoch
            member.best_state = {name: tensor.clone() for name, tensor in member.judged.state_dict().items()}
        stale = spec.patience is not None and member.epoch - member.best_epoch >= spec.patience and len(data.valid) > 0
        last = stale or member.epoch == spec.epochs
        return Epoch(number=member.epoch, scores=measured, learning_rate=member.rate, seconds=0.0, last=last)


def cross_entropies(logits: Tensor, labels: Tensor, smoothing: Tensor, weights: Tensor | None) -> Tensor:
    """functional.cross_entropy of each network: logits (networks, n, classes), labels (networks, n) -> (networks,).

    smoothing is (networks,); weights are those of the classes.
    """
    logs = functional.log_softmax(logits, dim=2)
    weighted = logs if weights is None else logs * weights
    picked = -weighted.gather(2, labels.unsqueeze(2)).squeeze(2)
    whole = labels.shape[1] if weights is None else weights[labels].sum(1)
    hard = picked.sum(1) / whole
    soft = -weighted.sum((1, 2)) / (logits.shape[2] * whole)
    return (1 - smoothing) * hard + smoothing * soft


def _carry_over(member: Member, optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    """Give a member's new optimizer the moments of its last one; the padding, of 0s, may be another now."""
    if member.optimizer is None:
        return
    for old, new in zip(member.weights, weights, strict=True):
        for name, value in member.optimizer.state.get(old, {}).items():
            if isinstance(value, Tensor) and value.shape == old.shape:
                moved = torch.zeros_like(new)
                region = tuple(slice(min(pair)) for pair in zip(old.shape, new.shape, strict=True))
                moved[region] = value[region]
                value = moved
            optimizer.state[new][name] = value
