"""The notebooks run from a fresh kernel, offline, and are committed with their outputs."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_valid_and_has_its_outputs_in_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)], "run: python docs/make_notebooks.py"
    outputs = [output for cell in code for output in cell.outputs]
    assert any("data" in output for output in outputs)
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    # No path of the machine on which it ran.
    assert not any("execution" in cell.metadata for cell in code)
    assert not re.search(r"(?<![\w.])/(tmp|home|root|usr|work)/", str(outputs))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_from_hpo_is_there(path):
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    imports = [node for source in cells for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    for node in imports:
        if (node.module or "").split(".")[0] == "hpo":
            module = importlib.import_module(str(node.module))
            rooms = [found.name for found in pkgutil.iter_modules(getattr(module, "__path__", []))]
            missing = [name.name for name in node.names if not hasattr(module, name.name) and name.name not in rooms]
            assert not missing, f"{path.name}: {node.module} has no {', '.join(missing)}"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_leaves_the_home_folder_alone(path, tmp_path, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HPO_HOME", raising=False)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(work)}}).execute()
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")
    left = [str(file.relative_to(home)) for file in home.rglob("*")]
    assert not [name for name in left if any(word in name for word in ("hpo", "mlruns", "mlflow", "medmnist"))]
