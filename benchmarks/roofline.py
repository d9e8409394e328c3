"""How near training comes to what the device can do at best, for each family of networks.

    OMP_NUM_THREADS=1 uv run python benchmarks/roofline.py [--device auto|cpu|cuda] [--threads 1] [--only mlp]

The roofs are measured first: square matrix products in float32 and bfloat16, and copies too large for any cache. Then
each network trains on random images of 28 x 28 x 3 as a trial does, with AdamW; the fastest of its epochs counts, in
seconds of the processor on a CPU (others may use the machine) and on the wall elsewhere.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter
from torch import nn

from hpo.data.prepare import TrialData
from hpo.models import build_model
from hpo.profile import Clock, Limit
from hpo.spec.models import ModelSpec
from hpo.spec.training import OptimizerSpec, TrainingSpec
from hpo.training.compute.device import resolve_devices, use_threads
from hpo.training.compute.precision import has_bfloat16
from hpo.training.compute.roofline import peaks
from hpo.training.compute.trial_profiler import Meter
from hpo.training.loop import train

CLASSES, SIDE, FEATURES = 8, 28, 1280
EPOCHS = 4  # the first chooses kernels


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
    spec, meter = training(family.batch, EPOCHS), Meter(name)
    meter.built(net, data, spec, precision=precision)
    meter.trained([1])
    work = meter.profile()
    assert work is not None
    fastest = _fastest_epoch(net, data, spec, precision, meter.clock)
    passes = fastest["forward"] + fastest["backward"]
    whole = sum(fastest.values())
    threads = str(torch.get_num_threads())
    rates = work.flops / passes, work.peak_flops, work.traffic / passes, work.peak_traffic
    limit = Limit(name, precision, threads, *rates)
    return (
        f"{1e3 * whole / family.steps:10.1f}{limit.flops / 1e9:9.1f}{limit.flops / limit.roof:9.0%}"
        f"{limit.intensity:8.1f}  {limit.bound:11}{1 - (passes + fastest['optimizer']) / whole:9.1%}"
    )


def _fastest_epoch(
    net: nn.Module, data: TrialData, spec: TrainingSpec, precision: str, clock: Clock
) -> Mapping[str, float]:
    """Seconds by phase of the epoch in which they are least."""
    seconds = clock.cpu_seconds if data.images.device.type == "cpu" else clock.seconds
    epochs, before = [], dict(seconds)
    for _ in train(net, data, spec, seed=0, precision=precision, clock=clock):
        phases = ("batch", "augment", "forward", "backward", "optimizer", "evaluate")
        epochs.append({phase: seconds[phase] - before.get(phase, 0.0) for phase in phases})
        before = dict(seconds)
    return min(epochs, key=lambda phases: sum(phases.values()))


if __name__ == "__main__":
    main()
