"""Help and lists answer at once: nothing heavy is imported for them."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import hpo
from hpo.home import Home
from hpo.tracking.registry import versions

HEAVY = {"torch", "torchvision", "mlflow", "optuna", "sklearn", "pandas", "matplotlib", "medmnist", "timm", "scipy"}
LOOKS = ["--help", "--version", "studies", "show digits-mlp", "schema", "run --help", "run unknown", "models", "status"]
# One process for all: first the package alone, then each command; each time, which modules are loaded.
_WATCHED = """
import json, sys
told = {}
import hpo; hpo.HpoError; hpo.__version__
told[""] = sorted(sys.modules)
from typer.testing import CliRunner
from hpo.cli.app import app
for look in sys.argv[1:]:
    CliRunner().invoke(app, look.split())
    told[look] = sorted(sys.modules)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    done = subprocess.run([sys.executable, "-c", _WATCHED, *LOOKS], capture_output=True, text=True, check=True)
    return {look: set(modules) for look, modules in json.loads(done.stdout).items()}


@pytest.mark.parametrize("look", LOOKS)
def test_looking_around_imports_nothing_heavy(loaded: dict[str, set[str]], look: str) -> None:
    assert "hpo.cli.app" in loaded[look]
    assert not loaded[look] & HEAVY


def test_import_hpo_brings_only_itself(loaded: dict[str, set[str]]) -> None:
    assert not loaded[""] & (HEAVY | {"pydantic", "yaml", "typer", "rich", "numpy"})


@pytest.mark.parametrize(
    ("code", "allowed"), [("import hpo.cluster", set()), ("import hpo.execute.run_study", {"optuna"})]
)
def test_a_supervisor_and_a_scheduler_script_import_no_network_no_tracking_and_no_figures(code, allowed) -> None:
    told = f"{code}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & (HEAVY - allowed)


def test_predict_brings_torch_and_no_more(finished: Path, tmp_path: Path) -> None:
    """Neither the compiler, by which torch loads programs, nor MLflow, by whose registry the model is named."""
    Image.new("L", (8, 8)).save(tmp_path / "one.png")
    told = (
        "import json, sys; from typer.testing import CliRunner; from hpo.cli.app import app;"
        "answer = CliRunner().invoke(app, sys.argv[1:]); print(json.dumps([answer.exit_code, *sys.modules]))"
    )
    (name,) = {version.name for version in versions(Home.find(finished))}
    words = ["predict", name, str(tmp_path / "one.png"), "--home", str(finished)]
    done = subprocess.run([sys.executable, "-c", told, *words], capture_output=True, text=True, check=True)
    code, *modules = json.loads(done.stdout)
    assert code == 0
    assert "torch" in modules
    assert not {*modules} & {*HEAVY - {"torch"}, "torch._dynamo", "sympy.core", "sqlalchemy"}


def _seconds(*arguments: str) -> float:
    """Processor seconds of a command, the least of five times: a busy machine stretches them."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_answers_come_at_once() -> None:
    """Aims, by benchmarks/startup.py: 2 and 4 times what the import of typer takes; half of that again is allowed."""
    typer = _seconds("-c", "import typer")
    assert _seconds("-m", "hpo", "--help") < 3 * typer
    assert _seconds("-m", "hpo", "studies") < 6 * typer


def test_python_api_is_what_it_says() -> None:
    from hpo.errors import HpoError
    from hpo.spec.load import load_study

    assert set(hpo.__all__) <= set(dir(hpo))
    assert hpo.load_study is load_study
    assert hpo.HpoError is HpoError
    assert hpo.load_study("digits-mlp", overrides={"training.epochs": 3}).training.epochs == 3
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = hpo.nothing_here
