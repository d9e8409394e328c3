"""How long a step of a small network takes, alone and side by side with others.

    OMP_NUM_THREADS=1 uv run python benchmarks/stacks.py                    # 784-128-10, batches of 64, Fashion-MNIST
    OMP_NUM_THREADS=1 uv run python benchmarks/stacks.py --hidden 512 --batch 128
    OMP_NUM_THREADS=1 uv run python benchmarks/stacks.py --filters 16 --channels 3 --sizes 1 4 16   # one convolution

Alone is the platform's own training loop, and beside it the loop that people write: torch.optim.Adam, cross_entropy, a
tensor of float images, shuffled. On a CPU one thread, and its own time, whatever else the machine does; each line is
the least of --repeats, which take turns, so that all lines see the same noise. A step is that of one network: what a
stack takes is divided by its members, and validation on an eighth as many images is in it. --channels 3 makes grey
images coloured, of three equal channels, which takes the time of any others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from hpo.data.prepare import TrialData, open_trial, prepare
from hpo.models import build_model, input_of
from hpo.records import Epoch
from hpo.spec.models import CnnSpec, MlpSpec
from hpo.spec.study import DataSpec, SplitSpec
from hpo.spec.training import TrainingSpec
from hpo.training.device import device_clock, has_bfloat16
from hpo.training.loop import predict_logits, train
from hpo.training.stack import Stack


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="fashionmnist", help="a name that hpo data lists")
    parser.add_argument("--images", type=int, default=12_800, help="training images of an epoch")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--filters", type=int, default=0, help="of a network of one convolution; 0: a perceptron")
    parser.add_argument("--kernel", type=int, default=3)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="*", help="of the stacks")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    data = _data(given.data, device, images=given.images, channels=given.channels)
    spec = TrainingSpec(epochs=3, batch_size=given.batch)
    sizes = given.sizes or ((2, 4, 8, 16) if device.type == "cpu" else (8, 32, 128))
    model: MlpSpec | CnnSpec = MlpSpec(kind="mlp", hidden=given.hidden)
    if given.filters:
        model = CnnSpec(kind="cnn", filters=given.filters, kernel=given.kernel)
    ways: dict[str, Callable[[], float]] = {"plain loop": lambda: _plain(_net(data, 0, model), data, spec)}
    for precision in ["float32"] + ["bfloat16"] * has_bfloat16(device):
        ways[f"alone, {precision}"] = lambda p=precision: _alone(_net(data, 0, model), data, spec, p)
        for size in sizes:
            ways[f"{size} in a stack, {precision}"] = lambda p=precision, k=size: _stacked(
                [_net(data, seed, model) for seed in range(k)], data, spec, p
            )
    seconds = {name: float("inf") for name in ways}
    for _ in range(given.repeats):
        for name, way in ways.items():
            seconds[name] = min(seconds[name], way())
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "one thread of the CPU"
    steps = -(-len(data.train) // given.batch)
    print(f"{_shape(data, model)}, batches of {given.batch}, {len(data.train)} images, {name}, n = {given.repeats}")
    print(f"{'':28}{'ms a step':>10}{'times alone':>13}")
    for way, took in seconds.items():
        print(f"{way:28}{1000 * took / steps:10.3f}{seconds['alone, float32'] / took:13.2f}")
    if device.type == "cpu":
        print("no GPU here: its rows are not measured")


def _data(name: str, device: torch.device, *, images: int, channels: int) -> TrialData:
    split = SplitSpec(kind="holdout")
    data = open_trial(prepare(DataSpec(name=name), split), split, device=device)
    if channels > data.images.shape[3]:
        coloured = data.images.expand(-1, -1, -1, channels).contiguous()
        data = replace(data, images=coloured, mean=data.mean * channels, std=data.std * channels)
    return replace(data, train=data.train[:images], valid=data.valid[: images // 8])


def _shape(data: TrialData, model: MlpSpec | CnnSpec) -> str:
    if isinstance(model, MlpSpec):
        return f"{data.images[0].numel()}-{model.hidden}-{len(data.class_names)}"
    sides = "x".join(map(str, data.images.shape[1:]))
    return f"{model.filters} filters of {model.kernel}x{model.kernel} on {sides}"


def _net(data: TrialData, seed: int, model: MlpSpec | CnnSpec) -> torch.nn.Module:
    height, width, channels = data.images.shape[1:]
    shape = (height, width, channels)
    net = build_model(model, image_shape=shape, classes=len(data.class_names), seed=seed)
    return net.to(data.images.device)


def _plain(net: torch.nn.Module, data: TrialData, spec: TrainingSpec) -> float:
    inputs = torch.cat([input_of(data)(part) for part in torch.split(data.images, 1024)])
    optimizer = torch.optim.Adam(net.parameters())
    clock, best = device_clock(data.images.device), float("inf")
    for _ in range(spec.epochs):
        started = clock()
        loss_sum = 0.0
        for rows in data.train[torch.randperm(len(data.train))].split(spec.batch_size):
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(inputs[rows]), data.labels[rows])
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
        predict_logits(net, data, data.valid, precision="float32")
        net.train()
        best = min(best, clock() - started)
    return best


def _alone(net: torch.nn.Module, data: TrialData, spec: TrainingSpec, precision: str) -> float:
    return _least([train(net, data, spec, seed=0, precision=precision)], data, spec)


def _stacked(nets: list[torch.nn.Module], data: TrialData, spec: TrainingSpec, precision: str) -> float:
    stack = Stack(precision=precision)
    return _least([stack.join(net, data, spec, seed=seed) for seed, net in enumerate(nets)], data, spec)


def _least(fits: Sequence[Generator[Epoch | None, None, None]], data: TrialData, spec: TrainingSpec) -> float:
    """Seconds of an epoch of each."""
    clock, best = device_clock(data.images.device), float("inf")
    for _ in range(spec.epochs):
        started = clock()
        for waits in [fit for fit in fits if next(fit) is None]:
            next(waits)
        best = min(best, (clock() - started) / len(fits))
    for fit in fits:
        fit.close()
    return best


if __name__ == "__main__":
    main()
