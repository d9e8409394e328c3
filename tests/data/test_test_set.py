"""No code path leads from a trial to the test part."""

from __future__ import annotations

import ast
import functools
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hpo
from hpo.data.prepare import prepare
from hpo.data.test_set import open_test
from hpo.errors import DataError
from hpo.execute.workers.task import Task
from hpo.records import DataCard
from hpo.spec.load import load_study

SOURCE = Path(hpo.__file__).parent

# Trains a task in a process of its own, which notes every file that is opened in it.
TRAINING = """
import pickle, sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
from hpo.execute.workers.task import train_task
task = pickle.loads(Path(sys.argv[1]).read_bytes())
training = train_task(task, "cpu")
messages = [next(training)]
while not hasattr(messages[-1], "result"):
    messages.append(training.send(True))
*epochs, ended = messages
assert ended.result.state == "complete", ended.result.reason
assert any("development_images.npy" in path for path in opened)
sealed = [path for path in opened if sys.argv[2] in str(Path(path).resolve())]
print(len(epochs), "hpo.data.test_set" in sys.modules, sealed)
"""


@pytest.fixture
def card(digits_cache: Path, tmp_path: Path) -> DataCard:
    """The digits in a folder that the test may change."""
    spec = load_study("digits-mlp")
    return prepare(spec.data, spec.split, cache=Path(shutil.copytree(digits_cache, tmp_path / "cache")))


@pytest.fixture
def task(card: DataCard, tmp_path: Path) -> Task:
    setup = load_study("digits-mlp", overrides={"training.epochs": 2, "training.precision": "float32"}).setup
    return Task(0, setup, 7, card, str(tmp_path / "left"))


def test_what_a_worker_gets_holds_no_way_to_the_test_part(card: DataCard, task: Task) -> None:
    assert Path(card.test_folder).is_dir()
    assert (task.data.test_folder, task.data.folder) == ("", card.folder)
    assert card.test_folder.encode() not in pickle.dumps(task)
    with pytest.raises(DataError, match="sealed"):
        open_test(task.data, lambda images: images)


@pytest.mark.parametrize("left", [pytest.param("garbage", marks=pytest.mark.slow), "nothing"])
def test_a_training_opens_no_file_of_the_test_part(card: DataCard, task: Task, tmp_path: Path, left: str) -> None:
    folder = Path(card.test_folder)
    for file in folder.iterdir():
        file.write_bytes(b"garbage")
    if left == "nothing":
        folder.rename(tmp_path / "away")
    (tmp_path / "task").write_bytes(pickle.dumps(task))
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "task"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("2 False []\n", 0), done.stderr


@functools.cache
def _modules() -> dict[str, ast.Module]:
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text("utf-8")) for path in SOURCE.rglob("*.py")}


def _importers(module: str) -> dict[str, set[str]]:
    """File -> the names that it imports from a module."""
    found: dict[str, set[str]] = {}
    for file, tree in _modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == module:
                found.setdefault(file, set()).update(alias.name for alias in node.names)
            if isinstance(node, ast.ImportFrom) and f"{node.module}.{node.names[0].name}" == module:
                found.setdefault(file, set()).add("*")
            if isinstance(node, ast.Import) and any(alias.name == module for alias in node.names):
                found.setdefault(file, set()).add("*")
    return found


def test_one_function_opens_the_test_part_and_it_writes_the_ledger() -> None:
    assert _importers("hpo.data.test_set") == {
        "jobs/shared/test_set_access.py": {"open_test", "Measured", "digests_of_test", "ledger_folder"},
        "jobs/shared/image_history.py": {"digests_of_test", "ledger_folder"},  # counts only leave it
        "data/overview.py": {"duplicates_of_test", "near_duplicates_of_test"},  # how many, and nothing else
        "data/split.py": {"count_classes"},  # how many, and nothing else
    }
    writers = {file for file, names in _importers("hpo.tracking.ledger").items() if "announce_opening" in names}
    assert writers == {"jobs/shared/test_set_access.py"}
    assert _importers("hpo.jobs.shared.test_set_access") == {
        "jobs/compare.py": {"open_sealed", "count_test_images"},
        "jobs/evaluate.py": {"measure"},
        "jobs/promote.py": {"measure", "test_scores"},
    }


def test_nobody_but_its_keeper_knows_where_the_test_part_lies() -> None:
    knowing = {
        file
        for file, tree in _modules().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "test_folder")
        or (isinstance(node, ast.Constant) and node.value in ("test_images.npy", "test_labels.npy"))
    }
    assert knowing == {"data/test_set.py"}
