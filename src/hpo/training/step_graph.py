"""Whole training steps as one CUDA graph: most of a small network's step is the time in which its kernels are launched.

The graph reads the rows of each batch and its learning rates from tables on the GPU, and counts the steps itself, so
that a step costs the CPU one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hpo.data.prepare import TrialData
from hpo.models.transfer import transfer_of
from hpo.training.batches import Batches
from hpo.training.device import expect_other_streams, put

if TYPE_CHECKING:
    from hpo.spec.training import TrainingSpec

_FEWEST = 16  # full batches in an epoch, and ten times as many in all: fewer do not pay for the capture
_ON = "cuda"  # the devices that have graphs
_WARM_UP = 2  # steps before the capture: libraries allocate and choose kernels in them
_TRIED = 2  # steps that must leave the same weights with the graph as without
_TOLERANCE = 0.3  # of the norm of a tensor's change; what is wrong is off by the whole of it
_MOST = 0.9  # of all values: some gradients are nothing but rounding, of which Adam makes whole steps
_STREAMS = 32  # as many as torch hands out

# rows and sources, (..., batch) each, of one batch -> what is counted of its step, tensors of fixed shapes.
Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def why_not(net: nn.Module, data: TrialData, spec: TrainingSpec, *, own: bool) -> str:
    """Why the whole steps of such a training cannot be one graph; "" if they can. own: it runs code of the user."""
    steps, transfer = len(data.train) // spec.batch_size, transfer_of(net)
    drawn = Batches(data.images, spec.augment).source is None or spec.augment.mixup or spec.augment.cutmix
    reasons = (
        (f"it is not on {_ON}", data.images.device.type != _ON),
        ("it runs code of your own", own or ":" in spec.loss),
        ("its batches are computed in pieces", spec.micro_batch is not None),
        ("its images are changed at random", drawn),
        ("more of it learns from some epoch on", transfer is not None and transfer.unfreeze_epoch is not None),
        ("it averages its weights", bool(spec.ema)),
        # Some count their steps in Python, which a graph would repeat as it found them.
        ("its optimizer is of timm", spec.optimizer.of_timm),
        ("its images grow", spec.first_size < 1),
        ("its data grows", spec.data_growth < 1),
        (f"an epoch has fewer than {_FEWEST} full batches", steps < _FEWEST),
        (f"it has fewer than {10 * _FEWEST} full batches to learn from", spec.epochs * steps < 10 * _FEWEST),
    )
    return next((reason for reason, applies in reasons if applies), "")


def step_side_by_side(optimizers: Sequence[torch.optim.Optimizer], device: torch.device) -> None:
    """Step each optimizer; in a graph side by side, for the weights of a small network leave most of a GPU idle."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        for optimizer in optimizers:
            optimizer.step()
        return
    here = torch.cuda.current_stream()
    streams = [torch.cuda.Stream() for _ in optimizers[:_STREAMS]]  # type: ignore[no-untyped-call]
    for stream in streams:
        stream.wait_stream(here)
    for optimizer, stream in zip(optimizers, itertools.cycle(streams), strict=False):
        with torch.cuda.stream(stream):
            optimizer.step()
    for stream in streams:
        here.wait_stream(stream)


