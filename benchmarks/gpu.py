"""What one GPU gives: families against a DataLoader loop, stacks, CUDA graphs, workers on one GPU, and the start.

    uv run python benchmarks/gpu.py                                     # the first GPU, 5 minutes at most
    OMP_NUM_THREADS=1 uv run python benchmarks/gpu.py --device cpu --quick    # a try without one: no figures

All data are random. It prints Markdown tables under the card's name, and writes them to $OUT/gpu.md where OUT is set. A
part that finds no time left of --seconds is named and left out. Times are wall seconds, each the fastest of its epochs;
"of the roof" is of what products of matrices or copies reach on this device (benchmarks/roofline.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import roofline
from hpo.data.prepare import TrialData
from hpo.events import Event, TrialEnded, TrialStarted
from hpo.execute.run_study import run_study
from hpo.models import build_model, input_of
from hpo.spec.load import load_study
from hpo.spec.models import CnnSpec, ConvnetSpec, MlpSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec, ScheduleSpec, TrainingSpec
from hpo.training.device import Graph, choose_graph, device_clock, has_bfloat16
from hpo.training.loop import train
from hpo.training.stack import Stack
from hpo.training.system_metrics import gpus_of, read_counters, read_levels

Lines = Iterator[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--seconds", type=float, default=270.0, help="after which no further part begins")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--only", nargs="*", choices=[part.__name__ for part in PARTS], help="these parts")
    parser.add_argument("--loader", choices=list(roofline.FAMILIES), help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loader:
        print(data_loader(given.loader, torch.device(given.device), given.workers, given.quick))
        return
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch finds no GPU; try the script with --device cpu --quick")
    device, until = torch.device(given.device), time.monotonic() + given.seconds
    card = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    )
    quick = ", --quick: sizes that say nothing of speed" * given.quick
    lines = [f"**{card}**, torch {torch.__version__}, `benchmarks/gpu.py --device {given.device}`{quick}", ""]
    print(lines[0], "", sep="\n", flush=True)
    for part in [part for part in PARTS if not given.only or part.__name__ in given.only]:
        for line in _lines(part, device, given.quick, until):
            print(line, flush=True)
            lines.append(line)
            if out := os.environ.get("OUT"):  # after each line: a run that is cut short leaves what it has
                Path(out, "gpu.md").write_text("\n".join(lines), encoding="utf-8")


def _lines(part: Callable[[torch.device, bool], Lines], device: torch.device, quick: bool, until: float) -> Lines:
    """A part's lines, then the time that it took, or why it ended."""
    began, name = time.monotonic(), part.__name__
    try:
        if began < until:
            yield from part(device, quick)
        else:
            yield f"{name}: no time left"
    except Exception as error:  # noqa: BLE001 - the other parts are worth having
        yield f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    yield from ("", f"({name}: {time.monotonic() - began:.0f} s)", "")


def _random(device: torch.device, count: int, shape: tuple[int, int, int], classes: int = 10) -> TrialData:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *shape), generator=generator, dtype=torch.uint8).to(device)
    labels, rows = torch.randint(classes, (count,), generator=generator).to(device), torch.arange(count, device=device)
    channels = shape[2]
    names = tuple(map(str, range(classes)))
    return TrialData(images, labels, rows, rows[:0], names, (0.5,) * channels, (0.25,) * channels)


def _captured(device: torch.device) -> Graph | None:
    """What captures the whole steps of a training, as trials do where they can."""
    return Graph(None, torch.Size(), "whole steps", whole=True) if device.type == "cuda" else None


def _clock(device: torch.device) -> Callable[[], float]:
    """Wall seconds; on a GPU once it has finished."""
    return time.perf_counter if device.type == "cpu" else device_clock(device)


def _fastest(epochs: Iterator[object], device: torch.device) -> float:
    """Seconds of the fastest epoch."""
    now, best = _clock(device), float("inf")
    began = now()
    for _ in epochs:
        best, began = min(best, now() - began), now()
    return best


