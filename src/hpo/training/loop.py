"""One training of one network, as a generator of epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from hpo.data.prepare import TrialData
from hpo.errors import NotFiniteError
from hpo.metrics import Metric, direction_of, scores
from hpo.models import input_of
from hpo.models.transfer import transfer_of
from hpo.records import Epoch
from hpo.spec.own_code import requested
from hpo.spec.training import TrainingSpec
from hpo.training.augment import mix_batch
from hpo.training.batches import Batches, GrowingSubset
from hpo.training.checkpoint import random_state, set_random_state
from hpo.training.data_parallel import ALONE, Forward, Ranks
from hpo.training.device import lay_out, put
from hpo.training.optimizers import Loss, balanced_order, build_optimizer, learning_rate_factor
from hpo.training.profiler import phase
from hpo.training.step_graph import StepGraph

if TYPE_CHECKING:
    from hpo.training.device import Graph


# A batch that fits into memory with all that its gradient needs fits this many times without.
_PIECES = 4

# Receives an epoch and the state after it, which torch.load(weights_only=True) can read.
Save = Callable[[Epoch, Mapping[str, Any]], None]
# Receives, before each epoch is yielded, a function that returns that state, until the next epoch is asked for.
Offer = Callable[[Callable[[], Mapping[str, Any]]], None]


def requested_of(spec: TrainingSpec, data: TrialData) -> tuple[Metric, ...]:
    """The further metrics that a training computes: those that it names, and those of its data set."""
    names = [*data.scores, *spec.scores, spec.monitor]
    return requested(names, data.class_names, several=data.labels.ndim == 2)


def evaluation_batch(device: torch.device) -> int:
    """The batch size of evaluation.

    On a CPU it is what its caches hold: with 1024 a network of one convolution takes twice the time.
    """
    return 128 if device.type == "cpu" else 1024


def predict_logits(
    net: nn.Module, data: TrialData, rows: Tensor, *, precision: str, micro_batch: int | None = None
) -> Tensor:
    """Logits (len(rows), classes) float32 of the images in these rows; the network is left in evaluation mode.

    micro_batch is that of the training: where memory is short, evaluation batches are small, too.
    """
    net.eval()
    device = data.images.device
    normalise = input_of(data)
    # Backbones resize images, and their maps are larger than the images.
    batch = 64 if transfer_of(net) is not None else evaluation_batch(device)
    batch = min(batch, _PIECES * micro_batch) if micro_batch else batch
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        parts = [net(normalise(data.images.index_select(0, part))).float() for part in torch.split(rows, batch)]
    return torch.cat(parts)


def train(
    net: nn.Module,
    data: TrialData,
    spec: TrainingSpec,
    *,
    seed: int,
    precision: str,
    resume: Mapping[str, Any] | None = None,
    save: Save | None = None,
    offer: Offer | None = None,
    graph: Graph | None = None,
    ranks: Ranks = ALONE,
    until: float | None = None,
) -> Generator[Epoch, None, None]:
    """Train net in place and yield an Epoch after each evaluation; at the end net has its best epoch's weights.

    precision is float32 or bfloat16. The best epoch is that of spec.monitor; training ends after spec.epochs, after
    spec.patience epochs without a better one, or with the first epoch as good as until. Without validation rows the
    last weights are kept, as they are when the generator is closed early. Raises NotFiniteError where a loss is not
    finite. The result depends on seed, device, thread count and precision only.

    save is called before every spec.checkpoint-th epoch but the last is yielded, and offer before every epoch, for a
    caller that decides afterwards whether it wants the state. resume is a state that one of them received: the training
    continues after that epoch, to the result of an uninterrupted one. graph computes the batches of its shape; it was
    captured from this network on this data. ranks are the processes that train this network, which all call this with
    the same arguments.
    """
    forward = Forward(net, ranks, seed=seed)
    try:
        training = _Training(net, data, spec, forward, seed=seed, precision=precision, graph=graph, until=until)
        yield from training.epochs(resume, save, offer)
    finally:
        torch.set_flush_denormal(False)


class _Training:
    """The state of one training: network, optimizer, random generator, and the best epoch so far."""

    def __init__(
        self,
        net: nn.Module,
        data: TrialData,
        spec: TrainingSpec,
        forward: Forward,
        *,
        seed: int,
        precision: str,
        graph: Graph | None,
        until: float | None,
    ) -> None:
        self._net, self._data, self._spec, self._precision, self._graph = net, data, spec, precision, graph
        self._device, self._forward, self._ranks = data.images.device, forward, forward.ranks
        if graph is None or graph.forward is None:  # a graph reads the weights where they were when it was captured
            lay_out(net, self._device, precision)
        # Dropout draws from torch's global generator; data order and augmentation from one of their own.
        torch.manual_seed(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = build_optimizer(spec.optimizer, net)
        self._batches = Batches(data.images, spec.augment, seed=seed)
        self._normalise = input_of(data)
        self._requested = requested_of(spec, data)
        self._averaged = moving_average(net, spec.ema) if spec.ema else None
        self._evaluated: nn.Module = net if self._averaged is None else self._averaged.module
        self._transfer = transfer_of(net)
        self._loss_of = Loss(spec, data)
        self._subset = GrowingSubset(data, spec, seed=seed)
        self._steps = self._subset.batches(spec.epochs)
        self._stopping = EarlyStopping(spec, validates=len(data.valid) > 0, until=until)
        self._step, self._epoch = 0, 0  # done
        self._sides: tuple[int, int] | None = None  # to which the images of this epoch are shrunk
        self._captured: StepGraph | None = None
        # All that learns. The position in the schedule follows from the epoch.
        self._learning: dict[str, Any] = {"net": net, "optimizer": self._optimizer}
        self._learning |= {"averaged": self._averaged} if self._averaged else {}

    def epochs(
        self, resume: Mapping[str, Any] | None, save: Save | None, offer: Offer | None
    ) -> Generator[Epoch, None, None]:
        """Yield the epochs, from the first or from the one after resume; see train."""
        first = 1 if resume is None else self._restore(resume)
        self._step = self._subset.batches(first - 1)
        for number in range(first, self._spec.epochs + 1):
            started = time.perf_counter()
            # Subnormal numbers make a step a hundred times slower and mean nothing here. This is a state of the thread,
            # and the receiver of the epoch may need them.
            torch.set_flush_denormal(True)
            self._epoch = number - 1  # not from the step: epochs of growing data differ in batches
            measured, rate = self._train_epoch(number)
            if len(self._data.valid) and self._ranks.leads:
                measured |= self._evaluate()
            measured = self._ranks.same(measured)
            last = self._stopping.note(number, measured, self._evaluated)
            seconds = time.perf_counter() - started
            torch.set_flush_denormal(False)
            epoch = Epoch(number=number, scores=measured, learning_rate=rate, seconds=seconds, last=last)
            if save is not None and self._spec.checkpoint and number % self._spec.checkpoint == 0 and not last:
                save(epoch, self._state(number))
            if offer is not None:
                # Copied now: while it waits, other trainings of this process draw from torch's global generator.
                offer(partial(self._state, number, random_state(self._generator, self._device)))
            yield epoch
            if last:
                break
        if self._stopping.state is not None or self._averaged is not None:
            self._net.load_state_dict(self._stopping.state or self._evaluated.state_dict())

    def _state(self, number: int, chance: list[Tensor] | None = None) -> dict[str, Any]:
        """The state after epoch `number`, for _restore; its keys are those of stored checkpoints."""
        chance = chance or random_state(self._generator, self._device)
        best = self._stopping.score, self._stopping.epoch, self._stopping.state
        state = {name: part.state_dict() for name, part in self._learning.items()}
        return {**state, "epoch": number, "best": best, "chance": chance}

    def _restore(self, state: Mapping[str, Any]) -> int:
        """Return to a state of _state; the number of the next epoch."""
        for name, part in self._learning.items():
            part.load_state_dict(state[name])
        set_random_state(state["chance"], self._generator, self._device)
        self._stopping.score, self._stopping.epoch, self._stopping.state = state["best"]
        return int(state["epoch"]) + 1

    def _train_epoch(self, number: int) -> tuple[dict[str, float], float]:
        """Train the batches of an epoch; their mean loss and accuracy, and the last learning rate."""
        spec, data, device = self._spec, self._data, self._device
        if self._transfer is not None:
            self._transfer.begin_epoch(number)
        self._net.train()
        self._forward.begin_epoch(number)
        losses: list[Tensor] = []
        hits: list[Tensor] = []
        counts: list[tuple[int, float]] = []  # images in each batch, and how much those of this rank count
        rate = 0.0
        subset = self._subset.of(number)
        if spec.sampling == "balanced":
            order = balanced_order(data.labels[subset].cpu(), len(subset), self._generator)
        else:
            order = torch.randperm(len(subset), generator=self._generator)
        order = subset[put(order, device)]
        single = len(order) % spec.batch_size == 1 < min(spec.batch_size, len(order))
        order = order[:-1] if single else order  # batch norm cannot learn from a single image
        sources = self._batches.rows(order, spec.batch_size, self._generator, epoch=number)
        self._sides = _sides(data.images, spec.size_of(number))
        if self._graph is not None and self._graph.whole:
            losses, hits, rate = self._run_captured(order, sources, self._graph)
            counts = [(spec.batch_size, 1.0)] * len(losses)
        batches = zip(*(torch.split(part, spec.batch_size) for part in (order, sources)), strict=True)
        for rows, source in islice(batches, len(losses), None):
            rate = self._set_rate()
            loss, hit = self._learn(rows, source)
            losses.append(loss)
            hits.append(hit)
            counts.append((len(rows), self._ranks.part(len(rows))[1]))
        self._step += single
        # Added up once an epoch, in one transfer from the device.
        each = torch.stack([torch.stack(losses), torch.stack(hits).float()]).cpu().double()
        images, weights = torch.tensor(counts, dtype=torch.float64).T
        loss, accuracy = (self._ranks.total(torch.stack([each[0] @ images, each[1] @ weights])) / images.sum()).tolist()
        return {"train_loss": loss, "train_accuracy": accuracy}, rate

    def _learn(self, rows: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
        """One step, from the images of a batch; its mean loss and the number of images that were right."""
        spec, data = self._spec, self._data
        with phase("batch"):
            labels = self._loss_of.targets(rows)
        with phase("augment"):
            images = self._normalise(self._batches.gather(source, self._generator))
            inputs, labels, others, share = mix_batch(images, labels, spec.augment, self._generator)
            if self._sides is not None:
                inputs = functional.interpolate(inputs, self._sides, mode="area")
        self._optimizer.zero_grad(set_to_none=True)
        loss, logits = self._backward(inputs, labels, others, share)
        with phase("optimizer"):
            if spec.clip_norm is not None:
                nn.utils.clip_grad_norm_(self._net.parameters(), spec.clip_norm)
            self._optimizer.step()
            if self._averaged is not None:
                self._averaged.update_parameters(self._net)
        own = self._loss_of.labels(labels[self._ranks.part(len(rows))[0]])
        if data.labels.ndim == 2:
            return loss, ((logits > 0) == own).float().mean(1).sum()
        return loss, (logits.argmax(1) == own).sum()

    def _run_captured(self, order: Tensor, sources: Tensor, graph: Graph) -> tuple[list[Tensor], list[Tensor], float]:
        """Losses and hits of the full batches, from captured steps, and the last rate; none where that fails."""
        size = self._spec.batch_size
        full = len(order) // size
        rows, taken = (part[: full * size].view(full, size) for part in (order, sources))
        if self._captured is None:
            try:
                kept = list(self._net.state_dict().values())
                self._captured = StepGraph(self._learn, [self._optimizer], kept, rows=rows, sources=taken)
            except Exception as error:  # noqa: BLE001 - the eager step does what cannot be captured
                reason = (str(error).splitlines() or [""])[0]
                graph.whole, graph.how = False, f"eager: {type(error).__name__}: {reason}"[:200]
                return [], [], 0.0
        rates, rate = [], 0.0
        for _ in range(full):
            rate = self._set_rate()
            rates.append([group["lr"] for group in self._optimizer.param_groups])
        losses, hits = self._captured.run(rows, taken, rates)
        return [*losses], [*hits], rate

    def _set_rate(self) -> float:
        """Set the learning rate of the next step; without the scales of layer_decay it is returned."""
        spec = self._spec
        factor = learning_rate_factor(spec.schedule, step=self._step, steps=self._steps, epoch=self._epoch)
        self._step += 1
        rate = spec.optimizer.lr * factor
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        return rate

    def _evaluate(self) -> dict[str, float]:
        """The scores on the validation part."""
        data, micro_batch = self._data, self._spec.micro_batch
        logits = predict_logits(self._evaluated, data, data.valid, precision=self._precision, micro_batch=micro_batch)
        measured = scores(logits, data.labels[data.valid], further=self._requested)
        return {f"valid_{name}": value for name, value in measured.items()}

    def _backward(self, inputs: Tensor, labels: Tensor, others: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Add the gradient of a batch's mean loss to the weights; returns that loss and the logits, of this rank.

        The arguments are those that mix_batch returns. With micro_batch the batch is computed in pieces of nearly equal
        size.
        """
        graph, loss_of, micro_batch, device = self._graph, self._loss_of, self._spec.micro_batch, inputs.device
        own, weight = self._ranks.part(len(labels))
        pieces = -(-len(labels[own]) // micro_batch) if micro_batch else 1
        loss, all_logits = torch.zeros((), device=device), []
        split = zip(*(whole[own].tensor_split(pieces) for whole in (inputs, labels, others)), strict=True)
        for left, (part, first, second) in zip(range(pieces - 1, -1, -1), split, strict=True):
            with self._forward.step(last=not left), phase("forward"):
                if graph is not None and graph.forward is not None and part.shape == graph.shape:
                    logits = graph.forward(part)
                else:
                    with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
                        logits = self._forward(part)
                    logits = logits.float()
                piece = loss_of(logits, first) * (weight * loss_of.share(first, labels))
                if share < 1:
                    other = (1 - share) * loss_of(logits, second) * (weight * loss_of.share(second, others))
                    piece = share * piece + other
            with phase("backward"):
                torch.autograd.backward(self._forward.scaled(piece))
            loss += piece.detach()
            all_logits.append(logits.detach())
        return loss, torch.cat(all_logits)


def _sides(images: Tensor, share: float) -> tuple[int, int] | None:
    """Height and width of images (n, height, width, channels) of which each side keeps this share; None for all."""
    if share >= 1 or images.ndim != 4:
        return None
    high, wide = (max(1, round(share * side)) for side in images.shape[1:3])
    return high, wide


class _MovingAverage(AveragedModel):
    """An AveragedModel that counts its steps on the CPU: a GPU would have to be waited for in every step."""

    def __init__(self, net: nn.Module, keep: float) -> None:
        super().__init__(net, use_buffers=True)
        self._keep = keep
        self.n_averaged = self.n_averaged.cpu()

    def update_parameters(self, model: nn.Module) -> None:
        steps = int(self.n_averaged)
        share = 1 - min(self._keep, (1 + steps) / (10 + steps)) if steps else 1.0
        own, theirs = (list(chain(net.parameters(), net.buffers())) for net in (self.module, model))
        pairs = [(one.detach(), other.detach()) for one, other in zip(own, theirs, strict=True)]
        for floating in (True, False):  # counts of batches are no numbers to average
            found = [pair for pair in pairs if pair[0].is_floating_point() == floating]
            if not found:
                continue
            kept, new = map(list, zip(*found, strict=True))
            if floating:
                torch._foreach_lerp_(kept, new, share)
            else:
                torch._foreach_copy_(kept, new)
        self.n_averaged += 1


def moving_average(net: nn.Module, keep: float) -> AveragedModel:
    """An exponential moving average of net's weights and running means with decay `keep`.

    In step n the decay is at most (1 + n) / (10 + n), so that the first weights soon count little.
    """
    return _MovingAverage(net, keep)


class EarlyStopping:
    """The best epoch of a training by spec.monitor; with validates=False, without validation images, none is best.

    until is the value of the monitor that is good enough; None: none is.
    score (higher is better), epoch and state, the weights of the best epoch, are saved in checkpoints.
    """

    def __init__(self, spec: TrainingSpec, *, validates: bool, until: float | None = None) -> None:
        self.score, self.epoch = -math.inf, 0
        self.state: dict[str, Tensor] | None = None
        self._spec, self._validates = spec, validates
        self._sign = 1.0 if direction_of(spec.monitor) == "maximize" else -1.0
        self._until = math.inf if until is None else self._sign * until

    def note(self, number: int, measured: Mapping[str, float], net: nn.Module) -> bool:
        """Compare an epoch of net with the best; True if it is the last, by spec.epochs, spec.patience or until.

        Raises NotFiniteError if a loss is not finite.
        """
        losses = {name: value for name, value in measured.items() if name.endswith("_loss")}
        if not all(map(math.isfinite, losses.values())):
            shown = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise NotFiniteError(f"epoch {number}: {shown}.", "It diverged: a lower learning rate usually helps.")
        if self._validates and self._sign * measured[self._spec.monitor] > self.score:
            self.score, self.epoch = self._sign * measured[self._spec.monitor], number
            self.state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        patience = self._spec.patience
        stale = self._validates and patience is not None and number - self.epoch >= patience
        return stale or number == self._spec.epochs or self.score >= self._until
