"""How much a network computes and moves, and how fast this device computes and moves at best."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SECONDS = 0.15  # that one measurement may take
# Sides of the matrices: products of tens of milliseconds on a core, of milliseconds on a large GPU.
_SIDE = {"cpu": 1024, "cuda": 8192, "mps": 2048}
_COPIED = 2**27  # bytes; no cache of today holds them


def device_clock(device: torch.device) -> Callable[[], float]:
    """Seconds of computing on device: of this thread on a CPU, where others may be busy too; else on the wall."""
    if device.type == "cpu":
        return time.thread_time
    wait = synchronise(device)

    def now() -> float:
        wait()
        return time.perf_counter()

    return now


def synchronise(device: torch.device) -> Callable[[], None]:
    """What waits until the device has done all that it was told."""
    waits: Mapping[str, Callable[[], None]] = {
        "cuda": lambda: torch.cuda.synchronize(device),
        "mps": lambda: torch.mps.synchronize(),
    }
    return waits.get(device.type, lambda: None)


@lru_cache(maxsize=8)
def peaks(device_name: str, precision: str, threads: int) -> tuple[float, float]:  # noqa: ARG001 - part of the key
    """(FLOP/s of square matrix products, bytes/s of copies) that this process reaches now; takes half a second.

    The best of many. threads is torch.get_num_threads(): another number has another answer.
    """
    device = torch.device(device_name)
    side = _SIDE.get(device.type, 1024)
    left, right = (torch.randn(side, side, device=device, dtype=_DTYPES[precision]) for _ in range(2))
    product = torch.empty_like(left)
    source, target = (torch.ones(_COPIED // 4, device=device) for _ in range(2))
    flops = 2 * side**3 / _best(lambda: torch.mm(left, right, out=product), device)
    return flops, 2 * _COPIED / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of many calls."""
    now = device_clock(device)
    work()  # chooses kernels, touches memory
    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        began = now()
        work()
        fastest = min(fastest, now() - began)
    return fastest


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own gap
    """Counts the bytes of all tensors that operators take and give, views left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, given)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return given


def _convolution_backward(
    grad_shape: list[int],
    images_shape: list[int],
    weight_shape: list[int],
    *details: Any,
    out_shape: Any = None,  # noqa: ARG001 - handed in by name
) -> int:
    """Each of the two gradients takes what the convolution takes; torch's own count forgets that it may have groups."""
    transposed, wanted = details[4], details[7]
    once = conv_flop_count(images_shape, weight_shape, grad_shape, transposed=transposed)
    return int((wanted[0] + wanted[1]) * once)


_COUNTS = {torch.ops.aten.convolution_backward: _convolution_backward}


def work_of(net: nn.Module, images: Tensor, labels: Tensor, *, precision: str) -> tuple[float, float]:
    """(FLOP, bytes) of one training step's forward and backward pass, without the optimizer, on a copy of net.

    images are a network's input, labels (n,) int64. FLOP are those of products and convolutions, two for each
    multiplication and addition; bytes are those that operators read and write, as if no cache held them.
    """
    device = images.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        copied = copy.deepcopy(net).train()
        with FlopCounterMode(display=False, custom_mapping=_COUNTS) as counter, _Traffic() as traffic:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = copied(images)
            torch.autograd.backward(functional.cross_entropy(logits.float(), labels))
    return float(counter.get_total_flops()), float(traffic.bytes)
