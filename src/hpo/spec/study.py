"""The study file: data, split, model, training, search, final training, references."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpo.errors import SpecError
from hpo.spec.models import ModelSpec, fixed_size_reason
from hpo.spec.outcome import EnsembleSpec, KeepSpec, PredictSpec, PromoteSpec, Reference
from hpo.spec.search import UNPRUNED, SearchSpec
from hpo.spec.space import Choice, Float, Int, Part, Positive, Seed, Share
from hpo.spec.training import TrainingSpec

STUDY_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Task = Literal["multiclass", "binary", "multilabel"]

# Places that are younger than some studies, whose record lacks them: what they meant before there were any.
_YOUNGER: Mapping[str, Any] = {
    **dict.fromkeys(("data.range", "data.image", "data.label", "data.group", "data.part", "split.group")),
    "split.near_duplicates": "count",
    "training.data_growth": 1.0,
    "training.first_size": 1.0,
    "training.loss": "cross_entropy",
    "training.focal_gamma": 2.0,
    "training.sampling": "shuffled",
    "training.optimizer.options": {},
    "training.schedule.restarts": 0,
    "training.schedule.period_growth": 1.0,
    "training.augment.alternate_flips": False,
    "training.teacher": None,
    "training.teacher_weight": 0.9,
    "training.teacher_temperature": 2.0,
    "model.whiten": 0,
}


class DataSpec(Part):
    """Which images."""

    name: str
    """A data set of `hpo data`, or npz (medmnist keys), folder (one folder a class) or table (a CSV or Parquet file of
    images and their classes) with a path."""
    size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Side of the images in pixels: one of 28, 64, 128, 224 for MedMNIST; what folder images are resized to."""
    path: str | None = None
    """A local file or folder to read in place of a download. Its checksum need not be the official one; its digest is
    logged. Relative to the study file, or in --set to the working directory."""
    groups: dict[str, list[str]] = Field(default_factory=dict)
    """New classes made of old ones: {Clothing: [Shirt, Coat], Footwear: [Sneaker]}. Each old class goes into one group;
    images of classes in no group are left out."""
    range: tuple[float, float] | None = None
    """The pixel values that are black and white, such as [0, 4095] or [-1024, 3071]. null: measured over the whole data
    set, for each kind of pixel; 8 bits keep 0 to 255. It is stored with each model, which scales its images by it."""
    image: str | None = None
    """table: the column with the names of the image files. null: file_name, image, file, filename or path."""
    label: str | None = None
    """table: the column with the classes; null: label or class. folder: a regular expression on the path of each image
    below the folder, whose first group is its class; null: the name of its folder."""
    group: str | None = None
    """table: the column that says which images must not be divided, as `split.group` does."""
    part: str | None = None
    """table: the column that says train, valid or test. null: the folders train, valid and test, if there."""

    @model_validator(mode="after")
    def _fits(self) -> DataSpec:
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range: {list(self.range)} does not rise. Write [LOW, HIGH]")
        if self.range is not None and not all(map(math.isfinite, self.range)):
            raise ValueError(f"range: {list(self.range)} is not finite. Write [LOW, HIGH]")
        for place in ("image", "label", "group", "part"):
            if getattr(self, place) is not None and self.name not in ("table", "folder"):
                raise ValueError(f"{place}: is for data sets of kind table or folder, not {self.name}. Leave it out")
        return self


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
    group: str | None = None
    """Images that must not be divided, such as those of one patient, slide, plant or video: no two parts share a group,
    the test part included. npz: the key, groups for train_groups and so on; folder: a regular expression on the path
    of each image below the folder, whose first group names it; table: a column."""
    near_duplicates: Literal["count", "together"] = "count"
    """together: images that look nearly alike stay in one part, as a group does. count: they are only counted."""


class FinalSpec(Part):
    """After the search: the winner is trained again, and that model is the one that is registered."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Places that differ from the search, such as {training.epochs: 200, training.patience: 20}."""
    teacher: str | None = None
    """A logged model to learn from: training.teacher of the final trainings."""
    split: SplitSpec | None = None
    """null: the search's; after kfold the official validation part, or a stratified holdout where there is none."""
    on: Literal["train", "all"] = "train"
    """all: train on train and validation together, for as many epochs as were best in the search, or `set` says."""
    seeds: Positive = 1
    """Trainings of each finalist, each with a fresh seed."""
    finalists: Positive = 1
    """How many of the best race each other. Means over seeds decide, by a paired bootstrap over the same images."""

    @property
    def trainings(self) -> int:
        """How many there are, at most."""
        return self.finalists * self.seeds

    @property
    def settings(self) -> dict[str, Any]:
        """What decides how a candidate is trained, as JSON types without defaults; model_validate takes it back."""
        unused = {"seeds", "finalists", *(["split"] if self.on == "all" else [])}
        return self.model_dump(mode="json", exclude_defaults=True, exclude=unused)


