"""float32 or bfloat16: whichever is faster for this network, batch and device, by a short measurement."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

# bfloat16 must win by this factor: below it the noise of a busy machine decides, and float32 is the plainer choice.
_WORTH = 1.15
_REPEATS = 5


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes with bfloat16 in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older releases
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def layout(device: torch.device, precision: str) -> str:
    """channels_last or contiguous: how a network's weights are to lie in memory; images always come channels-last.

    In bfloat16 on a CPU convolutions are about a tenth faster so, in float32 it makes no difference. A GPU would else
    lay the weights out anew in every step.
    """
    return "channels_last" if precision == "bfloat16" or device.type == "cuda" else "contiguous"


def lay_out(net: nn.Module, device: torch.device, precision: str) -> None:
    """Move a network to the device, its weights laid out as they are to be trained there."""
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
            loss = nn.functional.cross_entropy(net(images).float(), labels)
        torch.autograd.backward(loss)
        net.zero_grad(set_to_none=True)
        loss.item()
        best = min(best, time.perf_counter() - started)
    return best
