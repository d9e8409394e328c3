"""Parameters of a search space: as Optuna's distributions, which values fit them, and smaller ranges around a value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.spec.space import Choice, Float, Int, Space

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial


def distribution(parameter: Float | Int | Choice) -> BaseDistribution:
    """Optuna's distribution of a parameter."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(parameter, Choice):
        return CategoricalDistribution(_options(parameter))
    # Optuna warns of a high end that the steps miss.
    if isinstance(parameter, Int):
        first, last = parameter.int
        step = parameter.step or 1
        return IntDistribution(first, last - (last - first) % step, log=parameter.log, step=step)
    low, high = parameter.float
    if parameter.step and low < high:
        high = round(low + (parameter.count() - 1) * parameter.step, 12)
    return FloatDistribution(low, high, parameter.log, parameter.step)


def encode(parameter: Float | Int | Choice, value: Any) -> Any:
    """A value of the parameter as Optuna stores it."""
    return _options(parameter)[parameter.choice.index(value)] if isinstance(parameter, Choice) else value


def decode(parameter: Float | Int | Choice, value: Any) -> Any:
    """The value of the parameter that encode turned into this one."""
    if isinstance(parameter, Choice):
        return parameter.choice[_options(parameter).index(value)]
    return int(value) if isinstance(parameter, Int) else float(value)


def suggest(trial: Trial, name: str, parameter: Float | Int | Choice) -> Any:
    """The value of a parameter for a trial of Optuna, which calls it by this name."""
    within: Any = distribution(parameter)
    if isinstance(parameter, Choice):
        return decode(parameter, trial.suggest_categorical(name, within.choices))
    method = trial.suggest_int if isinstance(parameter, Int) else trial.suggest_float
    return decode(parameter, method(name, within.low, within.high, step=within.step, log=within.log))


def _options(parameter: Choice) -> list[Any]:
    if all(option is None or isinstance(option, bool | int | float | str) for option in parameter.choice):
        return parameter.choice
    # Optuna stores plain values only. All options are encoded, so that [1] and "[1]" differ.
    return [json.dumps(option, sort_keys=True) for option in parameter.choice]


def count_values(parameter: Float | Int | Choice) -> float:
    """The number of different values; inf for a continuous range."""
    if isinstance(parameter, Choice):
        return len(parameter.choice)
    low, high = parameter.ends()
    step = parameter.step or (1 if isinstance(parameter, Int) else 0)
    if low == high:
        return 1
    return math.floor((high - low) / step + 1e-9) + 1 if step else math.inf


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


def narrowed(space: Space, centre: Mapping[str, Any], share: float) -> Space:
    """The space around one candidate: ranges shrunk to a share in (0, 1] of their width, on their own scale.

    They stay within their old ends and on their old steps, and include the neighbours of the centre at least. Options
    and conditions stay, and so do ranges of paths that the centre lacks.
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
        last, middle = math.floor((high - low) / step + 1e-9), round((centre - low) / step)
        reach = max(1, round(share * (high - low) / step / 2))
        ends = low + max(0, middle - reach) * step, low + min(last, middle + reach) * step
        if isinstance(parameter, Float):
            ends = round(ends[0], 12), round(ends[1], 12)
    else:
        reach = share * (high - low) / 2
        ends = max(low, centre - reach), min(high, centre + reach)
    return parameter.model_copy(update={"int" if isinstance(parameter, Int) else "float": ends})