class StudySpec(Part):
    """One study: everything that decides its trials."""

    name: Annotated[str, Field(pattern=STUDY_NAME)]
    """The file's name without its ending."""
    question: str = ""
    """What the study is to answer, in a sentence."""
    data: DataSpec
    split: SplitSpec = SplitSpec()
    model: ModelSpec
    training: TrainingSpec = TrainingSpec()
    task: Task = "multiclass"
    """binary: two classes and one sigmoid output. multilabel: each image has any number of labels, and each label a
    sigmoid output (chestmnist)."""
    search: SearchSpec
    final: FinalSpec | None = None
    keep: KeepSpec = KeepSpec()
    ensemble: EnsembleSpec | None = None
    predict: PredictSpec = PredictSpec()
    promote: PromoteSpec = PromoteSpec()
    references: list[Reference] = Field(default_factory=list)
    seed: Seed = 0
    """The sampler's, and what every trial's own seed is derived from."""

    @model_validator(mode="after")
    def _monitor_follows(self) -> StudySpec:
        if "monitor" not in self.training.model_fields_set:
            object.__setattr__(self, "training", self.training.watching(self.search.judged_by))
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> StudySpec:
        _check_sizes(self.model, self.training)
        return self

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
        plain, faults = self.model_dump(), []
        for path, parameter in self.search.whole_space.items():
            if path.split(".")[0] not in ("data", "split", "model", "training"):
                faults.append(f"search.space.{path}: only model and training can be searched")
                continue
            try:
                _place(plain, path, f"search.space.{path}")
                for asked in parameter.when:
                    _place(plain, asked, f"search.space.{path}.when.{asked}")
                for values in self._extremes(path, parameter):
                    _validated(self, values, f"search.space.{path}")
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError("\n".join(faults))
        for index, values in enumerate(self.search.start):
            # Whether they fit the space is seen when the study is opened; these could not even be written down.
            for path, value in values.items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"search.start[{index}].{path}: {value} is not finite. Correct the value")
        if "training.data_growth" in self.search.whole_space and self.search.pruner.name not in UNPRUNED:
            raise ValueError(
                "search.space.training.data_growth: a pruner compares trials at one epoch, and theirs would cost "
                "different amounts. Fix it, or write pruner: none"
            )
        return self

    def fixed(self) -> dict[str, Any]:
        """Values of the paths that conditions of the space name and that are not searched themselves."""
        plain = self.model_dump()
        space = self.search.whole_space
        asked = {path for _, parameter in space.items() for path in parameter.when}
        return {path: _place(plain, path, path) for path in asked if path not in space}

    def _extremes(self, path: str, parameter: Float | Int | Choice) -> Iterator[dict[str, Any]]:
        """Values of a searched place, as they are used, between which all lie; ValueError where `per` is wrong."""
        if not isinstance(parameter, Float) or parameter.per is None:
            yield from ({path: value} for value in parameter.ends())
            return
        place, where, space = parameter.per, f"search.space.{path}.per", self.search.whole_space
        ends = space[place].ends() if place in space else [_place(self.model_dump(), place, where)]
        relative = isinstance(other := space.root.get(place), Float) and other.per is not None
        if relative or not all(isinstance(end, int | float) and not isinstance(end, bool) and end > 0 for end in ends):
            raise ValueError(f"{where}: {place} is not a positive number of its own. Name one that is")
        for value in parameter.ends():
            yield from (self.resolved({path: value, place: end}) for end in ends)

    def resolved(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a candidate as they are used: those that are drawn `per` another place, times its share."""
        found, space = dict(values), self.search.whole_space
        for path, value in values.items():
            parameter = space.root.get(path)
            if isinstance(parameter, Float) and parameter.per is not None and parameter.reference is not None:
                other = (
                    values[parameter.per] if parameter.per in values else _place(self.model_dump(), parameter.per, path)
                )
                found[path] = value * (other / parameter.reference)
        return found

    def with_values(self, values: Mapping[str, Any], *, fixed: Mapping[str, Any] | None = None) -> Setup:
        """The setup of one candidate: this spec's, with the places of the space filled in and validated again.

        hpo.spec.search says which places those can be. fixed are further values, which are used as they are. Raises
        SpecError for values that do not fit together, though each of them fits the spec.
        """
        fixed = fixed or {}
        try:
            return _validated(self, {**self.resolved({**values, **fixed}), **fixed}, "candidate")
        except ValueError as error:
            raise SpecError(f"{error}, or give one of them a `when`.") from None

    def resumed_as(self, record: Mapping[str, Any]) -> StudySpec:
        """This spec for a study that began with that of record: monitor, sampler and pruner stay if none is given."""
        monitor = record.get("training", {}).get("monitor", self.training.monitor)
        changed: dict[str, Any] = {"search": self.search.resumed_as(record.get("search", {}))}
        if "monitor" not in self.training.model_fields_set and monitor != self.training.monitor:
            changed["training"] = self.training.watching(monitor)
        return self.model_copy(update=changed)

    @property
    def setup(self) -> Setup:
        """The part of the spec that one training needs, as written."""
        scores = list(dict.fromkeys([*self.training.scores, *self.search.requested_scores]))
        training = self.training.model_copy(update={"scores": scores}) if scores else self.training
        return Setup(data=self.data, split=self.split, model=self.model, training=training, task=self.task)

    def identity(self) -> dict[str, Any]:
        """The settings that must not change when a study is resumed, so that its trials can be compared."""
        plain = self.model_dump(mode="json")
        # A file may move: the data's digest is compared instead of its path.
        plain["data"].pop("path")
        # How often a training is saved makes no difference to what comes out of it.
        plain["training"].pop("checkpoint")
        # What else is measured of a training does not change it.
        plain["training"].pop("scores")
        for path, value in _YOUNGER.items():
            *stems, last = path.split(".")
            part = functools.reduce(lambda node, key: node.get(key, {}), stems, plain)
            if last in part and part[last] == value:
                part.pop(last)
        kept = {part: plain[part] for part in ("data", "split", "model", "training", "task", "seed")}
        aims = [f"{aim.better} {aim.score}" for aim in self.search.objectives]
        relative = {
            path: [parameter.per, parameter.reference]
            for path, parameter in self.search.whole_space.items()
            if isinstance(parameter, Float) and parameter.per is not None
        }
        # What a candidate's values mean.
        kept |= {"per": relative} if relative else {}
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

    @model_validator(mode="after")
    def _sizes_fit(self) -> Setup:
        _check_sizes(self.model, self.training)
        return self

    def flat(self) -> dict[str, Any]:
        """Dotted path -> value, for every place; lists as JSON."""
        return dict(_flatten(self.model_dump(mode="json")))


def _check_sizes(model: Any, training: TrainingSpec) -> None:
    if training.first_size < 1 and (reason := fixed_size_reason(model)):
        raise ValueError(
            f"training.first_size {training.first_size:g}: a {model.kind} takes images of one size: {reason}. Write 1"
        )


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
    """Put value at a dotted path of nested dicts, making dicts on the way. A number names a place of a list, from 0."""
    place: Any = tree
    *stems, last = path.split(".")
    for key in stems:
        if isinstance(place, list):
            place = place[_index(place, key, path)]
            continue
        if not isinstance(place.get(key), dict | list):
            place[key] = {}
        place = place[key]
    place[_index(place, last, path) if isinstance(place, list) else last] = value


def _index(place: list[Any], key: str, path: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise SpecError(f"{path}: there are {len(place)} in the list, not one named {key}.", "Count from 0.")
    return int(key)


def _filled(spec: StudySpec, values: Mapping[str, Any]) -> Setup:
    plain = spec.setup.model_dump()
    for path, value in values.items():
        set_place(plain, path, value)
    return Setup.model_validate(plain)


def _validated(spec: StudySpec, values: Mapping[str, Any], where: str) -> Setup:
    try:
        return _filled(spec, values)
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"msg": str(error)}
        shown = ", ".join(f"{path}={value!r}" for path, value in values.items())
        advice = "Correct the range or the options"
        if any(map(means_null, values.values())) and _fits(spec, dict.fromkeys(values)):
            advice = "For no value write null"
        said = " ".join(str(first["msg"]).split())
        raise ValueError(f"{where}: {shown} does not fit: {said.removeprefix('Value error, ')}. {advice}") from None


def _fits(spec: StudySpec, values: Mapping[str, Any]) -> bool:
    try:
        return _filled(spec, values) is not None
    except ValueError:
        return False


def means_null(value: Any) -> bool:
    """True for a word that YAML reads as text and that people write for no value."""
    return isinstance(value, str) and value.strip().lower() in ("none", "null", "nil", "never", "off", "no", "~", "")
