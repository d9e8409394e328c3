"""What `sampler: auto` and `pruner: auto` stand for in a study, and why.

The study file alone decides, and neither the number of trials nor that of workers does: a study that is resumed with
more of them goes on as it began. docs/samplers.md has the measurements behind the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpo.spec.search import PrunerSpec, SamplerSpec
from hpo.spec.space import Choice, Float, Int
from hpo.spec.study import StudySpec
from hpo.spec.training import ScheduleSpec

_MOST_DIMENSIONS = 30  # of a Gaussian process; an option counts as one
_LEAST_EPOCHS = 6  # of a training: with fewer, the first rung is hardly cheaper than the whole
_FIRST_RUNG = 25  # the first rung is at one in this many epochs


def chosen_sampler(spec: StudySpec) -> tuple[SamplerSpec, str]:
    """The sampler of a search or a stage, and why; "" where the study file names it."""
    part = spec.search.sampler
    if part.name != "auto":
        return part, ""
    name, reason = _sampler(spec)
    return part.model_copy(update={"name": name}), reason


def _sampler(spec: StudySpec) -> tuple[str, str]:
    if spec.search.objectives:
        return "tpe", "there are several objectives"
    dimensions = sum(map(_dimensions, dict(spec.search.whole_space.items()).values()))
    if dimensions > _MOST_DIMENSIONS:
        return "tpe", f"the space has {dimensions} dimensions, more than a Gaussian process learns from few trials"
    return "mfgp", "a model of scores over parameters and epochs was best on published learning curves"


def _dimensions(parameter: Float | Int | Choice) -> int:
    return len(parameter.choice) if isinstance(parameter, Choice) and len(parameter.choice) > 2 else 1


def longest_training(spec: StudySpec) -> int:
    """The epochs of the longest training of the search, of one fold."""
    path = "training.epochs"
    if path in spec.search.space:
        return int(max(spec.search.space[path].ends()))
    ends = [end for stage in spec.search.stages if path in stage.space for end in stage.space[path].ends()]
    return int(max([spec.training.epochs, *ends]))


def chosen_pruner(spec: StudySpec) -> tuple[PrunerSpec, str]:
    """The pruner of a study, and why; "" where the study file names it."""
    part = spec.search.pruner
    if part.name != "auto":
        return part, ""
    epochs = longest_training(spec)
    if reason := _unpruned(spec, epochs):
        return part.model_copy(update={"name": "none"}), reason
    rising = int(_rising(spec) * epochs)
    rung = part.min_epochs or max(1, round(epochs / _FIRST_RUNG), rising)
    reason = f"poor trials show within {epochs} epochs; one in three continues from epoch {rung}, {3 * rung}, ..."
    reason += ", once the learning rate has risen" * (rung == rising)
    return part.model_copy(update={"name": "successive_halving", "min_epochs": rung, "reduction_factor": 3}), reason


def _rising(spec: StudySpec) -> float:
    """The share of a training in which the learning rate climbs: before its end, trials tell little of each other."""
    searched = any(path.startswith("training.schedule") for path, _ in spec.search.whole_space.items())
    return max(spec.training.schedule.rising, ScheduleSpec(name="one_cycle").rising if searched else 0.0)


def as_begun(spec: StudySpec, record: Mapping[str, Any]) -> StudySpec:
    """The spec with the first rung of the record of a study that began with `pruner: auto`, maybe by an earlier rule.

    A trial is compared with those that reached the same rung, so rungs stay.
    """
    part, _ = chosen_pruner(spec)
    then = record.get("chosen", {}).get("pruner", {})
    if spec.search.pruner.name != "auto" or not part.name == then.get("name") == "successive_halving":
        return spec
    rung = then.get("min_epochs", max(1, round(longest_training(spec) / _FIRST_RUNG)))
    if rung == part.min_epochs:
        return spec
    pruner = spec.search.pruner.model_copy(update={"min_epochs": rung})
    return spec.model_copy(update={"search": spec.search.model_copy(update={"pruner": pruner})})


def _unpruned(spec: StudySpec, epochs: int) -> str:
    search = spec.search
    if search.objectives:
        return "there are several objectives"
    if "training.data_growth" in search.whole_space:
        return "trials are compared at one epoch, and with other values of training.data_growth theirs would differ"
    if search.sampler.name == "grid" or any(stage.trials is None for stage in search.stages):
        return "each cell of a grid is trained to its end"
    if epochs < _LEAST_EPOCHS:
        return f"{epochs} epochs are too few to judge a trial before its end"
    return ""


def prunes(spec: StudySpec) -> bool:
    """Whether trials of the study may be pruned."""
    part, _ = chosen_pruner(spec)
    return str(part.name) != "none"
