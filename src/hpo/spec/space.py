"""Types of a study file's settings, and the search space: dotted paths, each with a range, a list or a condition."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    RootModel,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from hpo.metrics import FORMS, METRICS, find_metric
from hpo.spec.grid import Counter, expand

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid"]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Width = Annotated[int, Field(ge=1, le=65536)]


Share = Annotated[float, Field(gt=0.0, lt=1.0)]
MOST = 10**9  # of anything that is counted: what every database stores
Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _one_of(known: Callable[[], Iterable[str]], *, also: tuple[str, str] | None = None) -> Any:
    """The type of a string among known(), which is called at each validation, so that added names are accepted.

    also is a pattern of further names, and how messages call those.
    """

    def check(value: str) -> str:
        if value not in (names := list(known())) and not (also and re.fullmatch(also[0], value)):
            *first, last = [*map(repr, names), *([also[1]] if also else [])]
            expected = f"{', '.join(first)} or {last}"
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return value

    def schema(tree: dict[str, Any]) -> None:
        if also is None:
            tree["enum"] = list(known())
            return
        del tree["type"]
        tree["anyOf"] = [{"enum": list(known())}, {"type": "string", "pattern": f"^{also[0]}$"}]

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
SAMPLER_NAMES = ("auto", "random", "grid", "tpe", "cmaes", "gp", "mfgp", "qmc")
PRUNER_NAMES = ("auto", "none", "median", "successive_halving", "hyperband", "patient", "wilcoxon", "curve")
OPTIMIZER_NAMES = ("sgd", "rmsprop", "adam", "adamw")
# package.module:function, as hpo.spec.own_code.split_function reads it.
_OWN = (r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", "'package.module:function'")
SamplerName = _one_of(lambda: SAMPLER_NAMES, also=_OWN)
PrunerName = _one_of(lambda: PRUNER_NAMES, also=_OWN)
OptimizerName = _one_of(lambda: OPTIMIZER_NAMES, also=(r"timm/[a-z0-9]+", "timm/NAME of timm.optim"))


# The fields below are called float and int, as in the file; inside those classes the builtins need other names.
_Real = float
_Whole = int
_EXACT = 2**53  # up to here, a sampler's floats tell whole numbers apart


class Part(BaseModel):
    """A frozen piece of a study file; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Prior(Part):
    """Where the best value probably is. `prior: 1e-3` is short for `prior: {value: 1e-3}`."""

    value: Any
    """The value that is tried first; values near it are tried more often while they do well."""
    confidence: Literal["low", "medium", "high"] = "medium"
    """Half, a quarter or an eighth of the range is the standard deviation around the value. An option: it is 2, 4 or 8
    times as likely as each other one."""


def _by_prior(value: Any) -> Any:
    whole = value is None or isinstance(value, Prior) or (isinstance(value, dict) and "value" in value)
    return value if whole else {"value": value}


class _Parameter(Part):
    when: dict[str, Any] = Field(default_factory=dict)
    """Tried only if each named path has the given value, or one of the given list of values."""
    prior: Annotated[
        Prior | None,
        BeforeValidator(_by_prior, json_schema_input_type=bool | int | float | str | list[Any] | Prior | None),
    ] = None
    """The value that is probably best, or {value, confidence}. A wrong one costs a few trials."""

    @model_validator(mode="after")
    def _prior_fits(self) -> _Parameter:
        if self.prior is not None and not self.takes(self.prior.value):
            raise ValueError(f"prior {self.prior.value!r} is not in the range. Correct it, or widen the range")
        return self

    def takes(self, value: Any) -> bool:
        """Whether this is one of the values."""
        raise NotImplementedError

    def count(self) -> float:
        """Number of values; inf for a continuous range."""
        raise NotImplementedError

    def check_finite(self) -> None:
        """Raise ValueError for a continuous range, without building a grid."""
        if math.isinf(self.count()):
            raise ValueError("a float without a step has no finite grid. Add a step, or list the values as a choice")


