"""The wheel, in an empty environment of each Python version: it installs, and runs a study without the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hpo import distribution

ROOT = Path(__file__).parents[1]
HERE = f"3.{sys.version_info.minor}"
VERSIONS = ("3.11", "3.12", "3.13")


def _uv(*words: str | Path) -> str:
    done = subprocess.run(["uv", *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("uv") is None:
        pytest.skip("uv is not installed: pip install uv")
    folder = tmp_path_factory.mktemp("wheel")
    _uv("build", "--wheel", "--quiet", "--out-dir", folder)
    (made,) = folder.glob("*.whl")
    return made


def _interpreter(version: str) -> str:
    if version == HERE:
        return sys.executable
    if not os.environ.get("HPO_CI_WHEELS"):
        pytest.skip("another Python, whose torch is a download of its own: set HPO_CI_WHEELS=1")
    found = subprocess.run(["uv", "python", "find", "--no-project", version], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"there is no Python {version} here")
    return found.stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_runs_a_study_in_an_empty_environment(version: str, wheel: Path, tmp_path: Path) -> None:
    python = tmp_path / "environment" / "bin" / "python"
    _uv("venv", "--quiet", "--python", _interpreter(version), python.parents[1])
    _uv("pip", "install", "--quiet", "--python", python, "--constraint", ROOT / "constraints.txt", wheel)
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ}
    (home := tmp_path / "home").mkdir()
    command = [python.with_name("hpo"), "run", "digits-mlp", "--trials", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env={**kept, "HOME": str(home)})
    assert done.returncode == 0, done.stdout + done.stderr
    end = json.loads(done.stdout.splitlines()[-1])
    assert (end["event"], end["model"]["name"]) == ("study_ended", "digits-mlp")
    assert [trial["state"] for trial in end["study"]["trials"]].count("complete") >= 1


def test_the_distribution_has_one_name_and_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["name"] == distribution.NAME
    assert project["tool"]["hatch"]["version"]["path"] == "src/hpo/distribution.py"


def test_no_text_installs_the_package_of_somebody_else() -> None:
    """`hpo` on the package index is not this project."""
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.*"), *(ROOT / "src").rglob("*.py")]:
        if path.suffix in {".md", ".py", ".sh", ".yaml"}:
            text = path.read_text(encoding="utf-8")
            assert "hpo[" not in text, path
            assert "pip install hpo\n" not in text, path


def test_a_source_folder_runs_without_being_installed(tmp_path: Path) -> None:
    """Metadata of an installation is read for other packages only."""
    code = (
        "import importlib.metadata as m; real = m.Distribution.from_name.__func__\n"
        "def found(cls, name):\n    if 'hpo' in name: raise m.PackageNotFoundError(name)\n    return real(cls, name)\n"
        "m.Distribution.from_name = classmethod(found)\n"
        "import hpo; from hpo.tracking.runs import environment_tags\n"
        "assert environment_tags('x')['version.hpo'] == hpo.__version__; print(hpo.__version__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == distribution.VERSION, done.stderr
