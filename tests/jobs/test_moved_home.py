"""A home can move, and a copy is not the original: each command works in its own folder and leaves all others alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.database import open_read_only
from hpo.errors import StoreError
from hpo.events import Notice
from hpo.execute.run_study import run_study
from hpo.home import Home, remove
from hpo.jobs.clean import clean
from hpo.jobs.doctor import doctor
from hpo.jobs.promote import promote
from hpo.jobs.rerun import rerun
from hpo.jobs.transfer import export_study, import_study
from hpo.predict import load_model
from hpo.relocation import relocate
from hpo.spec.load import load_study
from hpo.storage.reader import read_study
from hpo.tracking.models import delete_artifacts
from hpo.tracking.registry import fetch, resolve, set_alias, versions
from hpo.tracking.store import connect
from kept_study import run_of

QUICK = [
    "training.epochs=1",
    "training.precision=float32",
    "search.pruner=none",
    "search.sampler=random",
]
# A run that dies as its last trial has ended: the weights lie in its work folder, and there is no model yet.
KILLED = """
import os, sys
from hpo.execute.run_study import run_study
from hpo.execute.subscribers.model_retention import ModelRetention
from hpo.events import TrialEnded
from hpo.spec.load import load_study

def watch(event):
    if isinstance(event, TrialEnded) and event.result.number == 1:
        os._exit(9)

ModelRetention.collect = lambda self, *, wait=False: None
run_study(load_study("digits-mlp", overrides=sys.argv[2:]), trials=2, workers=0, home=sys.argv[1], watch=watch)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    """An environment with prepared data of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("MLFLOW_TRACKING_URI", "HPO_STORAGE", "HPO_HOME"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def killed(data: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose run was killed at the end of two trials."""
    folder = tmp_path_factory.mktemp("killed") / "original"
    folder.mkdir()
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder), *QUICK], check=False)
    assert ended.returncode == 9
    assert (folder / "mlruns" / "work" / "digits-mlp" / "0" / "weights.safetensors").is_file()
    return folder


def run(folder: Path, trials: int = 2) -> list[str]:
    """Run the study there; returns the lines for the user."""
    notices: list[str] = []
    run_study(
        load_study("digits-mlp", overrides=QUICK),
        trials=trials,
        workers=0,
        home=folder,
        watch=lambda event: notices.append(event.text) if isinstance(event, Notice) else None,
    )
    return notices


