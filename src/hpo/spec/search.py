"""What is tried, by whom, towards what, and which places of a study a candidate can change."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import BeforeValidator, Field, model_validator

from hpo.metrics import direction_of, metric_of
from hpo.spec.space import MOST, Cost, Count, Part, Positive, PrunerName, SamplerName, Score, Share, Space

_CONSTRAINT = r"^ *(parameters|latency_ms|valid_[^<>]*[^<> ]) *(<=|>=) *[0-9.eE+-]+ *$"


UNPRUNED = ("auto", "none")  # pruners that a study may name where trials must not be pruned


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _by_score(value: Any) -> Any:
    return {"score": value} if isinstance(value, str) else value


def _thawed(value: Any) -> Any:
    return ({} if value else None) if isinstance(value, bool) else value


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    if options and ":" not in name:
        raise ValueError(f"options are for package.module:function, and {name} is none. Leave them out")


class SamplerSpec(Part):
    """Who proposes candidates. `sampler: tpe` is short for `sampler: {name: tpe}`."""

    name: SamplerName = "auto"
    """auto: chosen from the space and the objectives. package.module:function: called with `options`, and with `seed`
    if it takes that; it returns a sampler of Optuna."""
    startup_trials: Count = 10
    """tpe, cmaes, gp, mfgp: random trials before the model of the results is used."""
    options: dict[str, Any] = Field(default_factory=dict)
    """package.module:function: its keyword arguments."""

    @model_validator(mode="after")
    def _options_fit(self) -> SamplerSpec:
        _check_options(self.name, self.options)
        return self


class PrunerSpec(Part):
    """Who ends poor trials early. `pruner: median` is short for `pruner: {name: median}`."""

    name: PrunerName = "auto"
    """auto: chosen from the epochs and the objectives. package.module:function: called with `options`; it returns a
    pruner of Optuna."""
    startup_trials: Count | None = None
    """median, curve: finished trials before any is pruned; wilcoxon: epochs, or folds. null: 5, or 2 folds."""
    warmup_epochs: Count = 0
    """median, curve: no pruning in these first epochs."""
    min_epochs: Positive | None = None
    """successive_halving, hyperband: epochs of the first rung; null: 1. auto: the same; null: chosen."""
    reduction_factor: Annotated[int, Field(ge=2, le=MOST)] = 3
    """successive_halving, hyperband: one in this many is promoted to the next rung."""
    patience: Positive = 5
    """patient: epochs without a better value before a trial is pruned."""
    p_threshold: Share = 0.1
    """wilcoxon: prune when the trial is worse than the best one at this level. curve: when its
    probability of beating the best one, forecast from the curves of finished trials, is below this."""
    options: dict[str, Any] = Field(default_factory=dict)
    """package.module:function: its keyword arguments."""

    @model_validator(mode="after")
    def _options_fit(self) -> PrunerSpec:
        _check_options(self.name, self.options)
        return self


class ThawSpec(Part):
    """Trials that successive halving ends keep their state, and may continue. `thaw: true` is short for the defaults.

    As in ASHA (Li et al. 2020), a free worker continues a paused trial that is now in the best 1 / reduction_factor of
    its rung, before it begins a new one.
    """

    disk_gb: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 10.0
    """The checkpoints of all paused trials, in billions of bytes, at most. Beyond that the worst of them stay ended."""


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
        return self.direction or direction_of(self.score)


class WarmStart(Part):
    """Candidates that another study found best."""

    study: str
    """Its name; only the paths that this search varies are taken over."""
    best: Positive = 1
    storage: str | None = None
    """Where Optuna keeps that study, if another program ran it: an SQLite file, an Optuna journal (.log), or an address
    without a password. A file is relative to the study file. null: the storage of this project."""
    names: dict[str, str] = Field(default_factory=dict)
    """storage: what that study calls the places of this one: {lr: training.optimizer.lr}. A parameter that is not
    listed is taken over if its name is a place."""

    @model_validator(mode="after")
    def _fits(self) -> WarmStart:
        if self.names and self.storage is None:
            raise ValueError("names is for a study of another storage. Name it as storage, or leave names out")
        login = self.storage.partition("://")[2].rpartition("@")[0] if self.storage else ""
        if ":" in login:
            raise ValueError("storage: a study is stored, and must not hold a password. Leave it to ~/.pgpass")
        return self


class EnoughSpec(Part):
    """When a search has found enough: what is still to be gained is below this."""

    gain: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    """In units of the objective, such as 0.002 of an accuracy."""


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
    until: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """End the search once a trial's objective is as good as this, such as 0.9. A training ends with the epoch that is
    (not with folds or constraints); trials that still run then are stopped, or, before a final training, finish."""
    enough: Literal["off", "auto"] | EnoughSpec = "off"
    """End the search once no candidate is likely to beat the best trial by more than a gain, such as {gain: 0.002}.
    auto: than the standard error of the best trial's validation score. From 20 trials on; `trials` stays the limit."""
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
    thaw: Annotated[ThawSpec | None, BeforeValidator(_thawed, json_schema_input_type=bool | ThawSpec | None)] = None
    """true: pruned trials are paused, and continue where they stopped if others turn out worse. null or false: a pruned
    trial has ended."""
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
        if self.objectives and self.pruner.name not in (*UNPRUNED, "successive_halving"):
            raise ValueError(
                f"pruner {self.pruner.name} compares one objective only. Write pruner: successive_halving or none"
            )
        if self.thaw and self.pruner.name not in ("auto", "successive_halving"):
            raise ValueError(
                f"thaw continues trials by the rungs of successive halving, and the pruner is {self.pruner.name}. "
                "Write pruner: successive_halving, or leave thaw out"
            )
        if self.objectives and self.stages:
            raise ValueError("a stage carries its best on, and several objectives have no best. Leave one of them out")
        self._check_enough()
        unknown = [path for values in self.start for path in values if path not in self.whole_space]
        if unknown:
            raise ValueError(f"start names {unknown[0]}, which the space does not vary. Correct the path")
        right = direction_of(self.objective)
        if self.direction not in (None, right):
            raise ValueError(f"direction {self.direction} would look for the worst {self.objective}. Write {right}")
        if self.sampler.name == "grid" and not self.stages:
            for path, parameter in self.space.items():
                try:
                    parameter.check_finite()
                except ValueError as error:
                    raise ValueError(f"sampler grid, {path}: {error}") from None
        return self

    def _check_enough(self) -> None:
        if self.enough == "off":
            return
        if self.objectives:
            raise ValueError("enough: several objectives have no best trial to beat. Leave it out")
        if self.stages:
            raise ValueError("enough: a stage has its own number of trials. Give that, or leave enough out")

    def _check_stage(self, stage: StageSpec, *, first: bool) -> None:
        if bool(len(stage.space)) == bool(stage.refine):
            raise ValueError(f"stage {stage.name}: give either a space or refine")
        if stage.refine and first:
            raise ValueError(f"stage {stage.name}: there is nothing to refine before the first stage. Move it down")
        if stage.trials is None and (stage.refine or stage.space.size({}) is None):
            raise ValueError(f"stage {stage.name}: its space has no finite grid. Give trials")
        if stage.trials is None and stage.sampler is not None and stage.sampler.name != "grid":
            raise ValueError(f"stage {stage.name}: sampler {stage.sampler.name} needs a number of trials. Give trials")

    def resumed_as(self, record: Mapping[str, Any]) -> SearchSpec:
        """This search for a study that began with that of record: what was not given of sampler and pruner stays."""
        kept = {
            place: kind.model_validate(record[place])
            for place, kind in (("sampler", SamplerSpec), ("pruner", PrunerSpec))
            if place not in self.model_fields_set and place in record
        }
        return self.model_copy(update=kept) if kept else self

    @property
    def better(self) -> Literal["maximize", "minimize"]:
        """The direction in which the value of a trial improves: the objective, or the first of several."""
        return self.objectives[0].better if self.objectives else self.direction or direction_of(self.objective)

    @property
    def requested_scores(self) -> list[str]:
        """The scores that objectives and constraints name and that are computed only where they are named."""
        aims = [aim.score for aim in self.objectives] or [self.objective]
        named = [*aims, *(re.split("[<>]=", text)[0].strip() for text in self.constraints)]
        return [score for score in named if (metric := metric_of(score)) is not None and metric.on_request]

    @property
    def judged_by(self) -> Score:
        """The score by which the best epoch of a training is chosen where the study names none."""
        scores = [aim.score for aim in self.objectives if aim.score not in get_args(Cost)]
        return cast("Score", scores[0]) if scores else self.objective

    @property
    def whole_space(self) -> Space:
        """All that any stage varies; the later stage's range where two vary one place."""
        if not self.stages:
            return self.space
        return Space({path: parameter for stage in self.stages for path, parameter in stage.space.items()})


