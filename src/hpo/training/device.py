"""Devices: names, threads, clocks, memory, the precision that is faster on them, and CUDA graphs where they pay."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.data.prepare import TrialData
from hpo.errors import HpoError
from hpo.models import input_of
from hpo.models.transfer import transfer_of
from hpo.spec.study import Setup
from hpo.spec.training import TrainingSpec

# Parts of plain RuntimeErrors of torch and CUDA's libraries.
_OUT_OF_MEMORY = ("not enough memory", "out of memory", "cannot allocate memory", "alloc_failed")
# bfloat16 must win by this factor: below it the noise of a busy machine decides, and float32 is the plainer choice.
_WORTH = 1.15
_REPEATS = 5


def resolve_devices(request: str) -> list[str]:
    """`auto`, cpu, cuda, cuda:N or mps -> names of the devices to use, at least one.

    auto: all GPUs, else mps, else cpu; cuda: all GPUs. Raises HpoError for a device that is not here.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    here = {"auto": gpus or mps or ["cpu"], "cpu": ["cpu"], "cuda": gpus, "mps": mps} | {gpu: [gpu] for gpu in gpus}
    if not here.get(request):
        present = ", ".join(["auto", "cpu", *(["cuda"] if gpus else []), *gpus, *mps])
        raise HpoError(f"--device {request}: is not a device of this machine.", f"Choose one of: {present}.")
    return here[request]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` CPU threads within the block."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(before)


def use_threads(count: int) -> None:
    """Let torch compute with `count` CPU threads in this process."""
    torch.set_num_threads(count)


def threads_in_use() -> int:
    """The number of CPU threads with which torch computes in this process."""
    return torch.get_num_threads()


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on device. On a GPU the CPU does not wait until the work before it is done.

    CUDA copies ordinary memory before the call returns, so that the caller may change the tensor at once.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock for computing on device, in seconds: CPU seconds of this thread on a CPU, else wall seconds.

    On a CPU other processes do not count. Elsewhere each reading waits until the device has finished.
    """
    if device.type == "cpu":
        return time.thread_time

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    return now


def is_out_of_memory(error: BaseException | None) -> bool:
    """True if this error, or a cause of it, is a lack of memory, on the CPU or on a GPU."""
    while error is not None:
        message = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)
        if message or isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


def at_once(setup: Setup, *, ranks: int = 1) -> int:
    """The images that go through a network at once, where a batch is divided among so many processes."""
    own = -(-setup.training.batch_size // ranks)
    return min(setup.training.micro_batch or own, own)


def halved(setup: Setup, *, ranks: int = 1) -> Setup | None:
    """The setup with half as many images at once in the network and the same effective batch; None at one image."""
    training, now = setup.training, at_once(setup, ranks=ranks)
    if now == 1:
        return None
    return setup.model_copy(update={"training": training.model_copy(update={"micro_batch": -(-now // 2)})})


def free_memory() -> None:
    """Free the memory of a failed training; no traceback may refer to it any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def has_bfloat16(device: torch.device) -> bool:
    """True if the device computes bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older releases
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def layout(device: torch.device, precision: str) -> str:
    """The memory layout of a network's weights, channels_last or contiguous; images are always channels-last.

    channels_last makes convolutions in bfloat16 on a CPU about a tenth faster; in float32 there is no difference. A GPU
    would otherwise convert the weights in every step.
    """
    return "channels_last" if precision == "bfloat16" or device.type == "cuda" else "contiguous"


def lay_out(net: nn.Module, device: torch.device, precision: str) -> None:
    """Move a network to the device, its weights in the layout for training there."""
    net.to(device)
    if layout(device, precision) == "channels_last":
        net.to(memory_format=torch.channels_last)


def faster_precision(net: nn.Module, images: Tensor, labels: Tensor) -> str:
    """float32 or bfloat16, for one step of net on images (n, channels, height, width) and labels (n,).

    Takes about ten training steps; the network and the global random state are left as they were.
    """
    device = images.device
    if not has_bfloat16(device):
        return "float32"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trial = copy.deepcopy(net).train()
        seconds = {dtype: _step_seconds(trial, images, labels, dtype) for dtype in (torch.float32, torch.bfloat16)}
    return "bfloat16" if seconds[torch.float32] > _WORTH * seconds[torch.bfloat16] else "float32"


def _step_seconds(net: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> float:
    best = float("inf")
    for _ in range(1 + _REPEATS):  # the first is a warm-up: kernels are chosen in it
        started = time.perf_counter()
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            loss = nn.functional.cross_entropy(net(images).float(), labels.float() if labels.ndim == 2 else labels)
        torch.autograd.backward(loss)
        net.zero_grad(set_to_none=True)
        loss.item()
        best = min(best, time.perf_counter() - started)
    return best


# Makes of a network and inputs to try it with a function of such inputs, of the same gradients.
Grapher = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]

_FEWEST = 200  # steps: a shorter training is over before the capture and its trial are paid for
_GRAPH_WORTH = 1.1  # a graph must be faster by this: below it noise decides, and eager is plainer
_GRAPH_REPEATS = 5
_TOLERANCE = {"float32": 0.01, "bfloat16": 0.05}  # of a tensor's norm; what is wrong is off by the whole of it


@dataclass
class Graph:
    """The computation of training batches of this shape: forward, or eagerly if it is None; how is the reason.

    whole: the training is to capture its steps; where that fails it computes eagerly and says so in how.
    """

    forward: Callable[[Tensor], Tensor] | None
    shape: torch.Size
    how: str
    whole: bool = False


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


def expect_other_streams() -> None:
    """Keep torch from warning that a captured step ran on another stream than the one before it: that is meant."""
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if warn is not None:  # torch before 2.10 does not warn
        warn(False)


def capture_cuda(step: nn.Module, sample: Tensor) -> Callable[[Tensor], Tensor]:
    """Two CUDA graphs, of the forward and of the backward pass; they own sample, which inputs are copied to."""
    expect_other_streams()
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
    net: nn.Module, state: Mapping[str, Tensor], data: TrialData, spec: TrainingSpec, precision: str, grapher: Grapher
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
    for _ in range(_GRAPH_REPEATS):
        for forward, best in seconds.items():
            started = clock()
            _step(forward, net, batches[0])
            seconds[forward] = min(best, clock() - started)
    gain = seconds[eager] / seconds[graph]
    if gain < _GRAPH_WORTH:
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