def content(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, byte for byte."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def plain_mlflow(folder: Path, uri: str) -> str:
    """The address of the files of a model that MLflow loads without hpo, in a process of its own."""
    code = (
        "import mlflow, sys; mlflow.set_tracking_uri(sys.argv[1]); mlflow.pyfunc.load_model(sys.argv[2]);"
        "name, alias = sys.argv[2].removeprefix('models:/').split('@');"
        "print(mlflow.MlflowClient().get_model_version_download_uri(name, "
        "mlflow.MlflowClient().get_model_version_by_alias(name, alias).version))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, Home.at(folder).tracking_uri, uri], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_no_command_in_a_copy_touches_the_original(killed: Path, tmp_path: Path) -> None:
    original, finished, archive = content(killed), tmp_path / "finished", tmp_path / "study.zip"
    shutil.copytree(killed, finished)
    notices = run(finished)
    assert content(killed) == original
    assert any(line.startswith(f"{finished / 'mlruns'} is a copy of {killed / 'mlruns'}") for line in notices)
    assert [version.version for version in versions(Home.at(finished))] == [1]
    promote("digits-mlp", home=finished, force=True)

    kept, copy = content(finished), tmp_path / "copy"
    shutil.copytree(finished, copy)
    commands = {
        "clean": lambda: clean(home=copy, keep_models="best:1", keep_figures="none", really=True),
        "run": lambda: run(copy, trials=3),
        "doctor": lambda: doctor(home=copy, fix=True),
        "promote": lambda: promote("digits-mlp", home=copy, force=True),
        "rerun": lambda: rerun("digits-mlp#0", home=copy),
        "export": lambda: export_study("digits-mlp", home=copy, file=archive),
        "import": lambda: import_study(archive, home=copy),
        "predict": lambda: load_model("digits-mlp", home=copy),
    }
    for name, command in commands.items():
        command()
        assert content(finished) == kept, name
    assert doctor(home=copy).well
    ids = [json.loads((place / "mlruns" / "home.json").read_text())["id"] for place in (finished, copy)]
    assert ids[0] != ids[1]
    assert len(list((copy / "mlruns" / "artifacts").glob("digits-mlp/models/*"))) >= 2


@pytest.mark.slow
def test_a_folder_renamed_after_a_kill_registers_its_model_with_the_next_run(killed: Path, tmp_path: Path) -> None:
    before, renamed = tmp_path / "before", tmp_path / "re named"
    shutil.copytree(killed, before)
    assert not doctor(home=before, fix=True).well
    before.rename(renamed)
    found = doctor(home=renamed, fix=True)
    (waiting,) = found.wrong
    assert waiting.what.startswith("2 trials have weights on the disk, but no model in MLflow")
    assert waiting.where == "digits-mlp: trial 0, 1"
    assert waiting.hint == "Log them and register the best: hpo run digits-mlp"
    with closing(sqlite3.connect(renamed / "mlruns" / "optuna.db")) as database:
        rows = database.execute("SELECT value_json FROM trial_user_attributes WHERE key = 'hpo.result'").fetchall()
    assert {json.loads(text)["folder"] for (text,) in rows} == {"0", "1"}
    run(renamed)
    assert doctor(home=renamed).well
    version = plain_mlflow(renamed, "models:/digits-mlp@challenger")
    assert (renamed / "mlruns" / "artifacts").as_uri() in version

    moved = tmp_path / "moved"
    renamed.rename(moved)
    load_model("digits-mlp", home=moved)  # the first command there
    assert (moved / "mlruns" / "artifacts").as_uri() in plain_mlflow(moved, "models:/digits-mlp@challenger")
    assert not renamed.exists()


def test_a_copy_is_told_once_and_a_move_too(kept: Home, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    moved = Home.at(shutil.move(kept.root.parent, tmp_path / "moved"))
    versions(moved)
    versions(moved)
    assert [line for line in caplog.messages if "was moved to" in line] == [
        f"{kept.root} was moved to {moved.root}: the addresses in its databases were corrected."
    ]
    caplog.clear()
    copy = Home.at(shutil.copytree(moved.root.parent, tmp_path / "copy"))
    versions(copy)
    assert caplog.messages == [f"{copy.root} is a copy of {moved.root}: from now on it names its own files only."]


def test_what_lies_outside_is_never_deleted(kept: Home, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in (outside, kept.root / ".." / ".." / "outside", kept.root):
        with pytest.raises(StoreError, match="is outside") as refused:
            remove(kept.root, path)
        assert "hpo doctor --fix" in refused.value.hint
    assert outside.is_dir()
    assert kept.root.is_dir()
    link = kept.work / "link"
    link.symlink_to(outside)
    remove(kept.root, link)
    assert outside.is_dir()
    assert not link.is_symlink()


def test_an_artifact_of_a_run_outside_the_home_is_neither_written_nor_deleted(kept: Home, tmp_path: Path) -> None:
    client, run_id = connect(kept), run_of(kept, 0).info.run_id
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "dear").write_text("dear")
    with pytest.raises(StoreError, match="is outside"):
        delete_artifacts(client, outside.as_uri())
    client.log_text(run_id, "mine", "mine.txt")
    foreign = client.create_experiment("foreign", artifact_location=outside.as_uri())
    other = client.create_run(foreign).info.run_id
    with pytest.raises(StoreError, match="is outside"):
        client.log_text(other, "text", "text.txt")
    assert [path.name for path in outside.iterdir()] == ["dear"]


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder on a disk that cannot be written; root may write everywhere else."""
    if os.geteuid():
        modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
    elif subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode:
        pytest.skip("root, who may not mount here, can write everything")
    else:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
    try:
        yield
    finally:
        if os.geteuid():
            for path, mode in modes.items():
                path.chmod(mode)
        else:
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("text", ["x", "[]", '{"id": "a", "path": 7}', '{"id": 5}', "[" * 100_000])
def test_a_damaged_identity_is_as_none_and_written_again(kept: Home, text: str) -> None:
    identity = kept.root / "home.json"
    identity.write_text(text)
    relocate(kept)
    assert json.loads(identity.read_text())["path"] == str(kept.root)


def test_models_and_trials_are_read_in_a_moved_home_that_cannot_be_written(kept: Home, tmp_path: Path) -> None:
    moved = Home.at(shutil.move(kept.root.parent, tmp_path / "moved"))
    with read_only(moved.root.parent):
        (version,) = versions(moved)
        assert fetch(moved, version, tmp_path).is_relative_to(moved.artifacts)
        assert len(read_study(moved, "formula").trials) == 4
        with pytest.raises(StoreError):
            set_alias(moved, "formula", "champion", 1)
        assert version == resolve(moved, "formula")


@pytest.mark.slow
def test_what_only_reads_works_in_a_moved_home_that_cannot_be_written(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, moved, image = tmp_path / "before", tmp_path / "moved", tmp_path / "one.png"
    shutil.copytree(killed, before)
    run(before)
    before.rename(moved)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(image)
    monkeypatch.chdir(tmp_path)
    commands = {
        "status": "digits-mlp",
        "trials digits-mlp": "complete",
        "models": "challenger",
        f"predict digits-mlp {image}": "one.png",
        "report digits-mlp": "digits-mlp.html",
        "compare digits-mlp#0 digits-mlp#1": "accuracy",
        "doctor": "moved or copied",
    }
    with read_only(moved):
        for command, expected in commands.items():
            done = CliRunner().invoke(app, [*command.split(), "--home", str(moved)], env={"COLUMNS": "200"})
            assert done.exit_code == (1 if command == "doctor" else 0), (command, done.output)
            assert expected in done.output, command
        page = (tmp_path / "digits-mlp.html").read_text()
        assert "could not be read" not in page
        with pytest.raises(StoreError, match=r"readonly|read-only|cannot be written"):
            set_alias(Home.at(moved), "digits-mlp", "champion", 1)
    assert [version.aliases for version in versions(Home.at(moved))] == [("challenger",)]


def test_what_a_killed_process_has_left_in_the_log_of_a_database_is_read_on_a_read_only_disk(tmp_path: Path) -> None:
    folder, kept = tmp_path / "disk", tmp_path / "kept"
    folder.mkdir()
    kept.mkdir()
    with closing(sqlite3.connect(kept / "a.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE t (x)")
        database.execute("INSERT INTO t VALUES (7)")
        database.commit()
        for name in ("a.db", "a.db-wal"):
            shutil.copy(kept / name, folder / name)
    with read_only(folder), closing(open_read_only(folder / "a.db")) as database:
        assert database.execute("SELECT x FROM t").fetchall() == [(7,)]
