"""The study file: data, split, model, training, search, references."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hpo.spec.models import ModelSpec, Rate
from hpo.spec.space import Part, Space, holds

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]

# Validation scores that a study may aim at, with the direction that is better. Losses are in nats per image.
SCORES: Mapping[str, Literal["maximize", "minimize"]] = {
    "valid_loss": "minimize",
    "valid_accuracy": "maximize",
    "valid_balanced_accuracy": "maximize",
    "valid_macro_f1": "maximize",
    "valid_macro_auc": "maximize",
}
# What a network costs: trainable and frozen weights; milliseconds an image takes, one at a time, on the trial's device.
Cost = Literal["parameters", "latency_ms"]
Task = Literal["multiclass", "binary"]
_CONSTRAINT = r"^ *(parameters|latency_ms|valid_[a-z0-9_]+) *(<=|>=) *[0-9.eE+-]+ *$"
Score = Literal["valid_loss", "valid_accuracy", "valid_balanced_accuracy", "valid_macro_f1", "valid_macro_auc"]


class DataSpec(Part):
    """Which images."""

    name: str
    """A data set of `hpo data`, or npz (medmnist keys) or folder (one folder a class) with a path."""
    size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Side of the images in pixels: one of 28, 64, 128, 224 for MedMNIST; what folder images are resized to."""
    path: str | None = None
    """A local file or folder to read in place of a download. Its checksum need not be the official one; its digest is
    logged. Relative to the study file, or in --set to the working directory."""
    groups: dict[str, list[str]] = Field(default_factory=dict)
    """New classes made of old ones: {Clothing: [Shirt, Coat], Footwear: [Sneaker]}. Each old class goes into one group;
    images of classes in no group are left out."""


class SplitSpec(Part):
    """Which images train, which validate. The test part is never seen by a trial."""

    kind: Literal["official", "holdout", "kfold", "none"] = "official"
    """official: the validation part that the data set comes with. holdout: a share of the development images.
    kfold: each of `folds` parts validates once, and a trial's value is the mean over them.
    none: every development image trains; for final trainings only."""
    share: Share = 0.2
    """holdout: how much of the development images (train and, if there is one, official validation) validates."""
    by: Literal["stratified", "random", "order"] = "stratified"
    """holdout: equal class shares at random, plain random, or the last rows of the file."""
    folds: Annotated[int, Field(ge=2, le=100)] = 3
    """kfold: how many parts, with equal class shares unless `by` is random or order."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """kfold: how much of the development images takes part, stratified."""
    test_share: Share = 0.2
    """For data sets without a test part: how much is sealed away as one, stratified, before anything else."""
    seed: Seed = 0
    """Which random split."""


class OptimizerSpec(Part):
    """How weights follow gradients. Fields that an optimizer has not are ignored by it."""

    name: Literal["sgd", "rmsprop", "adam", "adamw"] = "adam"
    lr: Annotated[float, Field(gt=0.0, le=100.0)] = 1e-3
    """Learning rate; with a schedule, its highest."""
    momentum: Rate = 0.0
    """sgd and rmsprop."""
    nesterov: bool = False
    """sgd with a momentum above 0."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """L2 penalty; decoupled from the gradient in adamw."""
    beta1: Rate = 0.9
    """adam and adamw: decay of the first moment."""
    beta2: Rate = 0.999
    """adam and adamw: decay of the second moment."""


class ScheduleSpec(Part):
    """How the learning rate moves, batch by batch."""

    name: Literal["constant", "cosine", "one_cycle", "step", "exponential"] = "constant"
    """cosine: to 0 along half a cosine. one_cycle: up over `warmup`, then down along a cosine (Smith 2018).
    step: times gamma every step_epochs. exponential: times gamma every epoch."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of all batches in which the rate climbs linearly to its highest; one_cycle takes 0.3 where this is 0."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    step_epochs: Positive = 10


