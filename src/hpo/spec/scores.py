"""The vocabulary of study files: shares, counts, and the scores a study may aim at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from hpo.metrics import METRICS

Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _one_of(known: Callable[[], Iterable[str]]) -> Any:
    """A string among known(), asked at each validation, so that metrics added to the table count."""

    def check(value: str) -> str:
        if value not in (names := list(known())):
            expected = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return value

    def schema(tree: dict[str, Any]) -> None:
        tree["enum"] = list(known())

    return Annotated[str, AfterValidator(check), Field(json_schema_extra=schema)]


# Validation scores that a study may aim at. Directions are those of hpo.metrics.direction_of.
Score = _one_of(lambda: [f"valid_{name}" for name in METRICS])
# Scores of published results.
PublishedScore = _one_of(lambda: [f"{part}_{name}" for part in ("test", "valid") for name in METRICS])
# What a network costs: trainable and frozen weights; milliseconds an image takes, one at a time, on the trial's device.
Cost = Literal["parameters", "latency_ms"]
LIMITED: tuple[Cost, ...] = ("parameters", "latency_ms")
