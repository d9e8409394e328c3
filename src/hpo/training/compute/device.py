"""Devices: their names, threads, clocks, memory, and the precision that is faster on them."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hpo.errors import HpoError
from hpo.spec.study import Setup

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