def _check_range(low: float, high: float, log: bool, step: float | None) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"range [{low}, {high}] is not finite. Give two numbers")
    if low > high:
        raise ValueError(f"low {low} exceeds high {high}. Swap them")
    if log and low <= 0:
        raise ValueError(f"low {low} is not positive, and log is true. Raise low or leave log out")
    if log and step is not None:
        raise ValueError("log and step exclude each other. Leave one of them out")
    if step is not None and step <= 0:
        raise ValueError(f"step {step} is not positive. Give a positive step")
    if not (high - low) / (step or 1) <= (_EXACT if step else math.inf) or math.isinf(high - low):
        raise ValueError(f"range [{low}, {high}]{f' in steps of {step}' * bool(step)} is too wide. Narrow it")


def _is_number(value: Any) -> bool:
    return isinstance(value, _Whole | _Real) and not isinstance(value, bool)


def _on_step(distance: float, step: float | None) -> bool:
    return step is None or math.isclose(distance / step, round(distance / step), abs_tol=1e-9)


class Float(_Parameter):
    """A real number in [low, high]."""

    float: tuple[_Real, _Real]
    """[low, high], both included."""
    log: bool = False
    """Search the logarithm: for scales such as learning rates."""
    step: _Real | None = None
    """Only low, low + step, low + 2 step, ..."""
    per: str | None = None
    """Another place with a number, such as training.batch_size: the value that is drawn holds where that is
    `reference`; elsewhere it is multiplied by that place's number / reference."""
    reference: Annotated[_Real, Field(gt=0.0)] | None = None
    """per: the number of the other place for which low and high are meant."""

    @model_validator(mode="after")
    def _ordered(self) -> Float:
        _check_range(*self.float, self.log, self.step)
        if (self.per is None) != (self.reference is None):
            raise ValueError("per and reference belong together. Write both, such as per: training.batch_size")
        return self

    def grid(self) -> list[Any]:
        """All values in order; raises ValueError for a continuous range."""
        low, high = self.float
        self.check_finite()
        if low == high or self.step is None:
            return [low]
        return [round(low + index * self.step, 12) for index in range(int(self.count()))]

    def count(self) -> _Real:
        """Number of values; inf for a continuous range of more than one."""
        low, high = self.float
        if low == high:
            return 1
        return math.floor((high - low) / self.step + 1e-9) + 1 if self.step else math.inf

    def takes(self, value: Any) -> bool:
        """True for a number within the range and on its steps."""
        low, high = self.float
        return _is_number(value) and low <= value <= high and _on_step(value - low, self.step)

    def ends(self) -> list[Any]:
        """Values that bound the parameter: if these are valid in the spec, all are."""
        return list(self.float)


class Int(_Parameter):
    """A whole number in [low, high]."""

    int: tuple[_Whole, _Whole]
    """[low, high], both included."""
    log: bool = False
    """Search the logarithm: for scales such as widths."""
    step: _Whole | None = None
    """Only low, low + step, low + 2 step, ..."""

    @model_validator(mode="after")
    def _ordered(self) -> Int:
        if any(abs(number) > _EXACT for number in (*self.int, self.step or 1)):
            raise ValueError(
                "a number is beyond 2^53, up to which samplers tell whole numbers apart. Give smaller ones"
            )
        _check_range(*self.int, self.log, self.step)
        return self

    def grid(self) -> list[Any]:
        """All values in order."""
        low, high = self.int
        return list(range(low, high + 1, self.step or 1))

    def count(self) -> _Real:
        """Number of values."""
        low, high = self.int
        return (high - low) // (self.step or 1) + 1

    def takes(self, value: Any) -> bool:
        """True for a whole number within the range and on its steps."""
        low, high = self.int
        whole = isinstance(value, _Whole) and _is_number(value)
        return whole and low <= value <= high and _on_step(value - low, self.step)

    def ends(self) -> list[Any]:
        """Values that bound the parameter: if these are valid in the spec, all are."""
        return list(self.int)


