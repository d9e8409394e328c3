"""Run the notebooks and keep their outputs in them: python docs/make_notebooks.py [NAME ...] (some minutes)."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"


def run_notebook(path: Path) -> None:
    """Run a notebook in an empty folder and write its outputs, without warnings and times, into it."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as work:
        os.environ["HPO_DATA"] = str(Path(work) / "data")
        client = NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": work}})
        client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # A warning names files of this machine.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, path)


if __name__ == "__main__":
    os.environ.pop("HPO_HOME", None)
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        run_notebook(FOLDER / f"{name}.ipynb")
