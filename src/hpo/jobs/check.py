"""Check a study: one real batch through model, loss, backward and export, and an estimate of its cost."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from hpo.data.duplicates import refuse_shared
from hpo.execute.base_model import with_model
from hpo.execute.finals import check_final
from hpo.execute.process import cores
from hpo.home import Home
from hpo.records import DataCard, SplitCard
from hpo.search.stages import total_trials
from hpo.spec.study import StudySpec


@dataclass(frozen=True)
class CheckReport:
    """Measurements of one batch. Seconds and bytes are estimates for this spec and the present load of this machine.

    estimated_seconds is for `trials` trials of the full number of epochs on `workers` workers, estimated_bytes for
    their kept models. warnings name settings that are allowed but rarely intended. near_duplicates counts images of a
    later part that look nearly like one of an earlier part.
    """

    data: DataCard
    split: SplitCard
    device: str
    precision: str
    parameter_count: int
    batch_seconds: float
    features_seconds: float
    epoch_seconds: float
    export_seconds: float
    model_bytes: int
    workers: int
    trials: int
    estimated_seconds: float
    estimated_bytes: float
    warnings: tuple[str, ...]
    near_duplicates: str


def check_study(
    spec: StudySpec, *, trials: int | None = None, device: str = "auto", home: str | Path | None = None
) -> CheckReport:
    """Validate a study against its data and this machine. Raises HpoError for what would fail a run."""
    from hpo.data.overview import near_words
    from hpo.data.prepare import prepare
    from hpo.data.split import split_card
    from hpo.training.device import resolve_devices
    from hpo.training.preflight import failing_ends, preflight

    spec = with_model(spec, Home.find(home))
    devices = resolve_devices(device)
    card = prepare(spec.data, spec.split)
    refuse_shared(card)
    split = split_card(card, spec.split)
    check_final(spec, card)
    with tempfile.TemporaryDirectory() as folder:
        flight = preflight(spec.setup, card, device_name=devices[0], seed=spec.seed_of(0), folder=Path(folder))
    count = trials or total_trials(spec)
    workers = cores() if devices[0] == "cpu" else len(devices)
    folds = spec.split.folds if spec.split.kind == "kfold" else 1
    epochs = count * folds * spec.training.epochs
    if spec.final is not None:
        epochs += spec.final.trainings * spec.final.set.get("training.epochs", spec.training.epochs)
    return CheckReport(
        data=card,
        split=split,
        device=devices[0],
        precision=flight.speed.precision,
        parameter_count=flight.speed.parameter_count,
        batch_seconds=flight.speed.batch_seconds,
        features_seconds=flight.speed.features_seconds,
        epoch_seconds=flight.speed.epoch_seconds,
        export_seconds=flight.export_seconds,
        model_bytes=flight.model_bytes,
        workers=workers,
        trials=count,
        estimated_seconds=(epochs * flight.speed.epoch_seconds + flight.speed.features_seconds) / min(workers, count),
        estimated_bytes=flight.model_bytes * min(count, spec.keep.count),
        warnings=(*card.warnings, *_warnings(spec, card, split), *failing_ends(spec, card)),
        near_duplicates=near_words(card, spec.split),
    )


def _warnings(spec: StudySpec, card: DataCard, split: SplitCard) -> list[str]:
    found = []
    if not card.official and spec.data.path is None:
        found.append("the data is not the publisher's file")
    if spec.training.batch_size > split.counts["train"]:
        found.append(
            f"training.batch_size {spec.training.batch_size} exceeds the {split.counts['train']} training images: "
            "every epoch is one step"
        )
    if card.several_labels and spec.split.kind in ("holdout", "kfold") and spec.split.by == "stratified":
        found.append("images have several labels: parts are drawn at random by split.seed, not by class")
    drift = max(abs(train - valid) for train, valid in zip(split.shares["train"], split.shares["valid"], strict=True))
    if drift > 0.05 and not card.several_labels:
        found.append(
            f"class shares of train and validation differ by up to {100 * drift:.0f} points: "
            "split by: stratified makes them equal"
        )
    size = spec.search.space.size(spec.fixed())
    if size is not None and spec.search.trials > size:
        found.append(f"search.trials {spec.search.trials} exceeds the {size} different candidates of the space")
    from hpo.search.pruners import pruner_warnings

    return [*found, *pruner_warnings(spec)]


def preview_study(spec: StudySpec, path: Path, *, images: int = 8, copies: int = 7) -> Path:
    """Write a PNG of training images as the study's augmentation changes them. Raises HpoError."""
    from hpo.data.prepare import prepare
    from hpo.training.preflight import save_preview

    card = prepare(spec.data, spec.split)
    return save_preview(spec.setup, card, path, images=images, copies=copies, seed=spec.seed)
