"""pyproject.toml declares the packages that the source imports, and no others."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Declared although no module imports them.
INDIRECT = {
    "cmaes",  # Optuna's CMA-ES sampler imports it
    "mcp",  # an extra, which need not be installed
    "medmnist",  # its table of data sets is read as a file, because importing it imports torch and makes a folder
    "nvidia-ml-py",  # torch.cuda imports it
    "onnx",  # an extra
    "onnxruntime",
    "onnxscript",  # torch.onnx imports it
    "psycopg",  # SQLAlchemy imports it for PostgreSQL
    "scikit-learn",  # its digits are read as a file
}


def _imported() -> set[str]:
    names = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"hpo"}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    return {_plain(re.split(r"[\[<>=!~; ]", line)[0]) for line in lines}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    installed = packages_distributions()
    # mcp_types is a part of mcp; extras need not be installed.
    imported = {name: {_plain(each) for each in installed.get(name, [name])} for name in _imported() - {"mcp_types"}}
    declared = _declared()
    assert [name for name, packages in imported.items() if not packages & declared] == []
    assert declared - set.union(*imported.values()) - INDIRECT == set()