_SAME_IMAGES = (
    "decides which images are trained on and judged, so its trials could not be compared, and the best would be the "
    "one with the easiest images. Fix it; to judge candidates on several parts of the data: split.kind: kfold"
)

# Places that are no search parameter, with all that lies below them -> why, and what to do instead.
NOT_SEARCHED: Mapping[str, str] = {
    "data": _SAME_IMAGES + ", and for several data sets one study each",
    "split": _SAME_IMAGES,
    "training.teacher": "is one model for all trials. Fix it; to compare two teachers, run two studies",
    "training.scores": "decides what else is measured of a training and changes nothing that comes out of it. Fix it",
    "training.checkpoint": "decides how often a training is saved and changes nothing that comes out of it. Fix it",
}


@dataclass(frozen=True)
class Effect:
    """A place has an effect only where one of the settings has a value that acts; advice says how to get there."""

    settings: tuple[str, ...]
    acts: Callable[[Any], bool]
    advice: str


def refusal_of(path: str) -> str:
    """Why a place is no search parameter, and what to do instead; "" where it may be searched."""
    return next((why for place, why in NOT_SEARCHED.items() if f"{path}.".startswith(f"{place}.")), "")


def effects_of(path: str, kind: str) -> tuple[Effect, ...]:
    """What has to be so for a place to have an effect on a network of this kind; () for one that always has."""
    return (*_EFFECTS.get(path, ()), *_MODEL_EFFECTS.get(kind, {}).get(path, ()))


