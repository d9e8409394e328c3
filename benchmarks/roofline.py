"""How near training comes to what the device can do at best, for each family of networks.

    OMP_NUM_THREADS=1 uv run python benchmarks/roofline.py [--device auto|cpu|cuda] [--threads 1] [--only mlp]

The roofs are measured first: square matrix products in float32 and bfloat16, and copies too large for any cache. Then
each network trains on random images of 28 x 28 x 3 as a trial does, with AdamW, for the time of a step (the fastest of
its epochs counts), and its forward and backward passes are timed alone; "elsewhere" is the rest of the step. Times are
CPU seconds on a CPU (others may use the machine) and wall seconds elsewhere.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from hpo.data.prepare import TrialData
from hpo.models import build_model, input_of
from hpo.spec.models import ModelSpec
from hpo.spec.training import OptimizerSpec, TrainingSpec
from hpo.training.device import device_clock, has_bfloat16, resolve_devices, use_threads
from hpo.training.loop import train

CLASSES, SIDE, FEATURES = 8, 28, 1280
EPOCHS = 4  # the first chooses kernels
FAR = 0.25  # of the roof: below it neither arithmetic nor memory is the limit
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECONDS_A_MEASUREMENT = 0.15  # that one measurement may take
# Sides of the matrices: products of tens of milliseconds on a core, of milliseconds on a large GPU.
_SIDE = {"cpu": 1024, "cuda": 8192, "mps": 2048}
_COPIED = 2**27  # bytes; no cache of today holds them


@dataclass(frozen=True)
class Family:
    """A network, None for the head of a frozen backbone; images in a batch, batches in an epoch."""

    model: Mapping[str, object] | None
    batch: int
    steps: int


FAMILIES = {
    "mlp, 128 neurons": Family({"kind": "mlp", "hidden": 128}, 128, 40),
    "mlp, 512 neurons": Family({"kind": "mlp", "hidden": 512}, 128, 40),
    "mlp, 4096 neurons": Family({"kind": "mlp", "hidden": 4096}, 128, 8),
    "one convolution, 64 of 7x7": Family({"kind": "cnn", "filters": 64, "kernel": 7, "padding": "same"}, 128, 5),
    "five convolutions, 32 to 128": Family(
        {"kind": "convnet", "filters": [32, 64, 64, 128, 128], "pool_after": [2, 4], "head": "global"}, 64, 5
    ),
    "resnet, 2.0 M weights": Family({"kind": "resnet"}, 128, 2),
    "efficientnet_lite0 of timm at 64": Family(
        {"kind": "timm", "name": "tf_efficientnet_lite0", "weights": "none", "input_size": 64}, 64, 3
    ),
    "head on 1280 frozen features": Family(None, 256, 60),
}


def main() -> None:
    """Measure, and print a table for each device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="families whose name holds this")
    options = parser.parse_args()
    use_threads(options.threads)
    names = (
        [*dict.fromkeys([*resolve_devices(options.device), "cpu"])] if options.device == "auto" else [options.device]
    )
    for name in names:
        _device(name, options.threads, options.only)
    if not torch.cuda.is_available():
        print("\nno GPU here: no rows for one")


def _device(name: str, threads: int, only: str) -> None:
    device = torch.device(name)
    precisions = ["float32", *(["bfloat16"] if has_bfloat16(device) else [])]
    label = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{name}, {threads} threads"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"\n{label}{load}")
    for precision in precisions:
        flops, traffic = peaks(name, precision, threads)
        print(f"  {precision}: products {flops / 1e9:,.0f} GFLOP/s, copies {traffic / 1e9:,.0f} GB/s")
    print(f"{'':34}{'':10}{'ms a step':>10}{'GFLOP/s':>9}{'of roof':>9}{'FLOP/B':>8}  {'limit':11}{'elsewhere':>9}")
    for family in (family for family in FAMILIES if only in family):
        for precision in precisions:
            print(f"{family:34}{precision:10}{_row(FAMILIES[family], name, precision)}", flush=True)


def build(family: Family, name: str, batch: int) -> tuple[nn.Module, TrialData]:
    """A network on the device of this name, and random data for an epoch of it."""
    device, count = torch.device(name), batch * family.steps
    generator = torch.Generator().manual_seed(0)
    if family.model is None:
        images = torch.randn(count, FEATURES, generator=generator)
        net: nn.Module = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Dropout(0.2), nn.Linear(FEATURES, CLASSES))
    else:
        images = torch.randint(256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
        spec = TypeAdapter(ModelSpec).validate_python(family.model)
        net = build_model(spec, image_shape=(SIDE, SIDE, 3), classes=CLASSES, seed=0)
    labels, rows = torch.randint(CLASSES, (count,), generator=generator), torch.arange(count)
    images, labels, rows = (part.to(device) for part in (images, labels, rows))
    names = tuple(map(str, range(CLASSES)))
    return net.to(device), TrialData(images, labels, rows, rows[:0], names, (0.5,) * 3, (0.25,) * 3)


def training(batch: int, epochs: int) -> TrainingSpec:
    """AdamW, nothing else."""
    return TrainingSpec(epochs=epochs, batch_size=batch, optimizer=OptimizerSpec(name="adamw"))


def _row(family: Family, name: str, precision: str) -> str:
    net, data = build(family, name, family.batch)
    peak_flops, peak_traffic = peaks(name, precision, torch.get_num_threads())
    rows = data.train[: family.batch]
    images, labels = input_of(data)(data.images[rows]), data.labels[rows]
    flops, traffic = work_of(net, images, labels, precision=precision)
    step = _step_seconds(net, data, training(family.batch, EPOCHS), precision)
    passes = _best(lambda: _passes(net.train(), images, labels, precision), images.device)
    # The slower of arithmetic and memory (Williams et al. 2009).
    roof = min(peak_flops, flops / traffic * peak_traffic)
    bound = "neither" if flops / passes < FAR * roof else "arithmetic" if roof == peak_flops else "memory"
    return (
        f"{1e3 * step:10.1f}{flops / passes / 1e9:9.1f}{flops / passes / roof:9.0%}"
        f"{flops / traffic:8.1f}  {bound:11}{max(0.0, 1 - passes / step):9.1%}"
    )


def _step_seconds(net: nn.Module, data: TrialData, spec: TrainingSpec, precision: str) -> float:
    """Seconds of a training step, optimizer included, in the fastest epoch."""
    now, seconds = device_clock(data.images.device), []
    began = now()
    for _ in train(net, data, spec, seed=0, precision=precision):
        seconds.append(now() - began)
        began = now()
    return min(seconds) / -(-len(data.train) // spec.batch_size)


def _passes(net: nn.Module, images: Tensor, labels: Tensor, precision: str) -> None:
    """One forward and one backward pass; gradients are added to those of net."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = net(images)
    torch.autograd.backward(functional.cross_entropy(logits.float(), labels))


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
    fastest, end = float("inf"), time.perf_counter() + SECONDS_A_MEASUREMENT
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
            _passes(copied, images, labels, precision)
    return float(counter.get_total_flops()), float(traffic.bytes)


if __name__ == "__main__":
    main()
