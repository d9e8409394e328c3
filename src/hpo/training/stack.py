"""Several trainings in one loop: one computation; rates, order of images and end are each training's own."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hpo.data.prepare import TrialData
from hpo.errors import NotFiniteError
from hpo.metrics import scores
from hpo.models import input_of
from hpo.records import Epoch
from hpo.spec.training import TrainingSpec
from hpo.training.augment import mix_batch
from hpo.training.batches import Batches
from hpo.training.checkpoint import random_state, set_random_state
from hpo.training.device import device_clock, has_bfloat16, put
from hpo.training.loop import EarlyStopping, evaluation_batch, moving_average, requested_of, train
from hpo.training.optimizers import OPTIMIZERS, class_weights, learning_rate_factor
from hpo.training.stack_layers import BrokenStackError, key_of, sort_key
from hpo.training.stack_nets import StackedNets, cross_entropies

_STEPS = 4
_SOME = 4  # networks in a measured stack, which represents larger ones
FULL = 0.003  # seconds; a CPU step that takes longer is all arithmetic, and a stack does not make it faster


@dataclass
class Member:
    """The state of one training of a stack, as _Training of hpo.training.loop holds it."""

    net: nn.Module
    data: TrialData
    spec: TrainingSpec
    generator: torch.Generator  # data order and augmentation
    noise: torch.Generator  # dropout
    batches: Batches
    averaged: AveragedModel | None
    stopping: EarlyStopping
    ready: deque[Epoch | Exception] = field(default_factory=deque)
    waits: bool = False
    epoch: int = 0
    step: int = 0
    optimizer: torch.optim.Optimizer | None = None
    group: dict[str, Any] = field(default_factory=dict)
    weights: list[nn.Parameter] = field(default_factory=list)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and kept."""
        kept: nn.Module = self.net if self.averaged is None else self.averaged.module
        return kept


class Stacks:
    """The stacks of a process that runs up to `places` trainings at once.

    precisions holds the automatic ones measured here, by kind and size of network (Built.key): similar trainings need
    the same one to share. slower holds, by the same key, the reason why networks with convolutions train faster alone
    here, "" if they do not.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.precisions: dict[str, str] = {}
        self.slower: dict[str, str] = {}
        self._stacks: dict[tuple[Any, ...], Stack] = {}

    def join(
        self, net: nn.Module, data: TrialData, spec: TrainingSpec, *, seed: int, precision: str
    ) -> Generator[Epoch | None, None, None]:
        """The epochs of a training that shares its computation with those of its key; see Stack.join."""
        key = key_of(net, data, spec, precision)
        # Those without members would keep data that nobody needs.
        self._stacks = {other: stack for other, stack in self._stacks.items() if stack.members}
        return self._stacks.setdefault(key, Stack(precision=precision)).join(net, data, spec, seed=seed)


def alongside(fit: Generator[Epoch, None, None], device: torch.device) -> Generator[Epoch, None, None]:
    """Epochs of a training that shares only its process: torch's global random state is its own while it trains."""
    state = None
    devices = [device] if device.type == "cuda" else []
    try:
        while True:
            with torch.random.fork_rng(devices=devices):
                if state is not None:
                    set_random_state(state, torch.Generator(), device)
                epoch = next(fit, None)
                state = random_state(torch.Generator(), device)
            if epoch is None:
                return
            yield epoch
    finally:
        fit.close()


