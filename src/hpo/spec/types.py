"""Types that several parts of a study file share: shares, counts, scores, names of samplers, pruners, optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from hpo.metrics import FORMS, METRICS, find_metric

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid"]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Width = Annotated[int, Field(ge=1, le=65536)]


Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _one_of(known: Callable[[], Iterable[str]]) -> Any:
    """The type of a string among known(), which is called at each validation, so that added names are accepted."""

    def check(value: str) -> str:
        if value not in (names := list(known())):
            expected = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return value

    def schema(tree: dict[str, Any]) -> None:
        tree["enum"] = list(known())

    return Annotated[str, AfterValidator(check), Field(json_schema_extra=schema)]


def _score_of(*parts: str) -> Any:
    """The name of a metric after one of these parts. The table is asked each time: metrics may be added to it."""

    def known() -> list[str]:
        return [f"{part}_{name}" for part in parts for name in METRICS]

    def check(value: str) -> str:
        part, _, name = value.partition("_")
        if part not in parts or find_metric(name) is None:
            names = [*known(), *(f"{part}_{form}" for part in parts for form in FORMS)]
            expected = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return value

    def schema(tree: dict[str, Any]) -> None:
        del tree["type"]
        tree["anyOf"] = [{"enum": known()}, {"type": "string", "pattern": rf"^({'|'.join(parts)})_.*[\[\]:0-9]"}]

    return Annotated[str, AfterValidator(check), Field(json_schema_extra=schema)]


# Validation scores that a study may aim at. Directions are those of hpo.metrics.direction_of.
Score = _score_of("valid")
# Scores of published results.
PublishedScore = _score_of("test", "valid")
# What a network costs: trainable and frozen weights; milliseconds an image takes, one at a time, on the trial's device.
Cost = Literal["parameters", "latency_ms"]
LIMITED: tuple[Cost, ...] = ("parameters", "latency_ms")

# The names of the tables SAMPLERS and PRUNERS of hpo.search and OPTIMIZERS of hpo.training, whose import would load
# Optuna or torch; tests compare.
SAMPLER_NAMES = ("random", "grid", "tpe", "cmaes", "gp", "qmc")
PRUNER_NAMES = ("none", "median", "successive_halving", "hyperband", "patient", "wilcoxon", "curve")
OPTIMIZER_NAMES = ("sgd", "rmsprop", "adam", "adamw")
SamplerName = _one_of(lambda: SAMPLER_NAMES)
PrunerName = _one_of(lambda: PRUNER_NAMES)
OptimizerName = _one_of(lambda: OPTIMIZER_NAMES)