def families(device: torch.device, quick: bool) -> Lines:
    """Images a second of the platform's loop and of a DataLoader loop of the same network."""
    yield "| network, images in a batch | precision | images/s | of the roof | DataLoader loop, images/s | times |"
    yield "|---|---|---:|---:|---:|---:|"
    precisions = ["float32"] + ["bfloat16"] * has_bfloat16(device)
    for name, family in list(roofline.FAMILIES.items())[: 1 if quick else None]:
        steps = family.steps if device.type == "cpu" else max(20, family.steps)
        many = replace(family, steps=2 if quick else steps)
        plain, words = _loader(name, device, quick)
        for precision in precisions:
            net, data = roofline.build(many, str(device), family.batch)
            rows = data.train[: family.batch]
            inputs, labels = input_of(data)(data.images[rows]), data.labels[rows]
            flops, traffic = roofline.work_of(net, inputs, labels, precision=precision)
            most, copied = roofline.peaks(str(device), precision, torch.get_num_threads())
            spec = roofline.training(family.batch, 2 if quick else 4)
            fit = train(net, data, spec, seed=0, precision=precision, graph=_captured(device))
            rate = len(data.train) / _fastest(fit, device)
            share = flops * rate / family.batch / min(most, flops / traffic * copied)
            times = f"{plain:,.0f}{words} | {rate / plain:.1f}" if plain else f"-{words} | -"
            yield f"| {name}, {family.batch} | {precision} | {rate:,.0f} | {share:.0%} | {times} |"


def _loader(name: str, device: torch.device, quick: bool) -> tuple[float, str]:
    """Images a second of the loop that people write, in a process of its own as theirs is, and what is to be said.

    0 images a second for features. Where its two workers fail, the loop loads the images itself.
    """
    words = ""
    for workers in (2, 0):
        command = [sys.executable, __file__, "--device", str(device), "--loader", name, "--workers", str(workers)]
        done = subprocess.run([*command, *["--quick"] * quick], check=False, capture_output=True, text=True)
        if not done.returncode:
            return float(done.stdout.split()[-1]), words
        words = f" (no workers: {done.stderr.strip().splitlines()[-1][:60]})"
    return 0.0, words