class Stack:
    """Trainings of one key. They join and leave between epochs; each is iterated by its own trial.

    The iterator of a member yields None before each Epoch. A worker advances all its trials once, so that every member
    is ready, and then again those that yielded None: the first of these trains the epoch of all. If the computation
    fails, all members raise BrokenStackError and may continue alone.
    """

    def __init__(self, *, precision: str) -> None:
        self.members: list[Member] = []
        self._precision = precision
        self._stacked: StackedNets | None = None
        self._in_stack: list[Member] = []  # in the order of its rows
        self._optimizers: list[torch.optim.Optimizer] = []

    def join(
        self, net: nn.Module, data: TrialData, spec: TrainingSpec, *, seed: int
    ) -> Generator[Epoch | None, None, None]:
        """The epochs of one training, as train() yields them, with a None before each."""
        net.to(data.images.device)
        member = Member(
            net=net,
            data=data,
            spec=spec,
            generator=torch.Generator().manual_seed(seed),
            noise=torch.Generator(data.images.device).manual_seed(seed),
            batches=Batches(data.images, spec.augment),
            averaged=moving_average(net, spec.ema) if spec.ema else None,
            stopping=EarlyStopping(spec, validates=len(data.valid) > 0),
        )
        self._dissolve()
        self.members.append(member)
        try:
            while True:
                member.waits = True
                yield None
                if not member.ready:
                    self._train_epoch([each for each in self.members if each.waits])
                member.waits = False
                epoch = member.ready.popleft()
                if isinstance(epoch, Exception):
                    raise epoch
                yield epoch
                if epoch.last:
                    return
        finally:
            self._dissolve()
            self.members.remove(member)
            if member.stopping.state is not None or member.averaged is not None:
                net.load_state_dict(member.stopping.state or member.evaluated.state_dict())

    def _dissolve(self) -> None:
        """Return weights and optimizer state to each member, before a stack of other members is formed."""
        if self._stacked is None:
            return
        self._stacked.release()
        self._stacked, self._in_stack, self._optimizers = None, [], []

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
        """Train one epoch of these members; each receives its Epoch or an error."""
        started = time.perf_counter()
        if self._stacked is None or len(members) != len(self._in_stack):
            self._dissolve()
            self._stacked, self._in_stack = self._form(members), members
        members = self._in_stack
        torch.set_flush_denormal(True)
        try:
            totals = self._steps(self._stacked, members)
            logits = self._validate(members)
            judged = [_judge(*each) for each in zip(members, totals, logits, strict=True)]
        except Exception as error:  # noqa: BLE001
            # The text only: an error with its traceback would keep tensors alive until the last member has received it.
            words = f"{type(error).__name__}: {error}"
            for member in members:
                member.ready.append(BrokenStackError(words))
            return
        finally:
            torch.set_flush_denormal(False)
        # The time of each alone is unknown: all get an equal share.
        seconds = (time.perf_counter() - started) / len(members)
        for member, epoch in zip(members, judged, strict=True):
            member.ready.append(replace(epoch, seconds=seconds) if isinstance(epoch, Epoch) else epoch)

    def _steps(self, stacked: StackedNets, members: list[Member]) -> list[tuple[float, float]]:
        """The batches of an epoch; mean loss and accuracy over them, of each member."""
        data, spec = members[0].data, members[0].spec
        device = data.images.device
        balanced = spec.class_weights == "balanced"
        weights = class_weights(data.labels[data.train], len(data.class_names)) if balanced else None
        smoothing = put(torch.tensor([member.spec.label_smoothing for member in members]), device)
        smoothed = smoothing if any(member.spec.label_smoothing for member in members) else None
        noises = [member.noise for member in members]
        inputs_of = _Inputs(members)
        steps_per_epoch, count = -(-len(data.train) // spec.batch_size), len(data.train)
        single = count % spec.batch_size == 1 < min(spec.batch_size, count)
        totals = torch.zeros(2, len(members), dtype=torch.float64, device=device)
        orders, sources = [], []
        for member in members:
            member.epoch += 1
            order = data.train[put(torch.randperm(count, generator=member.generator), device)]
            orders.append(order[:-1] if single else order)  # batch norm cannot learn from a single image
            sources.append(member.batches.rows(orders[-1], spec.batch_size, member.generator))
        batches = [torch.split(torch.stack(each), spec.batch_size, dim=1) for each in (orders, sources)]
        for rows, gathered in zip(*batches, strict=True):
            for member in members:
                factor = learning_rate_factor(
                    member.spec.schedule,
                    step=member.step,
                    steps=member.spec.epochs * steps_per_epoch,
                    steps_per_epoch=steps_per_epoch,
                )
                member.step += 1
                member.group["lr"] = member.spec.optimizer.lr * factor
            inputs, labels, others, shares = inputs_of(rows, gathered)
            logits = stacked(inputs, noises, half=self._precision == "bfloat16")
            losses = cross_entropies(logits, labels, smoothed, weights)
            if shares is not None:
                losses = shares * losses + (1 - shares) * cross_entropies(logits, others, smoothed, weights)
            stacked.forget()
            torch.autograd.backward(losses.sum())
            for member in members:
                if member.spec.clip_norm is not None:
                    nn.utils.clip_grad_norm_(member.weights, member.spec.clip_norm)
            for optimizer in self._optimizers:
                optimizer.step()
            for member in members:
                if member.averaged is not None:
                    member.averaged.update_parameters(member.net)
            totals[0] += losses.detach().double() * rows.shape[1]
            totals[1] += (logits.detach().argmax(2) == labels).sum(1)
        for member in members:
            member.step += single
        return [(loss / (count - single), hits / (count - single)) for loss, hits in totals.t().tolist()]

    def _validate(self, members: list[Member]) -> list[Tensor]:
        """Logits (validation images, classes) of each member, from batches that all of them share."""
        data = members[0].data
        normalise = input_of(data)
        judged = [member.evaluated.eval() for member in members]
        parts: list[list[Tensor]] = [[] for _ in members]
        half = self._precision == "bfloat16"
        with torch.inference_mode(), torch.autocast(data.images.device.type, torch.bfloat16, enabled=half):
            for rows in torch.split(data.valid, evaluation_batch(data.images.device)):
                inputs = normalise(data.images.index_select(0, rows))
                for part, net in zip(parts, judged, strict=True):
                    part.append(net(inputs).float())
        for member in members:
            member.net.train()
        return [torch.cat(part) if part else torch.empty(0) for part in parts]


class _Inputs:
    """The inputs of a stack's members in a step."""

    def __init__(self, members: list[Member]) -> None:
        self._members, self._data = members, members[0].data
        self._normalise = input_of(self._data)
        self._mixes = any(member.spec.augment.mixup or member.spec.augment.cutmix for member in members)
        sources = [member.batches.source for member in members]
        # Where nothing is drawn for a batch, the images of all are gathered and normalised in one go.
        together = not self._mixes and all(source is sources[0] for source in sources)
        self._source = sources[0] if together else None

    def __call__(self, rows: Tensor, gathered: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Inputs (members, n, ...), labels, other labels and shares of rows (members, n); gathered: of Batches.rows.

        Labels and the others that they are mixed with are (members, n); shares of the first are (members,), None where
        nothing is mixed.
        """
        labels = self._data.labels.index_select(0, rows.flatten()).view(rows.shape)
        if self._source is not None:
            inputs = self._normalise(self._source.index_select(0, gathered.flatten()))
            return inputs.view(*rows.shape, *inputs.shape[1:]), labels, labels, None
        parts = [self._mixed(*each) for each in zip(self._members, gathered, labels, strict=True)]
        inputs = torch.stack([part for part, _, _ in parts])
        if not self._mixes:
            return inputs, labels, labels, None
        shares = put(torch.tensor([share for _, _, share in parts]), labels.device)
        return inputs, labels, torch.stack([other for _, other, _ in parts]), shares

    def _mixed(self, member: Member, gathered: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        images = self._normalise(member.batches.gather(gathered, member.generator))
        inputs, _, others, share = mix_batch(images, labels, member.spec.augment, member.generator)
        return inputs, others, share


def _judge(member: Member, total: tuple[float, float], logits: Tensor) -> Epoch | NotFiniteError:
    """A member's epoch from its training loss and accuracy and its validation logits; its best weights are noted."""
    measured = {"train_loss": total[0], "train_accuracy": total[1]}
    if len(member.data.valid):
        labels = member.data.labels[member.data.valid]
        found = scores(logits, labels, further=requested_of(member.spec, member.data))
        measured |= {f"valid_{name}": value for name, value in found.items()}
    try:
        last = member.stopping.note(member.epoch, measured, member.evaluated)
    except NotFiniteError as error:  # concerns this member only
        return error
    return Epoch(number=member.epoch, scores=measured, learning_rate=member.group["lr"], seconds=0.0, last=last)


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


def step_seconds(net: nn.Module, data: TrialData, spec: TrainingSpec, *, together: int, precision: str) -> float:
    """Seconds of a training step for each of `together` such networks; 1 is alone. The network is unchanged.

    On a CPU they are CPU seconds of this thread, so other processes do not count.
    """
    rows = data.train[: _STEPS * spec.batch_size]
    few = replace(data, train=rows, valid=data.valid[:0])
    brief = spec.model_copy(update={"epochs": 2, "patience": None, "precision": precision})
    nets = [copy.deepcopy(net) for _ in range(together)]
    clock = device_clock(few.images.device)
    with torch.random.fork_rng(devices=[few.images.device] if few.images.device.type == "cuda" else []):
        if together == 1:
            fits: list[Generator[Epoch | None, None, None]] = [train(nets[0], few, brief, seed=0, precision=precision)]
        else:
            stack = Stack(precision=precision)
            fits = [stack.join(each, few, brief, seed=0) for each in nets]
        for _ in range(brief.epochs):  # the first warms up
            started = clock()
            for waits in [fit for fit in fits if next(fit) is None]:
                next(waits)
            seconds = clock() - started
        for fit in fits:
            fit.close()
    return seconds / together / -(-len(rows) // spec.batch_size)


def shared_precision(net: nn.Module, data: TrialData, spec: TrainingSpec) -> str:
    """float32 or bfloat16, whichever trains a stack of networks like this one faster."""
    if not has_bfloat16(data.images.device):
        return "float32"
    seconds = shared_seconds(net, data, spec, together=_SOME)
    return min(seconds, key=seconds.__getitem__)


def why_slower_stacked(net: nn.Module, data: TrialData, spec: TrainingSpec) -> str:
    """The reason why a network like this one trains faster alone on its device; "" if it does not."""
    alone = min(shared_seconds(net, data, spec, together=1).values())
    if data.images.device.type == "cpu" and alone > FULL:
        return f"a step takes {1000 * alone:.1f} ms, all of it computing"
    gain = alone / min(shared_seconds(net, data, spec, together=_SOME).values())
    return "" if gain > 1 else f"side by side it is {gain:.2f} times as fast as alone here"


def shared_seconds(net: nn.Module, data: TrialData, spec: TrainingSpec, *, together: int) -> dict[str, float]:
    """Seconds of a step in a stack of `together` (1: alone), by precision that the spec and the device allow."""
    half = spec.precision == "bfloat16" or (spec.precision == "auto" and has_bfloat16(data.images.device))
    precisions = ["float32"] * (spec.precision != "bfloat16") + ["bfloat16"] * half
    return {each: step_seconds(net, data, spec, together=together, precision=each) for each in precisions}
