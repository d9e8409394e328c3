"""Compare frozen backbones on a data set by cross-validated heads on their features, and write a study of the best."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from hpo.errors import HpoError, SpecError
from hpo.jobs.data_report import find_data
from hpo.records import DataCard, Epoch
from hpo.spec.models import TimmBackbone, TorchvisionBackbone
from hpo.spec.space import Part
from hpo.spec.study import DataSpec, Setup, SplitSpec

AnyBackbone = TorchvisionBackbone | TimmBackbone
HEADS: Mapping[str, dict[str, Any]] = {"linear": {}, "small": {"dense": [256], "dropout": 0.3}}
_SMALLEST = 64  # pixels: less than this the networks of the libraries rarely see
_TRAINING = {
    "epochs": 15,
    "batch_size": 256,
    "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-2},
    "schedule": {"name": "one_cycle"},
}
Report = Callable[["Probed"], None]


@dataclass(frozen=True)
class Probed:
    """The accuracy of one head on the features of one backbone, or of several side by side.

    folds holds the validation accuracy of each fold after the last epoch, in [0, 1]. minutes are those of the features
    of all images, where they were not in the cache, and of the head.
    """

    backbones: tuple[AnyBackbone, ...]
    head: str
    folds: tuple[float, ...]
    minutes: float

    @property
    def mean(self) -> float:
        """The mean over folds."""
        return fmean(self.folds)

    @property
    def spread(self) -> float:
        """The standard deviation over folds, divisor n - 1."""
        return stdev(self.folds)

    @property
    def name(self) -> str:
        """The backbones with their input sizes."""
        return " + ".join(f"{each.kind}:{each.name} at {each.input_size} px" for each in self.backbones)


@dataclass(frozen=True)
class Probe:
    """All that was probed, the best first, and the study file that was written of the best."""

    data: DataCard
    images: int
    rows: tuple[Probed, ...]
    file: Path


def probe(
    name: str,
    *,
    path: str | Path | None = None,
    size: int | None = None,
    backbones: Sequence[str] = (),
    sizes: Sequence[int] = (),
    folds: int = 5,
    fuse: int = 2,
    device: str = "auto",
    out: str | Path | None = None,
    trust: bool = False,
    report: Report = lambda _: None,
) -> Probe:
    """Train heads on the features of frozen backbones, fold by fold over training and validation images.

    name, path and size are those of hpo data show. backbones are KIND:NAME, with published weights, or KIND:NAME=FILE;
    none: those whose weights are in the caches. sizes are input sizes in pixels; none: the side of the images, 64 at
    least, and the size that each network was trained at. The `fuse` best backbones are probed together, too, and out,
    by default NAME-probe.yaml, is a study file of them. report hears of each row as it is ready. The test part stays
    sealed. Raises HpoError.
    """
    from hpo.data.prepare import prepare
    from hpo.training.device import resolve_devices

    file = Path(out or f"{Path(name).stem.replace(':', '-')}-probe.yaml").absolute()
    if file.exists():
        raise HpoError(f"{file}: is there already.", "Name another file: --out FILE")
    if not file.parent.is_dir():  # now, and not after all the measuring
        raise HpoError(f"{file.parent}: there is no such folder.", "Make it, or name another file: --out FILE")
    if not os.access(file.parent, os.W_OK):
        raise HpoError(f"{file.parent}: no file can be written there.", "Name another file: --out FILE")
    named = [_read(text) for text in backbones] or _at_hand()
    data, split = find_data(name, path=path, size=size, trust=trust)
    split = split or SplitSpec()
    card = prepare(data, split)
    bench = _Bench(data, split.model_copy(update={"kind": "kfold", "folds": folds}), card, resolve_devices(device)[0])
    rows: list[Probed] = []
    for backbone in named:
        for one in _sized(backbone, sizes, min(card.image_shape[:2])):
            rows += _noted(bench.measure((one,)), report)
    best = _best(rows, fuse)
    if len(best) > 1:
        rows += _noted(bench.measure(best), report)
    rows.sort(key=lambda row: -row.mean)
    file.write_text(_study(data, split, best, rows[0], card), encoding="utf-8")
    return Probe(card, card.development_count, tuple(rows), file)


def _noted(rows: Iterator[Probed], report: Report) -> Iterator[Probed]:
    for row in rows:
        report(row)
        yield row


def _read(text: str) -> AnyBackbone:
    """KIND:NAME or KIND:NAME=FILE."""
    network, _, file = text.partition("=")
    kind, _, name = network.partition(":")
    weights = str(Path(file).expanduser().absolute()) if file else "imagenet"
    try:
        adapter: TypeAdapter[AnyBackbone] = TypeAdapter(AnyBackbone)
        return adapter.validate_python({"kind": kind, "name": name, "weights": weights, "levels": "all"})
    except ValidationError:
        raise SpecError(
            f"--backbone {text}: not KIND:NAME or KIND:NAME=FILE, with torchvision or timm as KIND.",
            "For example: --backbone timm:tf_efficientnet_lite0=weights.pth",
        ) from None


def _at_hand() -> list[AnyBackbone]:
    from hpo.data.cache import weights_at_hand

    found = [_read(f"{kind}:{name}") for kind, name in weights_at_hand()]
    if not found:
        raise HpoError(
            "no weights of torchvision or timm are in the caches of this machine.",
            "Name some, which are downloaded, or their files: --backbone timm:resnet18 --backbone timm:NAME=FILE",
        )
    return found


def _sized(backbone: AnyBackbone, sizes: Sequence[int], side: int) -> list[AnyBackbone]:
    """The backbone at each input size, and with the features of its last layer alone where it has no stages."""
    from hpo.models.backbones import shared_backbone

    try:
        usual = shared_backbone(backbone, side=side, pool=None).size
    except SpecError:
        backbone = backbone.model_copy(update={"levels": "last"})
        usual = shared_backbone(backbone, side=side, pool=None).size
    wanted = sizes or sorted({max(_SMALLEST, side), usual or side})
    return [backbone.model_copy(update={"input_size": each}) for each in wanted]


class _Bench:
    """Measures heads on the features of backbones, by folds."""

    def __init__(self, data: DataSpec, split: SplitSpec, card: DataCard, device: str) -> None:
        self._data, self._split, self._card, self._device = data, split, card, device
        self._task = "multilabel" if card.several_labels else "multiclass"

    def measure(self, backbones: tuple[AnyBackbone, ...]) -> Iterator[Probed]:
        for head, settings in HEADS.items():
            started = time.perf_counter()
            found = self._folds(backbones, settings)
            yield Probed(backbones, head, found, (time.perf_counter() - started) / 60)

    def _folds(self, backbones: tuple[AnyBackbone, ...], settings: Mapping[str, Any]) -> tuple[float, ...]:
        from hpo.training.trial import TrialPlan, train_trial

        plain = {"data": self._data, "split": self._split, "training": _TRAINING, "task": self._task}
        setup = Setup.model_validate({**plain, "model": {**_model(backbones), **settings}})
        with tempfile.TemporaryDirectory() as folder:
            plan = TrialPlan(setup, self._card.sealed, 0, 0, Path(folder), self._device)
            training, last = train_trial(plan), dict[int, Epoch]()
            try:
                epoch = next(training)
                while True:
                    if epoch is not None:
                        last[epoch.fold] = epoch
                    epoch = training.send(True)
            except StopIteration:
                # Not the best epoch: it would be chosen on the images that judge.
                return tuple(epoch.scores["valid_accuracy"] for epoch in last.values())


def _model(backbones: Sequence[AnyBackbone]) -> dict[str, Any]:
    frozen = {"freeze": "all", "batch_norm": True}
    if len(backbones) == 1:
        return {**backbones[0].model_dump(), **frozen}
    return {"kind": "fusion", "backbones": [each.model_dump() for each in backbones], **frozen}


def _best(rows: Sequence[Probed], count: int) -> tuple[AnyBackbone, ...]:
    """The best backbones, each at its best size."""
    found: dict[tuple[str, str], AnyBackbone] = {}
    for row in sorted(rows, key=lambda row: -row.mean):
        backbone = row.backbones[0]
        found.setdefault((backbone.kind, backbone.name), backbone)
    return tuple(found.values())[:count]


def _study(data: DataSpec, split: SplitSpec, best: Sequence[AnyBackbone], first: Probed, card: DataCard) -> str:
    """The text of a study file that searches the head of the best backbones."""
    if split.kind == "official" and card.valid_start is None:
        split = split.model_copy(update={"kind": "holdout"})
    question = f"How good is a tuned head? Probed before: {first.name}, {first.head} head, {first.mean:.4f}."
    tree = {
        "question": question,
        "data": _given(data),
        "split": {"kind": split.kind, **_given(split)},
        "model": {key: value for key, value in _model(best).items() if value is not None},
        "training": {**_TRAINING, "epochs": 20, "monitor": "valid_accuracy"},
        "search": {
            "objective": "valid_accuracy",
            "trials": 30,
            "sampler": {"name": "tpe", "startup_trials": 10},
            "pruner": {"name": "hyperband", "min_epochs": 3, "reduction_factor": 3},
            "space": {
                "model.dense": {"choice": [[], [128], [256], [512]]},
                "model.dropout": {"float": [0.0, 0.7]},
                "training.optimizer.lr": {"float": [3e-4, 2e-2], "log": True},
                "training.optimizer.weight_decay": {"float": [1e-3, 3e-1], "log": True},
                "training.label_smoothing": {"choice": [0.0, 0.1]},
            },
        },
    }
    if card.several_labels:
        tree["task"] = "multilabel"
    return yaml.safe_dump(tree, sort_keys=False, width=120, allow_unicode=True)


def _given(part: Part) -> dict[str, Any]:
    """The settings of a part that are not its defaults, files by their absolute paths."""
    plain = part.model_dump(mode="json", exclude_defaults=True)
    if plain.get("path"):
        plain["path"] = str(Path(plain["path"]).absolute())
    return plain