class Choice(_Parameter):
    """One of the listed options, of any type that fits the place (lists too)."""

    choice: list[Any]

    @model_validator(mode="after")
    def _some(self) -> Choice:
        if not self.choice:
            raise ValueError("choice has no options. List at least one")
        if any(self.choice.index(option) != place for place, option in enumerate(self.choice)):
            raise ValueError(f"choice {self.choice} lists an option twice. Leave one out")
        return self

    def grid(self) -> list[Any]:
        """All options in order."""
        return list(self.choice)

    def count(self) -> float:
        """Number of options."""
        return len(self.choice)

    def takes(self, value: Any) -> bool:
        """True for one of the options."""
        return value in self.choice

    def ends(self) -> list[Any]:
        """Values that bound the parameter: if these are valid in the spec, all are."""
        return list(self.choice)


def _kind(value: Any) -> str | None:
    if isinstance(value, _Parameter):
        return type(value).__name__.lower()
    if isinstance(value, Mapping):
        kinds = [kind for kind in ("float", "int", "choice") if kind in value]
        return kinds[0] if len(kinds) == 1 else None
    return None


Parameter = Annotated[
    Annotated[Float, Tag("float")] | Annotated[Int, Tag("int")] | Annotated[Choice, Tag("choice")],
    Discriminator(
        _kind,
        custom_error_type="parameter_kind",
        custom_error_message=(
            "a parameter is {float: [low, high]}, {int: [low, high]} or {choice: [...]}. Write one of these keys"
        ),
    ),
]


class Space(RootModel[dict[str, Parameter]]):
    """Dotted paths into the spec, and how each may vary."""

    model_config = ConfigDict(frozen=True)
    root: dict[str, Parameter] = Field(default_factory=dict, max_length=500)

    @model_validator(mode="after")
    def _acyclic(self) -> Space:
        self.ordered()
        return self

    def __len__(self) -> int:
        return len(self.root)

    def items(self) -> Iterator[tuple[str, Float | Int | Choice]]:
        """(path, parameter) pairs as written."""
        return iter(self.root.items())

    def __getitem__(self, path: str) -> Float | Int | Choice:
        return self.root[path]

    def __contains__(self, path: object) -> bool:
        return path in self.root

    @property
    def conditional(self) -> bool:
        """Whether any parameter has a `when`."""
        return any(parameter.when for parameter in self.root.values())

    def ordered(self) -> list[tuple[str, Float | Int | Choice]]:
        """(path, parameter) pairs, every parameter after those that its condition names; ValueError on a cycle."""
        placed: dict[str, Float | Int | Choice] = {}
        waiting = dict(self.root)
        while waiting:
            ready = [
                path
                for path, parameter in waiting.items()
                if not any(asked in waiting for asked in parameter.when if asked != path)
            ]
            ready = [path for path in ready if path not in waiting[path].when]
            if not ready:
                raise ValueError(
                    f"the conditions of {', '.join(sorted(waiting))} wait for each other. Remove one `when`"
                )
            for path in ready:
                placed[path] = waiting.pop(path)
        return list(placed.items())

    def cells(self, fixed: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Every cell of the full grid; fixed gives the values of paths outside the space that conditions name.

        A conditional parameter is absent from the cells in which its condition does not hold. Raises ValueError where a
        parameter is continuous.
        """
        yield from expand(self.ordered(), dict(fixed), {})

    def size(self, fixed: Mapping[str, Any]) -> int | None:
        """Number of cells of the full grid, counted without building it; None if a parameter is continuous."""
        if any(math.isinf(parameter.count()) for parameter in self.root.values()):
            return None
        return Counter(self.ordered()).count(0, fixed)
