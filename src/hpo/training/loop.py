"""One training: a generator of epochs that knows nothing of who asks and who remembers."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from hpo.data.prepare import TrialData
from hpo.metrics import scores
from hpo.models.inputs import input_of
from hpo.models.transfer import standing_of
from hpo.records import Epoch
from hpo.spec.training import TrainingSpec
from hpo.training.augment import mix_batch
from hpo.training.batches import Batches
from hpo.training.checkpoint import get_chance, set_chance
from hpo.training.compute.precision import lay_out
from hpo.training.early_stopping import Progress
from hpo.training.growing_subset import GrowingRows
from hpo.training.optimizers import build_optimizer, learning_rate_factor
from hpo.training.profiler import phase

if TYPE_CHECKING:
    from hpo.training.compute.cuda_graphs import Graph

# What memory holds one piece of a training batch with all that its gradient needs, holds so many pieces without.
_PIECES = 4

# Takes an epoch and the state after it, plain enough for torch.load(weights_only=True).
Save = Callable[[Epoch, Mapping[str, Any]], None]


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """labels (n,) -> (classes,) weights n / (classes * images of the class): scikit-learn's "balanced"."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts.float())


def evaluation_batch(device: torch.device) -> int:
    """Images that go through a network at once where nothing is learnt.

    On a CPU as many as its caches hold: with 1024 a network of one convolution takes twice the time.
    """
    return 128 if device.type == "cpu" else 1024


def predict_logits(
    net: nn.Module, data: TrialData, rows: Tensor, *, precision: str, micro_batch: int | None = None
) -> Tensor:
    """Logits (len(rows), classes) float32 of the images in these rows; the network is left in evaluation mode.

    micro_batch is the training's: where memory is short there, batches are small here too.
    """
    net.eval()
    device = data.images.device
    normalise = input_of(data)
    # Backbones resize images, and their maps are larger than the images.
    batch = 64 if standing_of(net) is not None else evaluation_batch(device)
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
    graph: Graph | None = None,
) -> Generator[Epoch, None, None]:
    """Train net in place and yield an Epoch after each evaluation; at the end net has its best epoch's weights.

    precision is float32 or bfloat16. Best is judged by spec.monitor; training ends after spec.epochs, or after
    spec.patience epochs without a better one. Without validation rows the last weights are kept; closing the generator
    early leaves the last ones too. Raises NotFiniteError where a loss is not finite. One seed gives one result on one
    device, thread count and precision.

    save is called before every spec.checkpoint-th epoch but the last is yielded. resume is a state that it was given:
    the training goes on after that epoch, to the result that it would have had in one go. graph computes the batches
    that it fits; it was made of this network, on this data.
    """
    try:
        yield from _epochs(net, data, spec, seed=seed, precision=precision, resume=resume, save=save, graph=graph)
    finally:
        torch.set_flush_denormal(False)


