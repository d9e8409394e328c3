"""Every recipe of docs/recipes.md runs as it is written, one after the other in one script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = {
    re.sub(r"\W+", "-", title): re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for title, text in re.findall(r"^## (\d+\. [^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
}


def test_there_are_ten_recipes_with_code() -> None:
    assert len(RECIPES) == 10
    assert all(RECIPES.values())


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    folder = tmp_path_factory.mktemp("recipes")
    parts = [f"{''.join(blocks)}\nprint('ran', {title!r})\n" for title, blocks in RECIPES.items()]
    (folder / "recipes.py").write_text("\n".join(parts), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        patch.setenv("HPO_DATA", str(folder / "data"))
        patch.setenv("OMP_NUM_THREADS", "1")
        done = subprocess.run([sys.executable, "recipes.py"], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout, done.stderr, folder


@pytest.mark.slow
@pytest.mark.parametrize("title", RECIPES)
def test_recipe_runs(ran: tuple[str, str, Path], title: str) -> None:
    said, errors, _ = ran
    assert f"ran {title}" in said.splitlines(), errors[-3000:]


@pytest.mark.slow
def test_recipes_leave_what_they_promise(ran: tuple[str, str, Path]) -> None:
    _, _, folder = ran
    made = {path.name for path in folder.iterdir()}
    assert made >= {"history.png", "digits.html", "own_network_model.py", "mlruns"}
