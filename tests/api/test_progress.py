"""The progress bar of notebooks, in a real kernel."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from hpo.api.progress import ProgressBar, in_notebook

CELLS = [
    """
import hpo
from hpo.home import Home
spec = {
    "name": "mine", "data": {"name": "digits"}, "split": {"kind": "holdout"}, "model": {"kind": "mlp", "hidden": 8},
    "training": {"epochs": 1}, "search": {"sampler": "random", "space": {"model.dropout": {"float": [0.0, 0.5]}}},
    "keep": {"figures": "none"},
}
study = hpo.run_study(spec, trials=2, workers=0)
""",
    "study",
    "study.plot.optimization_history()",
    "study.trials_dataframe()",
]


def test_a_kernel_shows_progress_study_figure_and_frame(empty: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(empty)}}).execute()
    run, study, figure, frame = (cell.outputs for cell in notebook.cells)
    bars = [output.data["text/html"] for output in run if "text/html" in output.get("data", {})]
    assert len(bars) == 1  # one display, which is updated
    assert 'value="2" max="2"' in bars[0]
    assert "2 of 2 trials · best valid_accuracy" in bars[0]
    assert "mine version 1" in bars[0]
    assert "Study mine: 2 complete" in study[0].data["text/html"]
    assert "image/png" in figure[0].data
    assert "params_model.dropout" in frame[0].data["text/html"]


def test_elsewhere_there_is_no_bar() -> None:
    assert not in_notebook()
    assert repr(ProgressBar()) == "0 of ? trials · preparing"


@pytest.mark.parametrize("text", ["<b>", "a & b"])
def test_notices_are_text(text: str) -> None:
    bar = ProgressBar()
    bar.text = text
    assert text not in bar._repr_html_()
