"""Several trainings in one loop: one computation; rates, order of images and end are each training's own."""

from __future__ import annotations

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
from hpo.training.device import put
from hpo.training.loop import EarlyStopping, evaluation_batch, moving_average, requested_of
from hpo.training.optimizers import OPTIMIZERS, class_weights, learning_rate_factor
from hpo.training.stack_layers import BrokenStackError, key_of, sort_key
from hpo.training.stack_nets import StackedNets, cross_entropies
from hpo.training.step_graph import Step, StepGraph, step_side_by_side, why_not


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
        self,
        net: nn.Module,
        data: TrialData,
        spec: TrainingSpec,
        *,
        seed: int,
        precision: str,
        until: float | None = None,
    ) -> Generator[Epoch | None, None, None]:
        """The epochs of a training that shares its computation with those of its key; see Stack.join."""
        key = key_of(net, data, spec, precision)
        # Those without members would keep data that nobody needs.
        self._stacks = {other: stack for other, stack in self._stacks.items() if stack.members}
        stack = self._stacks.setdefault(key, Stack(precision=precision))
        return stack.join(net, data, spec, seed=seed, until=until)


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
        self._captured: StepGraph | None = None
        self.not_captured = ""  # the reason why its steps are no CUDA graph, once that is known

    def join(
        self, net: nn.Module, data: TrialData, spec: TrainingSpec, *, seed: int, until: float | None = None
    ) -> Generator[Epoch | None, None, None]:
        """The epochs of one training, as train() yields them, with a None before each."""
        net.to(data.images.device)
        member = Member(
            net=net,
            data=data,
            spec=spec,
            generator=torch.Generator().manual_seed(seed),
            noise=torch.Generator(data.images.device).manual_seed(seed),
            batches=Batches(data.images, spec.augment, seed=seed),
            averaged=moving_average(net, spec.ema) if spec.ema else None,
            stopping=EarlyStopping(spec, validates=len(data.valid) > 0, until=until),
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
        self._stacked, self._in_stack, self._optimizers, self._captured = None, [], [], None

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
            # On a CPU one optimizer for all of a kind, each member with a group of its own, steps in half the time.
            key = str(row) if weights[0].device.type == "cuda" else spec.name
            member.optimizer = optimizers.setdefault(key, optimizer)
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
        data, size = members[0].data, members[0].spec.batch_size
        count = len(data.train)
        single = count % size == 1 < min(size, count)
        orders, sources = [], []
        for member in members:
            member.epoch += 1
            order = data.train[put(torch.randperm(count, generator=member.generator), data.images.device)]
            orders.append(order[:-1] if single else order)  # batch norm cannot learn from a single image
            sources.append(member.batches.rows(orders[-1], size, member.generator, epoch=member.epoch))
        tables = torch.stack(orders), torch.stack(sources)
        learn, begun = self._learner(stacked, members), members[0].step
        totals = self._captured_steps(learn, stacked, members, *tables)
        done = members[0].step - begun
        for rows, gathered in zip(*(torch.split(table, size, dim=1)[done:] for table in tables), strict=True):
            self._set_rates(members)
            losses, hits = learn(rows, gathered)
            totals += torch.stack([losses.double() * rows.shape[1], hits.double()])
        for member in members:
            member.step += single
        return [(loss / (count - single), hits / (count - single)) for loss, hits in totals.t().tolist()]

    def _learner(self, stacked: StackedNets, members: list[Member]) -> Step:
        """A step of all members, from the rows of their images (members, n): their losses and hits (members,)."""
        data, spec = members[0].data, members[0].spec
        balanced = spec.class_weights == "balanced"
        weights = class_weights(data.labels[data.train], len(data.class_names)) if balanced else None
        smoothing = put(torch.tensor([member.spec.label_smoothing for member in members]), data.images.device)
        smoothed = smoothing if any(member.spec.label_smoothing for member in members) else None
        noises = [member.noise for member in members]
        inputs_of = _Inputs(members)

        def learn(rows: Tensor, gathered: Tensor) -> tuple[Tensor, Tensor]:
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
            step_side_by_side(self._optimizers, data.images.device)
            for member in members:
                if member.averaged is not None:
                    member.averaged.update_parameters(member.net)
            return losses.detach(), (logits.detach().argmax(2) == labels).sum(1)

        return learn

    def _captured_steps(
        self, learn: Step, stacked: StackedNets, members: list[Member], rows: Tensor, sources: Tensor
    ) -> Tensor:
        """Sums of losses and hits (2, members) of the full batches, from a CUDA graph; 0 where there is none."""
        size, totals = members[0].spec.batch_size, torch.zeros(2, len(members), dtype=torch.float64, device=rows.device)
        full = rows.shape[1] // size
        self.not_captured = self.not_captured or next(
            filter(None, (why_not(member.net, member.data, member.spec, own=False) for member in members)), ""
        )
        if self.not_captured:
            return totals
        # (members, images) -> (steps, members, batch)
        rows, sources = (part[:, : full * size].view(-1, full, size).transpose(0, 1) for part in (rows, sources))
        if self._captured is None:
            noises = [member.noise for member in members]
            kept = list(stacked.state_dict().values())
            try:
                self._captured = StepGraph(learn, self._optimizers, kept, rows=rows, sources=sources, generators=noises)
            except Exception as error:  # noqa: BLE001 - the eager step does what cannot be captured
                self.not_captured = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
                return totals
        losses, hits = self._captured.run(rows, sources, [self._set_rates(members) for _ in range(full)])
        return totals + torch.stack([losses.double().sum(0) * size, hits.double().sum(0)])

    def _set_rates(self, members: list[Member]) -> list[float]:
        """Set the learning rates of the next step; those of all groups of the optimizers."""
        steps_per_epoch = -(-len(members[0].data.train) // members[0].spec.batch_size)
        for member in members:
            steps = member.spec.epochs * steps_per_epoch
            factor = learning_rate_factor(
                member.spec.schedule, step=member.step, steps=steps, epoch=member.step // steps_per_epoch
            )
            member.step += 1
            member.group["lr"] = member.spec.optimizer.lr * factor
        return [group["lr"] for optimizer in self._optimizers for group in optimizer.param_groups]

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