class StepGraph:
    """The captured steps of one or several trainings with these optimizers.

    kept are the tensors that a step changes besides the optimizers' own. Capturing leaves all of them, and the
    generators, as they were. Raises RuntimeError where the steps cannot be captured or the graph computes otherwise.
    """

    def __init__(
        self,
        step: Step,
        optimizers: Sequence[torch.optim.Optimizer],
        kept: Sequence[Tensor],
        *,
        rows: Tensor,
        sources: Tensor,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """rows and sources are those of an epoch, (steps, ..., batch), as later ones have."""
        device = rows.device
        self._step, self._groups = step, [group for each in optimizers for group in each.param_groups]
        self._rows, self._sources = rows.clone(), sources.clone()
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._rates = torch.zeros(len(rows), len(self._groups), device=device)
        self._rate = torch.zeros(len(self._groups), device=device)
        self._counted: list[Tensor] = []
        self._graph = torch.cuda.CUDAGraph()
        rates = [group["lr"] for group in self._groups]
        self._rates += torch.tensor(rates, device=device)
        before = _Before(optimizers, kept, generators, device)
        try:
            for group, rate in zip(self._groups, self._rate.unbind(), strict=True):
                group.update({"lr": rate, **({"capturable": True} if "capturable" in group else {})})
            with torch.cuda.device(device):
                self._capture(before, kept, generators)
        finally:
            for group, rate in zip(self._groups, rates, strict=True):
                group.update({"lr": rate, **({"capturable": False} if "capturable" in group else {})})
            before.restore()

    def run(self, rows: Tensor, sources: Tensor, rates: Sequence[Sequence[float]]) -> tuple[Tensor, ...]:
        """Train the batches of an epoch; what is counted of each step, (steps, ...). rates are (steps, groups)."""
        device = self._rows.device
        self._rows.copy_(rows)
        self._sources.copy_(sources)
        self._rates.copy_(put(torch.tensor(rates), device))
        self._at.zero_()
        for _ in range(len(rows)):
            self._graph.replay()
        for group, rate in zip(self._groups, rates[-1], strict=True):
            group["lr"] = rate
        return tuple(each.clone() for each in self._counted)

    def _once(self) -> None:
        rows, sources, rates = (
            table.index_select(0, self._at)[0] for table in (self._rows, self._sources, self._rates)
        )
        self._rate.copy_(rates)
        found = self._step(rows, sources)
        if not self._counted:
            self._counted = [each.new_zeros(len(self._rows), *each.shape) for each in found]
        for table, each in zip(self._counted, found, strict=True):
            table.index_copy_(0, self._at, each.unsqueeze(0))
        self._at.add_(1)

    def _capture(self, before: _Before, kept: Sequence[Tensor], generators: Sequence[torch.Generator]) -> None:
        expect_other_streams()
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._once()
            expected = self._left(before, kept, self._once)
        here.wait_stream(aside)
        before.restore()
        self._at.zero_()
        for generator in generators:
            self._graph.register_generator_state(generator)
        with torch.cuda.graph(self._graph, stream=aside, capture_error_mode="thread_local"):
            self._once()
        found = self._left(before, kept, self._graph.replay)
        near = [
            one.numel()
            for one, other in zip(expected, found, strict=True)
            if float((one - other).norm()) <= _TOLERANCE * float(one.norm())
        ]
        if sum(near) < _MOST * sum(one.numel() for one in expected):
            raise RuntimeError("a graph of its steps leaves other weights")

    def _left(self, before: _Before, kept: Sequence[Tensor], once: Callable[[], None]) -> list[Tensor]:
        """How some steps from the beginning change what is kept: their steps are small beside the weights."""
        before.restore()
        begun = [value.detach().clone().double() for value in kept]
        self._at.zero_()
        for _ in range(_TRIED):
            once()
        return [value.double() - first for value, first in zip(kept, begun, strict=True)]


class _Before:
    """What a training has learned so far, to return to it in place: a graph knows tensors by their addresses."""

    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        kept: Sequence[Tensor],
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> None:
        self._optimizers, self._generators, self._device = optimizers, generators, device
        for state in self._states():
            for name, value in state.items():
                state[name] = value.to(device) if isinstance(value, Tensor) else value
        # What an optimizer makes in its first step begins at 0.
        self._copies = {id(value): (value, value.detach().clone()) for value in itertools.chain(kept, self._moments())}
        self._chance = torch.cuda.get_rng_state(device), [each.get_state() for each in generators]

    def restore(self) -> None:
        with torch.no_grad():
            for value in self._moments():
                if id(value) not in self._copies:
                    value.zero_()
            for value, copied in self._copies.values():
                value.copy_(copied)
        torch.cuda.set_rng_state(self._chance[0], self._device)
        for generator, state in zip(self._generators, self._chance[1], strict=True):
            generator.set_state(state)

    def _states(self) -> Iterable[dict[str, Any]]:
        return [state for optimizer in self._optimizers for state in optimizer.state.values()]

    def _moments(self) -> Iterable[Tensor]:
        return [value for state in self._states() for value in state.values() if isinstance(value, Tensor)]
