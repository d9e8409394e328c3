"""Nothing of a machine is committed, and what is installed is what was tested; linters are steps of .ci/run."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from code_size import circles_in

ROOT = Path(__file__).parents[1]


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines()]


def test_no_registry_address_and_no_lock_file_is_committed():
    # Written apart, so that this file does not hold them.
    registries = re.compile("|".join(["py" + "pi\\.org", "python" + "hosted", "registry\\.npm" + "js"]))
    for path in _tracked():
        assert path.name != "uv.lock"
        if path.suffix in {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ""} and path.is_file():
            assert not registries.search(path.read_text(encoding="utf-8", errors="ignore")), path


def test_pinned_versions_are_the_ones_uv_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert project["tool"]["uv"]["constraint-dependencies"] == [line for line in pinned if not line.startswith("#")]


def test_no_modules_import_one_another_not_even_inside_functions():
    assert circles_in(ROOT / "src" / "hpo") == []