def _one_of(setting: str, *values: Any) -> tuple[Effect, ...]:
    return (Effect((setting,), lambda value: value in values, f"Set {setting} to {' or '.join(map(str, values))}"),)


def _other_than(setting: str, *values: Any) -> tuple[Effect, ...]:
    return (Effect((setting,), lambda value: value not in values, f"Change {setting}"),)


_AUGMENT = "training.augment."
_MOVES = tuple(_AUGMENT + name for name in ("rotate", "shift", "crop", "zoom", "randaugment"))
_CHANGES = (
    *_MOVES,
    *(_AUGMENT + name for name in ("flip_horizontal", "flip_vertical", "rotate90", "brightness", "contrast")),
    *(_AUGMENT + name for name in ("saturation", "hue", "erase")),
)

_EFFECTS: Mapping[str, tuple[Effect, ...]] = {
    "training.optimizer.options": (
        Effect(
            ("training.optimizer.name",),
            lambda name: str(name).startswith("timm/"),
            "Set training.optimizer.name to timm/NAME",
        ),
    ),
    "training.optimizer.momentum": _one_of("training.optimizer.name", "sgd", "rmsprop"),
    "training.optimizer.nesterov": (
        *_one_of("training.optimizer.name", "sgd"),
        *_other_than("training.optimizer.momentum", 0),
    ),
    "training.optimizer.beta1": _one_of("training.optimizer.name", "adam", "adamw"),
    "training.optimizer.beta2": _one_of("training.optimizer.name", "adam", "adamw"),
    "training.schedule.gamma": _one_of("training.schedule.name", "step", "exponential"),
    "training.schedule.step_epochs": _one_of("training.schedule.name", "step"),
    "training.schedule.restarts": _one_of("training.schedule.name", "cosine"),
    "training.schedule.period_growth": (
        *_one_of("training.schedule.name", "cosine"),
        *_other_than("training.schedule.restarts", 0),
    ),
    "training.augment.alternate_flips": _other_than("training.augment.flip_horizontal", False),
    "training.teacher_weight": _other_than("training.teacher", None),
    "training.teacher_temperature": _other_than("training.teacher", None),
    "training.focal_gamma": _one_of("training.loss", "focal"),
    "training.augment.fill": (Effect(_MOVES, bool, "Set one of them above 0"),),
    "training.augment.magnitude": _other_than("training.augment.randaugment", 0),
    "training.augment.erase_area": _other_than("training.augment.erase", 0),
}

_HIDDEN = _other_than("model.hidden", [])
_DENSE = _other_than("model.dense", [])
_WITHOUT_LIST = (Effect(("model.filters",), lambda value: value is None, "Set model.filters to null"),)
_TUNED: Mapping[str, tuple[Effect, ...]] = {
    "model.activation": _DENSE,
    "model.unfreeze_epoch": _other_than("model.freeze", "none"),
    "model.views": (*_one_of("model.freeze", "all"), Effect(_CHANGES, bool, "Set one of them")),
    "training.optimizer.layer_decay": (
        Effect(
            ("model.freeze", "model.unfreeze_epoch"),
            lambda value: value not in ("all", None),
            "Set model.freeze to none or a number, or model.unfreeze_epoch",
        ),
    ),
}
_MODEL_EFFECTS: Mapping[str, Mapping[str, tuple[Effect, ...]]] = {
    "mlp": {"model.activation": _HIDDEN, "model.dropout": _HIDDEN, "model.batch_norm": _HIDDEN},
    "cnn": {"model.pool_type": _other_than("model.pool", 1)},
    "convnet": {
        "model.depth": _WITHOUT_LIST,
        "model.width": _WITHOUT_LIST,
        "model.growth": (*_WITHOUT_LIST, *_other_than("model.depth", 1)),
        "model.pool_size": _other_than("model.pool", "none"),
        "model.pool_after": _other_than("model.pool", "none"),
    },
    "torchvision": _TUNED,
    "timm": _TUNED,
    "fusion": _TUNED,
    "transfer": _TUNED,
}
