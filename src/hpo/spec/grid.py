"""The cells of a finite search space: conditions, all cells one by one, and their number without building them.

Parameters are those of hpo.spec.space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def listed(wanted: Any) -> list[Any]:
    """The values that one entry of a `when` allows."""
    return wanted if isinstance(wanted, list) else [wanted]


def holds(condition: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether every path of a `when` has (one of) the wanted value(s); a path without a value never does."""
    missing = object()
    return all(values.get(path, missing) in listed(wanted) for path, wanted in condition.items())


class Counter:
    """Counts the cells of a grid. It branches only over values that conditions name, and remembers each branch."""

    def __init__(self, parameters: list[tuple[str, Any]]) -> None:
        self._parameters = parameters
        # Paths that the conditions of the parameters from each index on name, with every value that they want.
        self._wanted: list[dict[str, list[Any]]] = [{}]
        for _, parameter in reversed(parameters):
            wanted = {path: list(values) for path, values in self._wanted[0].items()}
            for path, values in parameter.when.items():
                known = wanted.setdefault(path, [])
                known += [value for value in listed(values) if value not in known]
            self._wanted.insert(0, wanted)
        self._counted: dict[tuple[int, str], int] = {}

    def count(self, index: int, values: Mapping[str, Any]) -> int:
        """Cells of the parameters from index on, where those before them have these values."""
        if index == len(self._parameters):
            return 1
        key = index, repr([values.get(path, _ABSENT) for path in sorted(self._wanted[index])])
        if key not in self._counted:
            self._counted[key] = self._count(index, values)
        return self._counted[key]

    def _count(self, index: int, values: Mapping[str, Any]) -> int:
        path, parameter = self._parameters[index]
        if not holds(parameter.when, values):
            return self.count(index + 1, values)
        named = [value for value in self._wanted[index + 1].get(path, []) if parameter.takes(value)]
        others = int(parameter.count()) - len(named)
        total = sum(self.count(index + 1, {**values, path: value}) for value in named)
        return total + (others * self.count(index + 1, {**values, path: _ABSENT}) if others else 0)


_ABSENT = object()  # equals no value of a condition


def expand(parameters: list[tuple[str, Any]], known: dict[str, Any], cell: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every cell of the grid of these parameters; known are the values that conditions may name."""
    if not parameters:
        yield dict(cell)
        return
    (path, parameter), rest = parameters[0], parameters[1:]
    if not holds(parameter.when, known):
        yield from expand(rest, known, cell)
        return
    for value in parameter.grid():
        yield from expand(rest, {**known, path: value}, {**cell, path: value})
