"""What each trick of a training recipe gives on validation images, over seeds, beside the same training without it.

    OMP_NUM_THREADS=1 python benchmarks/recipes.py bloodmnist-best --set data.path=images.npz --epochs 8 --images 2000

The study's own network and training are the base. Every seed trains the base and each trick from the same first weights
(where the trick leaves the network as it is) and with the same order of images; differences are those of pairs of one
seed, with Student's 95 % interval over seeds. The score is the accuracy after the last epoch: no epoch is chosen.
Views and temperature change no training: they are judged on the networks of the base, each half of the validation
images with what the other half chose. The test part is never read.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import torch

from curves import arguments, loaded, part_of
from hpo.data.prepare import TrialData
from hpo.models.calibration import calibration_of
from hpo.models.views import View, candidates, choose
from hpo.records import DataCard
from hpo.spec.study import Setup, StudySpec
from hpo.training.loop import predict_logits, train
from hpo.training.trial import build_full

# Student's t, 97.5 %, for 4 to 30 degrees of freedom.
_T = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201, 14: 2.145, 19: 2.093, 29: 2.045}

TRICKS: Mapping[str, dict[str, Any]] = {
    "muon": {"training.optimizer.name": "timm/muon"},
    "twice the rate": {"training.optimizer.lr": 2.0},
    "muon, twice the rate": {"training.optimizer.name": "timm/muon", "training.optimizer.lr": 2.0},
    "lion, a fifth of the rate": {"training.optimizer.name": "timm/lion", "training.optimizer.lr": 0.2},
    "lamb, twice the rate": {"training.optimizer.name": "timm/lamb", "training.optimizer.lr": 2.0},
    "whitened first layer": {"model.whiten": 2},
    "alternating flips": {"training.augment.alternate_flips": True},
    "growing images": {"training.first_size": 0.6},
    "one restart": {"training.schedule.name": "cosine", "training.schedule.restarts": 1},
    "moving average 0.99": {"training.ema": 0.99},
    "cutmix 0.5": {"training.augment.cutmix": 0.5},
    "no label smoothing": {"training.label_smoothing": 0.0},
}
_FACTORS = ("training.optimizer.lr",)  # numbers above are those of the base times this


@dataclass(frozen=True)
class Run:
    """Validation accuracy after the last epoch, seconds of training, and what views and a temperature gave."""

    accuracy: float
    seconds: float
    views: float = 0.0
    chosen: int = 1
    errors: tuple[float, float] = (0.0, 0.0)


def main() -> None:
    """Train, and print the table as it grows."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="instead of the study's")
    parser.add_argument("--tricks", nargs="*", choices=list(TRICKS), default=list(TRICKS))
    asked = parser.parse_args()
    epochs = {"epochs": asked.epochs} if asked.epochs else {}
    spec, card = loaded(asked.study, asked.places, patience=None, **epochs)
    part = {"images": asked.images, "valid": asked.valid}
    print(f"{asked.study}, {spec.training.epochs} epochs, {asked.seeds} seeds, {platform.machine()}")
    base = [_run(spec.setup, card, seed, part, judged=True) for seed in range(asked.seeds)]
    accuracies = [run.accuracy for run in base]
    print(f"{'trick':28} {'accuracy':>9} {'spread':>7}   difference (95 % interval), points   time")
    print(f"{'none':28} {fmean(accuracies):9.4f} {stdev(accuracies):7.4f}")
    for name in asked.tricks:
        if (setup := _with(spec, TRICKS[name])) is None:
            print(f"{name:28} does not fit this study")
            continue
        runs = [_run(setup, card, seed, part) for seed in range(asked.seeds)]
        pairs = [100 * (run.accuracy - plain.accuracy) for run, plain in zip(runs, base, strict=True)]
        found = [run.accuracy for run in runs]
        slower = sum(run.seconds for run in runs) / sum(run.seconds for run in base)
        print(f"{name:28} {fmean(found):9.4f} {stdev(found):7.4f}   {_interval(pairs):35} x {slower:.2f}", flush=True)
    chosen = [run.chosen for run in base]
    print(f"{'views of the base':28} {'':9} {'':7}   {_interval([100 * run.views for run in base]):35} views {chosen}")
    before, after = (fmean(run.errors[place] for run in base) for place in (0, 1))
    print(f"calibration error of the base: {before:.4f} without a temperature, {after:.4f} with one")


def _with(spec: StudySpec, places: Mapping[str, Any]) -> Setup | None:
    """The study's setup with a trick; None where it does not fit."""
    flat = spec.setup.flat()
    given = {path: value * flat[path] if path in _FACTORS else value for path, value in places.items()}
    if "training.augment.alternate_flips" in given and not spec.training.augment.flip_horizontal:
        return None
    try:
        return spec.with_values({}, fixed=given)
    except Exception:  # noqa: BLE001 - whatever it is, the table says that it does not fit
        return None


def _run(setup: Setup, card: DataCard, seed: int, part: Mapping[str, int | None], *, judged: bool = False) -> Run:
    net, data = build_full(setup, card, seed=seed, device_name="cpu")
    data = part_of(data, **part)
    precision = "float32" if setup.training.precision == "auto" else setup.training.precision
    started = time.perf_counter()
    epochs = list(
        train(net, data, setup.training.model_copy(update={"checkpoint": None}), seed=seed, precision=precision)
    )
    seconds = time.perf_counter() - started
    run = Run(epochs[-1].scores["valid_accuracy"], seconds)
    return _judged(run, net, data, setup) if judged else run


def _judged(run: Run, net: torch.nn.Module, data: TrialData, setup: Setup) -> Run:
    labels = data.labels[data.valid]

    def answer(view: View) -> torch.Tensor:
        seen = replace(data, images=view(data.images[data.valid]))
        return predict_logits(net, seen, torch.arange(len(labels)), precision="float32").softmax(1)

    found = choose(answer, labels, candidates(setup.training.augment, data.images.shape[1:]))
    calibration = calibration_of(answer(View()), labels)
    errors = calibration.error if calibration else (0.0, 0.0)
    if found is None:
        return replace(run, errors=errors)
    choice = found[0]
    return replace(run, views=choice.accuracy.value, chosen=len(choice.views), errors=errors)


def _interval(values: list[float]) -> str:
    mean, free = fmean(values), len(values) - 1
    near = min(_T, key=lambda known: abs(known - free))
    half = _T[near] * stdev(values) / len(values) ** 0.5
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


if __name__ == "__main__":
    main()