class AugmentSpec(Part):
    """Random changes of the training images, batch by batch, on the device; 0 and false are off.

    Each image draws amounts of its own. All that moves pixels is one resampling, all that changes colours is another.
    """

    flip_horizontal: bool = False
    """Half of the images, left to right."""
    flip_vertical: bool = False
    """Half of the images, upside down."""
    rotate90: bool = False
    """By a random multiple of 90 degrees; square images only."""
    rotate: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """By an angle within this many degrees, either way."""
    shift: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Across and down, each by up to this share of the side, either way."""
    crop: Annotated[int, Field(ge=0, le=64)] = 0
    """Random crop after padding by so many pixels: a shift by whole pixels, which does not blur."""
    zoom: Annotated[float, Field(ge=0.0, le=3.0)] = 0.0
    """By a factor between 1 / (1 + zoom) and 1 + zoom."""
    fill: Literal["reflect", "edge", "black"] = "reflect"
    """What comes in from beyond the edges."""
    brightness: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """By a factor within 1 +- this."""
    contrast: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Distance from the mean grey of the image, by a factor within 1 +- this."""
    saturation: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Distance from each pixel's grey, by a factor within 1 +- this; RGB only."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """By up to this share of the colour circle, either way; RGB only."""
    randaugment: Annotated[int, Field(ge=0, le=10)] = 0
    """So many different changes of each image, drawn from rotation, shifts, shears, zoom, brightness, contrast and
    saturation, all of one strength and random sign (after Cubuk et al. 2020)."""
    magnitude: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    """randaugment: the strength. 1 is 45 degrees, 0.4 of the side, a shear or zoom by 0.5, a factor 1 +- 0.9."""
    erase: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the images in which a random rectangle is painted with the mean colour (after Zhong et al. 2020)."""
    erase_area: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """erase: the largest rectangle, as a share of the image."""
    mixup: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Blend the images and labels of each batch with those of another order of it, share ~ Beta(mixup, mixup)
    (Zhang et al. 2018)."""
    cutmix: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Paste a rectangle of other images instead, area ~ Beta(cutmix, cutmix) (Yun et al. 2019). With both, a coin
    decides for each batch."""


class TrainingSpec(Part):
    """One training."""

    epochs: Positive = 20
    """The most; early stopping may end it sooner."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    augment: AugmentSpec = AugmentSpec()
    label_smoothing: Rate = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class weighs n / (classes * images of the class) in the loss."""
    monitor: Score = "valid_accuracy"
    """The score whose best epoch's weights are kept, and that early stopping watches."""
    patience: Positive | None = None
    """Stop after so many epochs without a better monitor; null: never."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the faster of the two for this network, batch and device, by a short measurement."""
    seed: Seed | None = None
    """Initialisation, data order and dropout; null: a seed of its own for each trial, from the study's seed."""


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _by_score(value: Any) -> Any:
    return {"score": value} if isinstance(value, str) else value


SamplerName = Literal["random", "grid", "tpe", "cmaes", "gp", "qmc"]
PrunerName = Literal["none", "median", "successive_halving", "hyperband", "patient", "wilcoxon"]


class SamplerSpec(Part):
    """Who proposes candidates. `sampler: tpe` is short for `sampler: {name: tpe}`."""

    name: SamplerName = "tpe"
    startup_trials: Annotated[int, Field(ge=0)] = 10
    """tpe, cmaes, gp: random trials before the model of the results is used."""


class PrunerSpec(Part):
    """Who ends poor trials early. `pruner: median` is short for `pruner: {name: median}`."""

    name: PrunerName = "none"
    startup_trials: Annotated[int, Field(ge=0)] = 5
    """median: finished trials before any is pruned; wilcoxon: epochs before one is."""
    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """median: no pruning in these first epochs."""
    min_epochs: Positive = 1
    """successive_halving, hyperband: epochs of the first rung."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """successive_halving, hyperband: one in so many goes on to the next rung."""
    patience: Positive = 5
    """patient: epochs without a better value before a trial is pruned."""
    p_threshold: Share = 0.1
    """wilcoxon: prune when the trial is worse than the best one at this level."""


class StageSpec(Part):
    """One step of a staged search: it varies some places and leaves the rest as earlier stages found best."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,49}$")]
    space: Space = Space()
    """What this stage varies; empty only with refine."""
    sampler: Annotated[
        SamplerSpec | None, BeforeValidator(_by_name, json_schema_input_type=SamplerName | SamplerSpec)
    ] = None
    """null: the full grid where the space is finite, else the search's sampler."""
    trials: Positive | None = None
    """null: every cell of the grid; needed for any other sampler."""
    carry: Positive = 1
    """How many of its best the next stage starts from, each with the whole of its space."""
    refine: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """In place of a space: all that earlier stages varied, together, around the best trial so far. Ranges shrink to
    this share of their width, options stay open."""


