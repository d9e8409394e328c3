"""Hyperparameter studies of image classifiers: declare one file, search, compare, use the best."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.api.ask_tell import ask_tell
    from hpo.api.optuna_callback import optuna_callback
    from hpo.api.run import run_study
    from hpo.api.study import open_study
    from hpo.errors import HpoError
    from hpo.predict import load_model
    from hpo.spec.load import load_study
    from hpo.spec.load import load_study as load_spec

    __version__: str

__all__ = [
    "HpoError",
    "__version__",
    "ask_tell",
    "load_model",
    "load_spec",
    "load_study",
    "open_study",
    "optuna_callback",
    "run_study",
]

# Name -> its module and its name there. Each is imported on first use: `import hpo` is instant, and only run_study and
# load_model bring torch or mlflow.
_ROOMS = {
    "HpoError": ("hpo.errors", "HpoError"),
    "ask_tell": ("hpo.api.ask_tell", "ask_tell"),
    "load_model": ("hpo.predict", "load_model"),
    "load_spec": ("hpo.spec.load", "load_study"),
    "load_study": ("hpo.spec.load", "load_study"),  # the earlier name of load_spec
    "open_study": ("hpo.api.study", "open_study"),
    "optuna_callback": ("hpo.api.optuna_callback", "optuna_callback"),
    "run_study": ("hpo.api.run", "run_study"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("hpo.distribution").VERSION
    if name in _ROOMS:
        module, attribute = _ROOMS[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'hpo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
