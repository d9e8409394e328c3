"""Hyperparameter studies of image classifiers: declare one file, search, compare, use the best."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.errors import HpoError
    from hpo.execute.run_study import run_study
    from hpo.predict import load_model
    from hpo.spec.load import load_study

    __version__: str

__all__ = ["HpoError", "__version__", "load_model", "load_study", "run_study"]

# Each name is imported on first use: `import hpo` is instant, and only run_study and load_model bring torch or mlflow.
_ROOMS = {
    "HpoError": "hpo.errors",
    "load_model": "hpo.predict",
    "load_study": "hpo.spec.load",
    "run_study": "hpo.execute.run_study",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("hpo.distribution").VERSION
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'hpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
