"""Write a study for images of the user's own: look at them, measure what fits into a budget, and say why."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpo.data.duplicates import refuse_shared
from hpo.data.survey import describe_source, is_source, most_common_side, same_size, sides_of, symmetries
from hpo.errors import DataError, HpoError, SpecError
from hpo.execute.process import cores
from hpo.jobs.shared.new_source import given_data, refuse_among_images, refuse_other_settings
from hpo.jobs.shared.presets import Fill, Preset, budget_of, fill_from_scratch, fill_frozen
from hpo.jobs.shared.study_text import Decision, study_text
from hpo.records import DataCard
from hpo.report.text import counted, duration
from hpo.spec.files import SHIPPED, study_files
from hpo.spec.load import load_study
from hpo.spec.study import STUDY_NAME, DataSpec, SplitSpec, StudySpec

_SIDES = (224, 128, 96, 64, 32)
_MOST_BYTES = 1_500_000_000  # of all images, prepared
_SCRATCH_SIDE = 64  # pixels; larger images train from scratch at this side
_FROZEN_SIDE, _FROZEN_IMAGES = 32, 20_000  # below this side, or with more images, a network from scratch is better
_SMALL = 1_000  # images; with fewer, one validation part is too small to choose by
_VALIDATION = 2_000  # images that suffice to choose by
_RATIO = 5.0  # of the largest to the smallest class, from which on classes count equally
_NEAR = 0.01  # share of a part that looks like images of another part
_SYMMETRIC = 0.75  # of the accuracy above chance is left where a data set is symmetric under a change
_HEAD_EPOCHS = 25


@dataclass(frozen=True)
class NewStudy:
    """A study file that was written: its name and path, what it holds, and why.

    seconds is the estimate of a run, closing that of its final training.
    """

    name: str
    file: Path
    data: DataCard
    decisions: tuple[Decision, ...]
    warnings: tuple[str, ...]
    trials: int
    seconds: float
    closing: float
    minutes: float


def source_of(source: str) -> Path | None:
    """The path of images of the user's own that is given in place of a study; None for the name of a study.

    A study that was written for these images has their name, too.
    """
    path = Path(source).expanduser()
    if not is_source(path):
        return None
    file = study_files().get(source)
    return path if file is None or same_source(file, path) else None


def default_file(source: Path) -> Path:
    """The study file that `hpo new` writes for a source: studies/NAME.yaml in the working directory."""
    plain = source.expanduser().absolute()
    stem = plain.stem if plain.suffix and plain.is_file() else plain.name
    if stem.lower() in ("labels", "label", "metadata", "train", "data", "dataset", "images", "index"):
        stem = plain.parent.name or stem
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._").lower() or "images"
    ships = any((folder / f"{name}.yaml").is_file() for folder in SHIPPED)
    return Path("studies") / f"{f'{name}-own' if ships else name[:100]}.yaml"


def new_study(
    source: str | Path,
    *,
    file: Path | None = None,
    preset: str = "good",
    minutes: float | None = None,
    size: int | None = None,
    settings: Sequence[str] = (),
    weights: Sequence[str] = (),
    device: str = "auto",
    workers: int | None = None,
) -> NewStudy:
    """Look at a folder, npz or table of images, and write a study that fits into so many minutes on this machine.

    preset is a key of PRESETS, whose minutes are the default. settings are texts such as data.size=64, which go before
    what the images are; all of them are about the data. weights are texts NAME=FILE of pretrained networks, or
    "none" to use none; by default those whose weights are in the caches are used. Raises HpoError for data that no
    study could use, where the file exists, and where it would be among the images.
    """
    plan, minutes = budget_of(preset, minutes)
    path, file = Path(source).expanduser(), file or default_file(Path(source))
    if file.suffix not in (".yaml", ".yml"):
        raise SpecError(f"{file}: is not a study file.", "Give a name that ends in .yaml")
    if not re.fullmatch(STUDY_NAME, file.stem):
        raise SpecError(f"{file}: {file.stem!r} is no name of a study.", "Take up to 100 of A-Z a-z 0-9 . _ - only.")
    if file.exists():
        raise HpoError(f"{file}: exists already.", f"Run it: hpo run {file.stem}. Or write another one: --out FILE")
    refuse_among_images(path, file=file)
    refuse_other_settings(settings, path)
    draft = _Draft(path, file, size, settings)
    draft.look()
    draft.fill(plan, minutes, weights=weights, device=device, workers=workers)
    draft.write(f"preset {preset}, {minutes:g} minute{'' if minutes == 1 else 's'}")
    return draft.study(minutes)


class _Draft:
    """A study that is being made: the tree of its file, and the reasons of its parts."""

    def __init__(self, path: Path, file: Path, size: int | None, settings: Sequence[str] = ()) -> None:
        self.path, self.file, self._size, self._settings = path.absolute(), file, size, settings
        self.tree: dict[str, Any] = {}
        self.decisions: list[Decision] = []
        self.warnings: list[str] = []
        self.fitted: Fill | None = None

    def decide(self, subject: str, choice: str, reason: str) -> None:
        """Note one choice."""
        self.decisions.append(Decision(subject, choice, reason))

    def look(self) -> None:
        """Choose data, split, objective and augmentation by what the images are."""
        given = given_data(self.path, self._settings)
        described, group = describe_source(self.path, given)
        data = {key: value for key, value in {**given, **described, **given}.items() if value is not None}
        if self._size and data.get("size", self._size) != self._size:
            raise SpecError(f"--size {self._size} and data.size={data['size']}: differ.", "Leave one of them out.")
        self._size = self._size or data.get("size")
        data |= self._sized()
        split: dict[str, Any] = {"kind": "holdout", **({"group": group} if group else {})}
        self.card = self._prepared(data, split)
        refuse_shared(self.card)
        if self.card.groups:
            self.decide("groups", f"{self.card.groups:,}", "images of one group stay in one part")
        split = self._split(data, split)
        self.tree = {"data": data, "split": split}
        self._balance()
        self._augment()

    def _sized(self) -> dict[str, Any]:
        """data.size, where files of several sizes, or larger ones than are trained on, need one."""
        if self.path.suffix.lower() == ".npz" and self.path.is_file():
            if self._size:
                raise SpecError(
                    f"data.size {self._size}: {self.path} has images of one size.", "Leave --size, or data.size, out."
                )
            return {}
        if self._size:
            return {"size": self._size}
        sides, count = sides_of(self.path if self.path.is_dir() else self.path.parent)
        if not sides:  # reading the data says what is wrong
            return {}
        side = most_common_side(sides)
        if same_size(sides) and max(sides[0]) <= _SIDES[0]:
            self.decide("size", f"{sides[0][0]} x {sides[0][1]} pixels", "all files have it")
            return {}
        fits = [each for each in _SIDES if each <= side and 3 * count * each**2 <= _MOST_BYTES] or [_SIDES[-1]]
        self.decide("size", f"{fits[0]} x {fits[0]} pixels", f"the shorter side of the files is mostly {side}")
        return {"size": fits[0]}

    def _prepared(self, data: dict[str, Any], split: dict[str, Any]) -> DataCard:
        from hpo.data.prepare import prepare

        return prepare(DataSpec(**data), SplitSpec(**split))

    def _split(self, data: dict[str, Any], split: dict[str, Any]) -> dict[str, Any]:
        from hpo.data.overview import near_duplicates

        card = self.card
        if card.valid_start is not None:
            split = {**split, "kind": "official"}
            self.decide("validation", "the data's own part", "it comes with one")
        else:
            share = round(min(0.2, max(0.1, _VALIDATION / card.development_count)), 2)
            split = {**split, "share": share}
            self.decide("validation", f"{share:.0%} of {card.development_count:,}", "enough to choose by")
        near = near_duplicates(card, SplitSpec(**split))
        parts = {"valid": card.development_count * split.get("share", 0.1), "test": card.test_count}
        if not card.groups and any(count > _NEAR * parts[later] for (_, later), count in near.items()):
            split = self._together(data, split, near)
        return split

    def _together(
        self, data: dict[str, Any], split: dict[str, Any], near: Mapping[tuple[str, str], int]
    ) -> dict[str, Any]:
        """The split with near-duplicates in one part; as it is where parts that the data came with divide them."""
        together = {**split, "near_duplicates": "together"}
        try:
            self.card = self._prepared(data, together)
        except DataError:  # the same images are fine without: parts that are not drawn here share near-duplicates
            counts = ", ".join(
                f"{count:,} of {later} in {earlier}" for (earlier, later), count in near.items() if count
            )
            self.decide("near-duplicates", "counted", f"{counts}; no image of parts that the data came with is moved")
            self.warnings.append(
                f"images look nearly like images of another part ({counts}), and the data came with these parts: "
                "scores may be too high"
            )
            return split
        reason = f"{sum(near.values()):,} images of one part look nearly like images of another"
        self.decide("near-duplicates", "kept in one part", reason)
        return together

    def _balance(self) -> None:
        from hpo.data.split import split_card

        card = self.card
        self.tree["search"] = {"objective": "valid_accuracy"}
        if card.several_labels:
            self.tree["task"] = "multilabel"
            self.tree["search"]["objective"] = "valid_macro_auc"
            self.decide("objective", "valid_macro_auc", "an image has any number of labels")
            return
        shares = split_card(card, SplitSpec(**self.tree["split"])).shares["train"]
        ratio = max(shares) / max(min(shares), 1e-9)
        words = f"the largest class has {ratio:.1f} times the images of the smallest"
        if ratio >= _RATIO:
            self.tree["search"]["objective"] = "valid_balanced_accuracy"
            self.decide("objective", "valid_balanced_accuracy", f"{words}: each class counts equally")
        else:
            self.decide("objective", "valid_accuracy", words)

    def _augment(self) -> None:
        """Flips and turns under which nearest neighbours recognise images as well as before, and small shifts."""
        from hpo.data.overview import open_development

        images, labels, parts = open_development(self.card, SplitSpec(**self.tree["split"]))
        self.turns: dict[str, Any] = {}
        if not self.card.several_labels:
            plain, turned = symmetries(images, labels, parts["train"], seed=0)
            chance = 1 / len(self.card.class_names)
            kept = {name: (value - chance) / max(plain - chance, 1e-9) for name, value in turned.items()}
            told = ", ".join(f"{name} {value:.2f}" for name, value in turned.items())
            self.turns = {name: True for name, share in kept.items() if plain > chance and share >= _SYMMETRIC}
            reason = f"nearest neighbours recognise {plain:.2f} (mean over the classes), and changed by {told}"
            self.decide("augmentation", ", ".join(self.turns) or "no flips", reason)

    def fill(self, preset: Preset, minutes: float, *, weights: Sequence[str], device: str, workers: int | None) -> None:
        """Choose the network, and what is trained of it, by measured speed."""
        from hpo.training.device import resolve_devices

        self.device = resolve_devices(device)[0]
        count = len(resolve_devices(device))
        self.workers = workers or (cores() if self.device == "cpu" else count)
        height, width, channels = self.card.image_shape
        fits = min(height, width) >= _FROZEN_SIDE and channels in (1, 3)
        few = self.card.development_count <= _FROZEN_IMAGES or min(height, width) > _SCRATCH_SIDE
        bodies = self._backbones(weights) if fits and few else []
        if bodies:
            self._frozen(preset, minutes, bodies)
        else:
            wanted = "no weights of a pretrained network are at hand" if fits and few else ""
            why = wanted or f"{self.card.development_count:,} images of {height} x {width} pixels are enough for one"
            self._from_scratch(preset, minutes, why)

    def _backbones(self, weights: Sequence[str]) -> list[Any]:
        from hpo.models.at_hand import backbone_from, backbones_at_hand

        if list(weights) == ["none"]:
            return []
        return [backbone_from(text) for text in weights] or backbones_at_hand()

    def _speed(self) -> Any:
        """The measured speed of the study as it is, on one thread, as a worker has it."""
        from hpo.training.preflight import measure_speed

        spec = StudySpec.model_validate({"name": "new", **self.tree})
        return measure_speed(spec.setup, self.card, device_name=self.device, seed=0, threads=1)

    def _from_scratch(self, preset: Preset, minutes: float, why: str) -> None:
        from hpo.jobs.shared.new_parts import scratch_models, scratch_parts

        if min(self.card.image_shape[:2]) > _SCRATCH_SIDE and self.tree["data"]["name"] != "npz" and not self._size:
            self.tree["data"]["size"] = _SCRATCH_SIDE
            self.decisions = [each for each in self.decisions if each.subject != "size"]
            self.decide("size", f"{_SCRATCH_SIDE} x {_SCRATCH_SIDE} pixels", "a network from scratch needs no more")
            self.card = self._prepared(self.tree["data"], self.tree["split"])
        side = min(self.card.image_shape[:2])
        self.tree |= scratch_parts(self.card, self.turns, self.tree["search"]["objective"])

        def seconds(network: dict[str, Any]) -> float:
            self.tree["model"] = network
            return float(self._speed().epoch_seconds)

        networks = scratch_models(side, preset.widths)
        fill = fill_from_scratch(preset, minutes, self.workers, seconds, networks)
        self.tree["model"] = fill.choice
        kind = f"{fill.choice['filters'][0]} filters at first" if "filters" in fill.choice else "fully connected"
        self.decide("network", f"{fill.choice['kind']}, {kind}", f"from scratch: {why}")
        self._finish(fill)

    def _frozen(self, preset: Preset, minutes: float, bodies: list[Any]) -> None:
        from hpo.jobs.shared.new_parts import frozen_model, frozen_parts, in_folds, sized_bodies

        self.tree |= frozen_parts(self.card, self.tree["search"]["objective"], _HEAD_EPOCHS)
        features = []
        for body in bodies[: preset.backbones]:
            self.tree["model"] = frozen_model([body])
            speed = self._speed()
            features.append((body, speed.features_seconds))
        features, note = sized_bodies(features, minutes, self.workers)
        augmented = bool(self.turns)
        fill = fill_frozen(
            preset, minutes, self.workers, features, speed.epoch_seconds, epochs=_HEAD_EPOCHS, augmented=augmented
        )
        self.tree["model"] = frozen_model(fill.choice) | ({"views": fill.views} if fill.views else {})
        if fill.views:
            self.tree["training"]["augment"] = self.turns
        names = " and ".join(body.name for body in fill.choice)
        took = ", ".join(f"{body.name} {duration(seconds)}" for body, seconds in features)
        self.decide(
            "network", f"frozen {names}, a new head", f"its weights are at hand; the features take {took}{note}"
        )
        few = self.card.development_count < _SMALL and self.card.valid_start is None
        if few and (split := in_folds(self.card, self.tree["split"])):
            self.tree["split"] = split
            self.decisions = [each for each in self.decisions if each.subject != "validation"]
            self.decide(
                "validation", f"{split['folds']} folds", f"{self.card.development_count:,} images are few to choose by"
            )
            fill = replace(fill, trials=max(preset.trials, fill.trials // split["folds"]))
        self._finish(fill)

    def _finish(self, fill: Fill) -> None:
        self.fitted = fill
        self.tree["training"]["epochs"] = fill.epochs
        prunes = fill.trials > 2 and fill.epochs > 3
        pruner = {"name": "successive_halving", "min_epochs": max(1, fill.epochs // 4), "reduction_factor": 2}
        self.tree["search"] |= {"trials": fill.trials, "sampler": {"name": "tpe", "startup_trials": 6}}
        self.tree["search"] |= {"pruner": pruner} if prunes else {}
        self.tree["final"] = {"on": "all", **({"set": {"training.epochs": fill.last}} if fill.last else {})}
        views = f", {counted(fill.views, 'augmented view')} of each image" if fill.views else ""
        words = f"{counted(fill.trials, 'trial')} of {fill.epochs} epochs{views}"
        reason = f"measured speed: about {duration(fill.seconds)} on {counted(self.workers, 'worker')}"
        self.decide("search", words, reason)
        longer = f"for {fill.last} epochs, " if fill.last else ""
        choice = f"the best again, {longer}on train and validation together"
        self.decide("final", choice, "more images, no choice left to make")

    def write(self, title: str) -> None:
        """Write the file, and read it again as every command does."""
        folder = self.file.absolute().parent
        relative = {**self.tree, "data": {**self.tree["data"], "path": _short(self.path, folder)}}
        text = study_text(relative, self.decisions, title)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with self.file.open("x", encoding="utf-8") as stream:  # whoever else writes it meanwhile keeps theirs
                stream.write(text)
        except OSError as error:
            raise HpoError(f"{self.file}: cannot be written: {error.strerror}.", "Choose another: --out FILE") from None
        try:
            load_study(self.file)
        except HpoError:
            self.file.unlink()
            raise

    def study(self, minutes: float) -> NewStudy:
        """What was written."""
        fill = self.fitted or Fill(None, 0, 0, 0.0, 0.0)
        told = (*self.card.warnings, *self.warnings)
        return NewStudy(
            self.file.stem,
            self.file,
            self.card,
            tuple(self.decisions),
            told,
            fill.trials,
            fill.seconds,
            fill.closing,
            minutes,
        )


def _short(path: Path, folder: Path) -> str:
    """A path relative to a folder where that does not go far up, else absolute."""
    relative = os.path.relpath(path, folder)
    return relative if relative.count("..") <= 2 else str(path)


def same_source(file: Path, source: Path) -> bool:
    """Whether a study file is about these images."""
    path = load_study(file).data.path
    return path is not None and Path(path).resolve() == source.resolve()