class Objective(Part):
    """One of several aims: a validation score, or what a network costs."""

    score: Score | Cost
    direction: Literal["maximize", "minimize"] | None = None
    """null: what the score calls for."""

    @property
    def better(self) -> Literal["maximize", "minimize"]:
        """The direction in which this objective improves."""
        return self.direction or SCORES.get(self.score, "minimize")


class WarmStart(Part):
    """Candidates that another study found best."""

    study: str
    """A study of the same storage; only the paths that this search varies are taken over."""
    best: Positive = 1


class SearchSpec(Part):
    """What is tried, by whom, and towards what."""

    objective: Score = "valid_accuracy"
    """The score of a trial, at its best epoch."""
    direction: Literal["maximize", "minimize"] | None = None
    """null: what the objective calls for."""
    objectives: list[
        Annotated[Objective, BeforeValidator(_by_score, json_schema_input_type=Score | Cost | Objective)]
    ] = Field(default_factory=list)
    """Several aims in place of one, such as [valid_accuracy, parameters]: trials that none beats in all are kept."""
    constraints: list[Annotated[str, Field(pattern=_CONSTRAINT)]] = Field(default_factory=list)
    """Such as `parameters <= 200000`: trials that break one are never best. Limits on parameters are checked before
    training."""
    trials: Positive = 20
    """The study's total, unless --trials says otherwise. Staged searches have the total of their stages."""
    duplicates: Literal["reseed", "reuse", "reject"] = "reseed"
    """A candidate that was evaluated before: trained again with a seed of its own, given the earlier result, or
    replaced by another one."""
    start: list[dict[str, Any]] = Field(default_factory=list)
    """Candidates to try first, each a mapping of paths to values; paths left out are drawn by the sampler."""
    start_from: WarmStart | None = None
    """Try the best of another study first."""
    sampler: Annotated[SamplerSpec, BeforeValidator(_by_name, json_schema_input_type=SamplerName | SamplerSpec)] = (
        SamplerSpec()
    )
    pruner: Annotated[PrunerSpec, BeforeValidator(_by_name, json_schema_input_type=PrunerName | PrunerSpec)] = (
        PrunerSpec()
    )
    space: Space = Space()
    """Dotted paths into this file, and how each may vary."""
    stages: list[StageSpec] = Field(default_factory=list)
    """In place of a space: steps that each vary some places and carry their best on."""

    @model_validator(mode="after")
    def _right_way(self) -> SearchSpec:
        if not len(self.space) and not self.stages:
            raise ValueError("the search space is empty. Name at least one path, such as training.optimizer.lr")
        if len(self.space) and self.stages:
            raise ValueError("space and stages exclude each other. Move the space into a stage")
        if len({stage.name for stage in self.stages} | {"final"}) != len(self.stages) + 1:
            raise ValueError("two stages have one name, or one is called final. Rename one")
        for index, stage in enumerate(self.stages):
            self._check_stage(stage, first=index == 0)
        if len(self.objectives) == 1:
            raise ValueError("objectives lists one aim. Write it as objective, or add another")
        if self.objectives and self.pruner.name != "none":
            raise ValueError(
                "Optuna prunes searches with one objective only. Write pruner: none, or leave objectives out"
            )
        if self.objectives and self.stages:
            raise ValueError("a stage carries its best on, and several objectives have no best. Leave one of them out")
        unknown = [path for values in self.start for path in values if path not in self.whole_space]
        if unknown:
            raise ValueError(f"start names {unknown[0]}, which the space does not vary. Correct the path")
        right = SCORES[self.objective]
        if self.direction not in (None, right):
            raise ValueError(f"direction {self.direction} would look for the worst {self.objective}. Write {right}")
        if self.sampler.name == "grid" and not self.stages:
            for path, parameter in self.space.items():
                try:
                    parameter.grid()
                except ValueError as error:
                    raise ValueError(f"sampler grid, {path}: {error}") from None
        return self

    def _check_stage(self, stage: StageSpec, *, first: bool) -> None:
        if bool(len(stage.space)) == bool(stage.refine):
            raise ValueError(f"stage {stage.name}: give either a space or refine")
        if stage.refine and first:
            raise ValueError(f"stage {stage.name}: there is nothing to refine before the first stage. Move it down")
        if stage.trials is None and (stage.refine or stage.space.size({}) is None):
            raise ValueError(f"stage {stage.name}: its space has no finite grid. Give trials")
        if stage.trials is None and stage.sampler is not None and stage.sampler.name != "grid":
            raise ValueError(f"stage {stage.name}: sampler {stage.sampler.name} needs a number of trials. Give trials")

    @property
    def better(self) -> Literal["maximize", "minimize"]:
        """The direction in which the objective improves."""
        return self.direction or SCORES[self.objective]

    @property
    def whole_space(self) -> Space:
        """All that any stage varies; the later stage's range where two vary one place."""
        if not self.stages:
            return self.space
        return Space({path: parameter for stage in self.stages for path, parameter in stage.space.items()})


