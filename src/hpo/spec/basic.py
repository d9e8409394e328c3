"""Kinds of values that several parts of a study file share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid"]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Width = Annotated[int, Field(ge=1, le=65536)]