def _epochs(
    net: nn.Module,
    data: TrialData,
    spec: TrainingSpec,
    *,
    seed: int,
    precision: str,
    resume: Mapping[str, Any] | None,
    save: Save | None,
    graph: Graph | None,
) -> Generator[Epoch, None, None]:
    device = data.images.device
    if graph is None or graph.forward is None:  # a graph reads the weights where they lay when it was captured
        lay_out(net, device, precision)
    # Dropout draws from torch's global generator; data order and augmentation from one of their own.
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = build_optimizer(spec.optimizer, net)
    batches = Batches(data.images, spec.augment)
    normalise = input_of(data)
    averaged = moving_average(net, spec.ema) if spec.ema else None
    judged = net if averaged is None else averaged.module
    standing = standing_of(net)
    valid_labels = data.labels[data.valid]
    classes = len(data.class_names)
    weights = class_weights(data.labels[data.train], classes) if spec.class_weights == "balanced" else None
    loss_of = partial(functional.cross_entropy, weight=weights, label_smoothing=spec.label_smoothing)
    growing = GrowingRows(data, spec, seed=seed)
    steps, steps_per_epoch = growing.batches(spec.epochs), -(-len(data.train) // spec.batch_size)
    progress = Progress(spec, validates=len(data.valid) > 0)
    first = 1
    # All that learns. How far the schedule is follows from the epoch.
    learning: dict[str, Any] = {"net": net, "optimizer": optimizer, **({"averaged": averaged} if averaged else {})}
    if resume is not None:
        for name, part in learning.items():
            part.load_state_dict(resume[name])
        set_chance(resume["chance"], generator, device)
        progress.score, progress.epoch, progress.state = resume["best"]
        first = resume["epoch"] + 1
    step = growing.batches(first - 1)

    for number in range(first, spec.epochs + 1):
        started = time.perf_counter()
        # Numbers near zero that lose digits make a step a hundred times slower, and mean nothing here. Whoever gets the
        # epoch may count on them, and this is a state of the thread.
        torch.set_flush_denormal(True)
        if standing is not None:
            standing.begin_epoch(number)
        net.train()
        batch_losses: list[Tensor] = []
        batch_hits: list[Tensor] = []
        counts: list[int] = []  # images in each batch
        taking_part = growing.of(number)
        order = taking_part[torch.randperm(len(taking_part), generator=generator).to(device)]
        rate = 0.0
        single = len(order) % spec.batch_size == 1 < min(spec.batch_size, len(order))
        order = order[:-1] if single else order  # batch norm cannot learn from a single image
        sources = batches.rows(order, spec.batch_size, generator)
        for rows, source in zip(*(torch.split(part, spec.batch_size) for part in (order, sources)), strict=True):
            with phase("batch"):
                factor = learning_rate_factor(spec.schedule, step=step, steps=steps, steps_per_epoch=steps_per_epoch)
                step += 1
                rate = spec.optimizer.lr * factor
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                labels = data.labels.index_select(0, rows)
            with phase("augment"):
                images = batches.gather(source, generator)
                inputs, labels, others, share = mix_batch(normalise(images), labels, spec.augment, generator)
            optimizer.zero_grad(set_to_none=True)
            loss, logits = _backward(net, inputs, (labels, others, share), loss_of, spec.micro_batch, precision, graph)
            with phase("optimizer"):
                if spec.clip_norm is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), spec.clip_norm)
                optimizer.step()
                if averaged is not None:
                    averaged.update_parameters(net)
            batch_losses.append(loss)
            batch_hits.append((logits.argmax(1) == labels).sum())
            counts.append(len(rows))

        step += single
        # Added up once an epoch, in one transfer from the device.
        seen, images_in = sum(counts), torch.tensor(counts, dtype=torch.float64)
        each = torch.stack([torch.stack(batch_losses), torch.stack(batch_hits).float()]).cpu().double()
        loss_sum, hits = float(each[0] @ images_in), float(each[1].sum())
        measured = {"train_loss": loss_sum / seen, "train_accuracy": hits / seen}
        if len(data.valid):
            logits = predict_logits(judged, data, data.valid, precision=precision, micro_batch=spec.micro_batch)
            measured |= {f"valid_{name}": value for name, value in scores(logits, valid_labels).items()}
        last = progress.note(number, measured, judged)
        seconds = time.perf_counter() - started
        torch.set_flush_denormal(False)
        epoch = Epoch(number=number, scores=measured, learning_rate=rate, seconds=seconds, last=last)
        if save is not None and spec.checkpoint and number % spec.checkpoint == 0 and not last:
            state = {name: part.state_dict() for name, part in learning.items()}
            chance, best = get_chance(generator, device), (progress.score, progress.epoch, progress.state)
            save(epoch, {**state, "epoch": number, "best": best, "chance": chance})
        yield epoch
        if last:
            break

    if progress.state is not None or averaged is not None:
        net.load_state_dict(progress.state or judged.state_dict())


def _backward(
    net: nn.Module,
    inputs: Tensor,
    wanted: tuple[Tensor, Tensor, float],
    loss_of: partial[Tensor],
    micro_batch: int | None,
    precision: str,
    graph: Graph | None,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of a batch's mean loss to the weights, piece by piece; returns that loss and the logits.

    wanted is what mix_batch gives: labels, other labels, and the share of the first. Pieces are of nearly equal size.
    """
    labels, others, share = wanted
    pieces = -(-len(labels) // micro_batch) if micro_batch else 1
    loss, answers = torch.zeros((), device=inputs.device), []
    for part, first, second in zip(
        inputs.tensor_split(pieces), labels.tensor_split(pieces), others.tensor_split(pieces), strict=True
    ):
        with phase("forward"):
            if graph is not None and graph.forward is not None and part.shape == graph.shape:
                logits = graph.forward(part)
            else:
                with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    logits = net(part)
                logits = logits.float()
            piece = loss_of(logits, first) * _weight(first, labels, loss_of)
            if share < 1:
                piece = share * piece + (1 - share) * loss_of(logits, second) * _weight(second, others, loss_of)
        with phase("backward"):
            torch.autograd.backward(piece)
        loss += piece.detach()
        answers.append(logits.detach())
    return loss, torch.cat(answers)


def _weight(part: Tensor, whole: Tensor, loss_of: partial[Tensor]) -> Tensor | float:
    """What the mean loss of a piece counts in that of its batch: torch's mean is over the weights of the classes."""
    weights = loss_of.keywords["weight"]
    if len(part) == len(whole):
        return 1.0
    share: Tensor | float = (
        weights[part].sum() / weights[whole].sum() if weights is not None else len(part) / len(whole)
    )
    return share


def moving_average(net: nn.Module, keep: float) -> AveragedModel:
    """A copy of net whose weights and running means follow it, keeping `keep` of themselves in every step.

    In step n at most (1 + n) / (10 + n), so that the first weights are soon forgotten.
    """

    def follow(own: Any, others: Any, steps: Any) -> None:
        if own[0].is_floating_point():
            torch._foreach_lerp_(own, others, 1 - min(keep, (1 + int(steps)) / (10 + int(steps))))
        else:  # counts of batches
            torch._foreach_copy_(own, others)

    return AveragedModel(net, multi_avg_fn=follow, use_buffers=True)
