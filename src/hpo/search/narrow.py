"""Ranges around a value: what fits one, and how it shrinks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hpo.spec.space import Choice, Float, Int, Space


def fits(parameter: Float | Int | Choice, value: Any) -> bool:
    """Whether the value is one of the options, or within the range and on its steps."""
    if isinstance(parameter, Choice):
        return value in parameter.choice
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = parameter.ends()
    step = parameter.step or (1 if isinstance(parameter, Int) and not parameter.log else None)
    if isinstance(parameter, Int) and not isinstance(value, int):
        return False
    steps = (value - low) / step if step else 0.0
    return bool(low <= value <= high and math.isclose(steps, round(steps), abs_tol=1e-9))


def refined(space: Space, centre: Mapping[str, Any], share: float) -> Space:
    """The space around one candidate: ranges shrunk to a share in (0, 1] of their width, on their own scale.

    They stay within their old ends and on their old steps, and hold the neighbours of the centre at least. Options and
    conditions stay; so do ranges of places that the centre has not.
    """
    return Space(
        {
            path: parameter
            if isinstance(parameter, Choice) or path not in centre
            else _shrunk(parameter, centre[path], share)
            for path, parameter in space.items()
        }
    )


def _shrunk(parameter: Float | Int, centre: Any, share: float) -> Float | Int:
    low, high = parameter.ends()
    centre = min(max(centre, low), high)
    if parameter.log:
        reach = math.exp(share * math.log(high / low) / 2)
        ends = max(low, centre / reach), min(high, centre * reach)
        if isinstance(parameter, Int):
            ends = max(low, min(math.floor(ends[0]), centre - 1)), min(high, max(math.ceil(ends[1]), centre + 1))
    elif step := parameter.step or (1 if isinstance(parameter, Int) else None):
        last, place = math.floor((high - low) / step + 1e-9), round((centre - low) / step)
        reach = max(1, round(share * (high - low) / step / 2))
        ends = low + max(0, place - reach) * step, low + min(last, place + reach) * step
        if isinstance(parameter, Float):
            ends = round(ends[0], 12), round(ends[1], 12)
    else:
        reach = share * (high - low) / 2
        ends = max(low, centre - reach), min(high, centre + reach)
    return parameter.model_copy(update={"int" if isinstance(parameter, Int) else "float": ends})