class FinalSpec(Part):
    """After the search: the winner is trained again, and that model is the one that is registered."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Places that differ from the search, such as {training.epochs: 200, training.patience: 20}."""
    split: SplitSpec | None = None
    """null: the search's; after kfold the official validation part, or a stratified holdout where there is none."""
    on: Literal["train", "all"] = "train"
    """all: train on train and validation together, for as many epochs as were best in the search."""
    seeds: Positive = 1
    """Trainings of each finalist, each with a fresh seed."""
    finalists: Positive = 1
    """How many of the best race each other. Means over seeds decide, by a paired bootstrap over the same images."""


class Reference(Part):
    """A published number to stand beside the study's own."""

    label: str
    score: Literal["test_accuracy", "test_balanced_accuracy", "test_macro_f1", "test_macro_auc", "valid_accuracy"]
    value: float
    source: str
    note: str = ""
    """What differs from this study's protocol."""


class KeepSpec(Part):
    """What stays on disk."""

    models: Annotated[str, Field(pattern=r"^(all|none|best:[1-9][0-9]*)$")] = "best:10"
    """all, none, or best:K: a trial's model and pictures are kept while it is among the K best."""

    @property
    def count(self) -> float:
        """How many trials keep their model; inf for all."""
        return {"all": float("inf"), "none": 0}.get(self.models) or float(self.models.partition(":")[2] or 0)


