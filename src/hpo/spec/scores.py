"""The vocabulary of study files: shares, counts, and the scores a study may aim at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

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
LIMITED: tuple[Cost, ...] = ("parameters", "latency_ms")
Score = Literal["valid_loss", "valid_accuracy", "valid_balanced_accuracy", "valid_macro_f1", "valid_macro_auc"]