def data_loader(name: str, device: torch.device, workers: int, quick: bool) -> float:
    """Images a second with a DataLoader of so many workers, float images, float32, AdamW."""
    family = roofline.FAMILIES[name]
    family = replace(family, steps=2 if quick else max(20, family.steps))
    net, data = roofline.build(family, str(device), family.batch)
    if data.images.ndim != 4:
        return 0.0
    images = data.images.cpu().permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    loader = DataLoader(
        TensorDataset(images, data.labels.cpu()),
        batch_size=family.batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    optimizer = torch.optim.AdamW(net.train().parameters())

    def epochs() -> Iterator[None]:
        for _ in range(2 if quick else 4):  # the first starts the workers
            for batch, labels in loader:
                optimizer.zero_grad()
                loss = functional.cross_entropy(net(batch.to(device)), labels.to(device))
                loss.backward()
                optimizer.step()
                loss.item()
            yield

    return len(images) / _fastest(epochs(), device)


def stacks(device: torch.device, quick: bool) -> Lines:
    """Networks that share a computation against one by one."""
    mlp, cnn = MlpSpec(kind="mlp", hidden=128), CnnSpec(kind="cnn", filters=16)
    sizes = (2,) if quick else (32, 128)
    yield "| network | together | ms a step of each | one by one, ms a step | times | one by one, eager | times |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for label, model, shape in (("784-128-10", mlp, (28, 28, 1)), ("16 filters, 28 x 28 x 3", cnn, (28, 28, 3))):
        data = _random(device, 256 if quick else 6400, shape)
        spec = TrainingSpec(epochs=3, batch_size=64)
        steps = -(-len(data.train) // spec.batch_size)

        def net(seed: int, model: MlpSpec | CnnSpec = model, shape: tuple[int, int, int] = shape) -> torch.nn.Module:
            return build_model(model, image_shape=shape, classes=10, seed=seed).to(device)

        eager, alone = (
            _fastest(train(net(0), data, spec, seed=0, precision="float32", graph=graph), device) / steps
            for graph in (None, _captured(device))
        )
        for size in sizes:
            stack = Stack(precision="float32")
            fits = [stack.join(net(seed), data, spec, seed=seed) for seed in range(size)]
            each = _fastest(_rounds(fits, spec.epochs), device) / steps / size
            times = f"{1e3 * alone:.3f} | {alone / each:.1f} | {1e3 * eager:.3f} | {eager / each:.1f}"
            yield f"| {label} | {size} | {1e3 * each:.4f} | {times} |"
            if stack.not_captured and device.type == "cuda":
                yield f"| | | not captured: {stack.not_captured} | | | | |"


def _rounds(fits: list[Iterator[object]], epochs: int) -> Iterator[None]:
    for _ in range(epochs):
        for fit in fits:
            next(fit)
        for fit in fits:
            next(fit)
        yield


def graphs(device: torch.device, quick: bool) -> Lines:
    """CUDA graphs on and off."""
    if device.type != "cuda":
        yield "graphs: only on CUDA"
        return
    yield "| network | precision | ms a step | the network captured | times | the step captured | times | how |"
    yield "|---|---|---:|---:|---:|---:|---:|---|"
    for name, family in list(roofline.FAMILIES.items())[: 1 if quick else 6]:
        for precision in ("float32", "bfloat16"):
            many = replace(family, steps=40)
            net, data = roofline.build(many, str(device), family.batch)
            spec = roofline.training(family.batch, 4)
            off = _fastest(train(net, data, spec, seed=0, precision=precision), device) / 40
            net, data = roofline.build(many, str(device), family.batch)
            longer = roofline.training(family.batch, 100)  # short trainings are not captured
            graph = choose_graph(net, data, longer, precision=precision)
            with_graph, times = "-", "-"
            if graph.forward is not None:
                on = _fastest(train(net, data, spec, seed=0, precision=precision, graph=graph), device) / 40
                with_graph, times = f"{1e3 * on:.3f}", f"{off / on:.2f}"
            whole = Graph(None, torch.Size(), "whole steps", whole=True)
            net, data = roofline.build(many, str(device), family.batch)
            all_of_it = _fastest(train(net, data, spec, seed=0, precision=precision, graph=whole), device) / 40
            found = f"{with_graph} | {times} | {1e3 * all_of_it:.3f} | {off / all_of_it:.2f} | {graph.how}, {whole.how}"
            yield f"| {name}, {family.batch} | {precision} | {1e3 * off:.3f} | {found} |"


def convnet(device: torch.device, quick: bool) -> Lines:
    """Ten epochs on images like CIFAR-10's."""
    data = _random(device, 500 if quick else 50_000, (32, 32, 3))
    filters = [8, 8] if quick else [64, 256, 256]
    model = ConvnetSpec(kind="convnet", filters=filters, convs_per_block=2, activation="gelu")
    spec = TrainingSpec(
        epochs=2 if quick else 10,
        batch_size=100 if quick else 1000,
        optimizer=OptimizerSpec(name="sgd", lr=0.1, momentum=0.85, nesterov=True, weight_decay=5e-4),
        schedule=ScheduleSpec(name="one_cycle"),
        augment=AugmentSpec(flip_horizontal=True, crop=2),
        label_smoothing=0.2,
    )
    precision = "bfloat16" if has_bfloat16(device) else "float32"
    net, now = build_model(model, image_shape=(32, 32, 3), classes=10, seed=0).to(device), _clock(device)
    began = now()
    seconds = [epoch.seconds for epoch in train(net, data, spec, seed=0, precision=precision)]
    whole = now() - began
    yield f"| {spec.epochs} epochs of {len(data.train):,} x 32 x 32 x 3, filters {filters}, {precision} | seconds |"
    yield "|---|---:|"
    yield f"| all | {whole:.1f} |"
    yield f"| the fastest epoch | {min(seconds):.2f} |"


def workers(device: torch.device, quick: bool) -> Lines:
    """Trials a minute of a small convnet, by the number of processes that share the device."""
    yield "| workers | trials a minute | times |"
    yield "|---:|---:|---:|"
    first = 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "images.npz")
        random, count = np.random.default_rng(0), 300 if quick else 4000
        np.savez(file, **_parts(random, count))
        for number in (1,) if quick else (1, 2, 4, 8):
            model = {"kind": "convnet", "width": 4 if quick else 32, "depth": 2}
            settings = {
                "data": {"name": "npz", "path": str(file)},
                "model": model,
                "training.epochs": 1 if quick else 4,
                "training.patience": None,
                "search.pruner": "none",
                "search.sampler": "random",
                "search.space": {"training.optimizer.lr": {"float": [1e-4, 1e-2]}},
                "keep.models": "none",
                "keep.figures": "none",
            }
            times: list[float] = []

            def watch(event: Event, times: list[float] = times) -> None:
                if isinstance(event, TrialStarted | TrialEnded):
                    times.append(time.perf_counter())

            trials = max(2, 3 * number)
            spec = load_study("digits-mlp", overrides=settings)
            home = Path(folder, str(number))
            home.mkdir()
            run_study(spec, trials=trials, workers=number, stack=1, device=str(device), home=home, watch=watch)
            rate = 60 * trials / (max(times) - min(times))
            first = first or rate
            yield f"| {number} | {rate:.0f} | {rate / first:.2f} |"


def _parts(random: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    sizes = {"train": count, "val": count // 4, "test": count // 4}
    images = {f"{part}_images": random.integers(256, size=(n, 32, 32, 3)).astype(np.uint8) for part, n in sizes.items()}
    return images | {f"{part}_labels": random.integers(10, size=(n, 1)) for part, n in sizes.items()}


def start(device: torch.device, quick: bool) -> Lines:  # noqa: ARG001 - it has one size
    """From the command to the first epoch."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    bare = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "hpo", "run", "digits-mlp", "--trials", "1", "--json"]
        command += ["--device", str(device), "--stack", "1", "--home", home]
        began = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            heard = [(json.loads(line)["event"], time.perf_counter() - began) for line in process.stdout]
        first = next(seconds for event, seconds in heard if event == "epoch_ended")
    yield "| start | seconds | to import torch |"
    yield "|---|---:|---:|"
    yield f"| import torch | {bare:.2f} | 1.00 |"
    yield f"| `hpo run digits-mlp` to its first epoch | {first:.2f} | {first / bare:.2f} |"


def system_metrics(device: torch.device, quick: bool) -> Lines:
    """What a sample of system metrics costs the worker's thread for them."""
    gpus, seconds = gpus_of(str(device)), []
    for _ in range(20 if quick else 200):
        began = time.perf_counter()
        read_counters(), read_levels(gpus)
        seconds.append(time.perf_counter() - began)
    yield "| a sample of system metrics | milliseconds |"
    yield "|---|---:|"
    yield f"| median of {len(seconds)} | {1e3 * sorted(seconds)[len(seconds) // 2]:.2f} |"
    yield f"| names of GPUs read | {sum('gpu' in name for name in read_levels(gpus))} |"


# The most wanted first.
PARTS: tuple[Callable[[torch.device, bool], Lines], ...] = (
    stacks,
    graphs,
    families,
    convnet,
    start,
    workers,
    system_metrics,
)

if __name__ == "__main__":
    main()