class StudySpec(Part):
    """One study: everything that decides its trials."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    """The file's name without its ending."""
    question: str = ""
    """What the study is to answer, in a sentence."""
    data: DataSpec
    split: SplitSpec = SplitSpec()
    model: ModelSpec
    training: TrainingSpec = TrainingSpec()
    task: Task = "multiclass"
    """binary: two classes and one sigmoid output."""
    search: SearchSpec
    final: FinalSpec | None = None
    keep: KeepSpec = KeepSpec()
    references: list[Reference] = Field(default_factory=list)
    seed: Seed = 0
    """The sampler's, and what every trial's own seed is derived from."""

    @model_validator(mode="after")
    def _final_fits(self) -> StudySpec:
        if self.split.kind == "none":
            raise ValueError(
                "split.kind none leaves a search without validation images. Write official, holdout or kfold"
            )
        if self.final is not None:
            for path in self.final.set:
                _place(self.setup.model_dump(), path, f"final.set.{path}")
            _validated(self, self.final.set, "final.set")
            if self.final.on == "all" and self.final.finalists > 1:
                raise ValueError("final: a race needs validation images. Write on: train, or finalists: 1")
        return self

    @model_validator(mode="after")
    def _space_fits(self) -> StudySpec:
        # Candidates are validated without their search, so this does not recurse.
        plain = self.model_dump()
        for path, parameter in self.search.whole_space.items():
            if path.split(".")[0] not in ("data", "split", "model", "training"):
                raise ValueError(f"search.space.{path}: only data, split, model and training can be searched")
            _place(plain, path, f"search.space.{path}")
            for asked in parameter.when:
                _place(plain, asked, f"search.space.{path}.when.{asked}")
            for value in parameter.ends():
                _validated(self, {path: value}, f"search.space.{path}")
        return self

    def fixed(self) -> dict[str, Any]:
        """Values of the paths that conditions of the space name and that are not searched themselves."""
        plain = self.model_dump()
        space = self.search.whole_space
        asked = {path for _, parameter in space.items() for path in parameter.when}
        return {path: _place(plain, path, path) for path in asked if path not in space}

    def with_values(self, values: Mapping[str, Any]) -> Setup:
        """The setup of one candidate: this spec's, with the places of the space filled in and validated again."""
        return _validated(self, values, "candidate")

    @property
    def setup(self) -> Setup:
        """The part of the spec that one training needs, as written."""
        return Setup(data=self.data, split=self.split, model=self.model, training=self.training, task=self.task)

    def identity(self) -> dict[str, Any]:
        """What must not change while a study goes on, or its trials could not be compared."""
        plain = self.model_dump(mode="json")
        # A file may move: the data's digest is compared instead of its path.
        plain["data"].pop("path")
        kept = {part: plain[part] for part in ("data", "split", "model", "training", "task", "seed")}
        aims = [f"{aim.better} {aim.score}" for aim in self.search.objectives]
        return {**kept, "objective": aims or [f"{self.search.better} {self.search.objective}"]}

    def seed_of(self, ordinal: int) -> int:
        """The seed in [0, 2**31) of the candidate at this place of the study's sequence."""
        digest = hashlib.sha256(f"{self.seed}/{ordinal}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


class Setup(Part):
    """Everything that decides one training: a study without its search."""

    data: DataSpec
    split: SplitSpec
    model: ModelSpec
    training: TrainingSpec
    task: Task = "multiclass"

    def flat(self) -> dict[str, Any]:
        """Dotted path -> value, for every place; lists as JSON."""
        return dict(_flatten(self.model_dump(mode="json")))


def _flatten(tree: Mapping[str, Any], stem: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{stem}{key}.")
        else:
            yield f"{stem}{key}", json.dumps(value) if isinstance(value, list) else value


def _place(tree: Mapping[str, Any], path: str, where: str) -> Any:
    node: Any = tree
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            known = ", ".join(node) if isinstance(node, Mapping) else "nothing"
            raise ValueError(f"{where}: there is no {key!r} there (known: {known}). Correct the path")
        node = node[key]
    return node


def set_place(tree: dict[str, Any], path: str, value: Any) -> None:
    """Put value at a dotted path of nested dicts, making dicts on the way."""
    *stems, last = path.split(".")
    for key in stems:
        if not isinstance(tree.get(key), dict):
            tree[key] = {}
        tree = tree[key]
    tree[last] = value


def _validated(spec: StudySpec, values: Mapping[str, Any], where: str) -> Setup:
    plain = spec.setup.model_dump()
    for path, value in values.items():
        set_place(plain, path, value)
    try:
        return Setup.model_validate(plain)
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"msg": str(error)}
        shown = ", ".join(f"{path}={value!r}" for path, value in values.items())
        raise ValueError(f"{where}: {shown} does not fit: {first['msg']}. Correct the range or the options") from None


__all__ = ["SCORES", "Setup", "Space", "StudySpec", "holds", "set_place"]
