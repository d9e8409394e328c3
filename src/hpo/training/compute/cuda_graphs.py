"""Forward and backward passes as CUDA graphs, where those give the same gradients in less time; else eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.data.prepare import TrialData
from hpo.models.inputs import input_of
from hpo.models.transfer import transfer_of
from hpo.spec.training import TrainingSpec
from hpo.training.compute.device import device_clock, free_memory, lay_out

# Makes of a network and inputs to try it with a function of such inputs, of the same gradients.
Grapher = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]

_FEWEST = 200  # steps: a shorter training is over before the capture and its trial are paid for
_WORTH = 1.1  # a graph must be faster by this: below it noise decides, and eager is plainer
_REPEATS = 5
_TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}  # of a tensor's norm; what is wrong is off by the whole of it


@dataclass(frozen=True)
class Graph:
    """The computation of training batches of this shape: forward, or eagerly if it is None; how is the reason."""

    forward: Callable[[Tensor], Tensor] | None
    shape: torch.Size
    how: str


class _Pass(nn.Module):
    """The forward pass of a training step. A module of its own, for what captures it may replace its forward."""

    def __init__(self, net: nn.Module, *, half: bool) -> None:
        super().__init__()
        self.net, self._half = net, half

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs -> logits float32."""
        # A cache would hold the weights of the capture, rounded, for all replays.
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self._half, cache_enabled=False):
            logits = self.net(inputs)
        wide: Tensor = logits.float()
        return wide


def capture_cuda(step: nn.Module, sample: Tensor) -> Callable[[Tensor], Tensor]:
    """Two CUDA graphs, of the forward and of the backward pass; they own sample, which inputs are copied to."""
    with torch.cuda.device(sample.device):
        made: Any = torch.cuda.make_graphed_callables(step, (sample,), allow_unused_input=True)
    return cast(Callable[[Tensor], Tensor], made)


def choose_graph(
    net: nn.Module,
    data: TrialData,
    spec: TrainingSpec,
    *,
    precision: str,
    own: bool = False,
    grapher: Grapher = capture_cuda,
) -> Graph:
    """Capture full batches of net in training mode and try the capture against the eager step.

    It is taken where, for two batches and two states of the weights, it leaves the same gradients and running
    statistics from the same chance, and is faster. The network and the global random state stay as they were. own says
    that the network is the user's: what its Python code decides in every step a graph would not.
    """
    transfer, device = transfer_of(net), data.images.device
    steps = spec.epochs * (len(data.train) // spec.batch_size)
    for reason, applies in (
        ("it is a network of your own", own),
        ("its batches are computed in pieces", spec.micro_batch is not None),
        ("more of it learns from some epoch on", transfer is not None and transfer.unfreeze_epoch is not None),
        (f"it has fewer than {_FEWEST} full batches to learn from", steps < _FEWEST),
    ):
        if applies:
            return _eager(reason)
    lay_out(net, device, precision)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    training = net.training
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            graph = _tried(net.train(), before, data, spec, precision, grapher)
    except Exception as error:  # noqa: BLE001 - the eager step does what cannot be captured
        reason = (str(error).splitlines() or [""])[0]
        graph = _eager(f"{type(error).__name__}: {reason}"[:200])
    finally:
        net.zero_grad(set_to_none=True)
        net.load_state_dict(before)
        net.train(training)
    if graph.forward is None:
        free_memory()
    return graph


def _eager(reason: str) -> Graph:
    return Graph(None, torch.Size(), f"eager: {reason}")


def _tried(
    net: nn.Module,
    state: Mapping[str, Tensor],
    data: TrialData,
    spec: TrainingSpec,
    precision: str,
    grapher: Grapher,
) -> Graph:
    normalise, size = input_of(data), spec.batch_size
    parts = (data.train[:size], data.train[-size:])
    batches = [(normalise(data.images[rows]), data.labels[rows]) for rows in parts]
    eager = _Pass(net, half=precision == "bfloat16")
    graph = grapher(_Pass(net, half=precision == "bfloat16"), batches[0][0].clone())
    # Other weights too: a graph could have kept those of its capture.
    other = {**state, **{name: -state[name] for name, weight in net.named_parameters() if weight.requires_grad}}
    for batch, weights in zip(batches, (state, other), strict=True):
        expected, found = (_left_by(each, net, weights, batch) for each in (eager, graph))
        if not all(agree(*each, tolerance=_TOLERANCE[precision]) for each in zip(expected, found, strict=True)):
            return _eager("a graph of it leaves other gradients or running statistics")
    clock = device_clock(data.images.device)
    seconds: dict[Callable[[Tensor], Tensor], float] = {eager: float("inf"), graph: float("inf")}
    for _ in range(_REPEATS):
        for forward, best in seconds.items():
            started = clock()
            _step(forward, net, batches[0])
            seconds[forward] = min(best, clock() - started)
    gain = seconds[eager] / seconds[graph]
    if gain < _WORTH:
        return _eager(f"with a graph a step is {gain:.2f} times as fast")
    return Graph(graph, batches[0][0].shape, "graph")


def _step(forward: Callable[[Tensor], Tensor], net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net.zero_grad(set_to_none=True)
    inputs, labels = batch
    torch.autograd.backward(functional.cross_entropy(forward(inputs), labels.float() if labels.ndim == 2 else labels))


def _left_by(
    forward: Callable[[Tensor], Tensor], net: nn.Module, state: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The gradients and running statistics after one step from this state, with the same random numbers each time."""
    net.load_state_dict(state)
    torch.manual_seed(0)
    _step(forward, net, batch)
    gradients = [None if weight.grad is None else weight.grad.double() for weight in net.parameters()]
    return gradients, [buffer.double() for buffer in net.buffers()]


def agree(expected: Sequence[Tensor | None], found: Sequence[Tensor | None], *, tolerance: float) -> bool:
    """Whether each tensor is found as expected: to a share of its norm, and of a hundredth of the norm of all.

    Some gradients are nothing but rounding, as that of a bias before batch norm: those only have to be as small.
    """
    if [value is None for value in expected] != [value is None for value in found]:
        return False
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if one is not None and other is not None]
    whole = sum(float(one.norm()) ** 2 for one, _ in pairs) ** 0.5
    # Written so that what is not a number disagrees.
    return all(float((one - other).norm()) <= tolerance * (float(one.norm()) + whole / 100) for one, other in pairs)
