"""Break a store in each way there is: it is told, repaired where it can be, and no result is lost."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from hpo.errors import StoreError
from hpo.execute.run_study import lost_note
from hpo.home import Home
from hpo.jobs import stores
from hpo.jobs.doctor import doctor
from hpo.records import TrialState
from hpo.storage.optuna_storage import open_storage
from hpo.tracking.ledger import SET_ASIDE, announce_opening, count_set_aside, openings
from hpo.tracking.registry import resolve, versions
from hpo.tracking.runs import find_parent
from hpo.tracking.store import connect
from kept_study import go_on, make_kept_study, result_of, run_of, stored, tracked


def where(home: Home) -> Path:
    return home.root.parent


def told(home: Home) -> str:
    """What is wrong, in one text."""
    return "\n".join(f"{finding.what} | {finding.where}" for finding in doctor(home=where(home)).wrong)


def mended(home: Home) -> None:
    """Repair; everything that was wrong is right then, and a second look agrees."""
    found = doctor(home=where(home), fix=True)
    assert found.fixed
    assert found.well, found.wrong
    assert doctor(home=where(home)).well


def write(home: Home, statement: str, *values: object, file: str = "mlflow.db") -> None:
    with closing(sqlite3.connect(home.root / file)) as database, database:
        database.execute(statement, values)


@pytest.fixture
def untouched(kept: Home):
    """After the repair the results are those of before: every trial, every run, every metric, every version."""
    trials, runs, registered = stored(kept).trials, tracked(kept), versions(kept)
    yield
    after = stored(kept).trials
    assert after[: len(trials)] == trials
    assert {name: run for name, run in tracked(kept).items() if name in runs} == runs
    assert versions(kept) == registered


def test_a_store_in_order_is_well_and_looking_changes_no_file(kept):
    def files():
        return {
            path: path.read_bytes()
            for path in kept.root.rglob("*")
            if path.is_file() and not path.name.endswith(("-shm", "-wal"))
        }

    before = files()
    assert doctor(home=where(kept)).well, told(kept)
    assert files() == before


def test_looking_into_an_empty_folder_makes_nothing(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert doctor(home=empty, fix=True).well
    assert not list(empty.iterdir())


def test_trials_of_a_dead_supervisor_are_tried_again_and_their_runs_ended(kept, untouched):
    study = go_on(kept)
    candidate = study.ask(budget=6, worker="worker 0")
    assert doctor(home=where(kept)).well  # it lives
    study.close()
    assert "nobody runs it" in told(kept)
    assert f"trial {candidate.number}" in told(kept)
    mended(kept)
    trials = stored(kept).trials
    assert trials[candidate.number].state is TrialState.STOPPED
    assert trials[-1].state is TrialState.WAITING
    assert tracked(kept)[f"trial {candidate.number}"][:2] == ("stopped", "KILLED")


def test_nothing_is_repaired_while_a_supervisor_holds_the_study(kept):
    study = go_on(kept)
    (kept.artifacts / "other" / "ab" / "artifacts").mkdir(parents=True)
    (kept.work / "formula" / "3").mkdir(parents=True)
    found = doctor(home=where(kept), fix=True)
    assert not found.fixed
    assert (kept.artifacts / "other" / "ab").is_dir()
    assert (kept.work / "formula" / "3").is_dir()
    assert any("formula is running" in note for note in found.notes)
    study.close()
    mended(kept)
    assert not (kept.work / "formula" / "3").exists()


def test_runs_that_are_missing_are_written_again(kept, untouched):
    run = run_of(kept, 1)
    write(kept, "DELETE FROM tags WHERE run_uuid = ?", run.info.run_id)
    assert "1 trials have ended, but have no run in MLflow | formula: trial 1" in told(kept)
    mended(kept)
    assert run_of(kept, 1).data.metrics["objective"] == 0.8
    assert run_of(kept, 1).info.run_id != run.info.run_id


def test_a_study_without_any_run_is_written_again_but_for_its_models(kept, kept_template):
    before = tracked(Home.find(kept_template))
    (kept.root / "mlflow.db").unlink()  # before this process has opened it
    assert "MLflow's database is gone" in told(kept)
    mended(kept)
    after = tracked(kept)
    assert after["formula"][1] == "KILLED"  # until the next hpo run
    del before["formula"]
    assert {name: after[name] for name in before} == before


def test_runs_that_say_otherwise_than_their_trials_are_put_right(kept):
    before = tracked(kept)
    client = connect(kept)
    client.set_tag(run_of(kept, 0).info.run_id, "hpo.state", "running")
    client.update_run(run_of(kept, 0).info.run_id, status="RUNNING")
    client.update_run(run_of(kept, 3).info.run_id, status="RUNNING")
    assert "2 runs in MLflow have another state" in told(kept)
    mended(kept)
    assert {name: run[:2] for name, run in tracked(kept).items()} == {name: run[:2] for name, run in before.items()}
    assert tracked(kept)["trial 0"][2] == before["trial 0"][2]


def test_a_studys_run_that_nobody_runs_is_ended(kept):
    client = connect(kept)
    parent = next(run for name, run in _runs(kept).items() if name == "formula")
    client.update_run(parent.info.run_id, status="RUNNING")
    assert "nobody runs the study" in told(kept)
    mended(kept)
    assert tracked(kept)["formula"][1] == "KILLED"


def _runs(home: Home):
    client = connect(home)
    experiment = client.get_experiment_by_name("formula")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_runs_of_no_trial_are_marked_and_none_is_deleted(kept, untouched):
    client = connect(kept)
    number = client.create_experiment("gone")
    tags = {"hpo.kind": "trial", "hpo.study": "gone", "hpo.trial": "0"}
    lost = client.create_run(number, tags=tags)
    parent = _runs(kept)["formula"].info
    extra = client.create_run(
        parent.experiment_id,
        run_name="extra",
        tags={**tags, "hpo.study": "formula", "hpo.trial": "99", "mlflow.parentRunId": parent.run_id},
    )
    assert "a study that does not exist; 1 RUNNING | gone" in told(kept)
    assert "trials that the storage does not have, or has a run of; 1 RUNNING | formula" in told(kept)
    mended(kept)
    for run in (lost, extra):
        assert client.get_run(run.info.run_id).info.status == "KILLED"
        assert client.get_run(run.info.run_id).data.tags["hpo.orphan"] == "true"


def test_runs_that_somebody_deleted_are_no_fault(kept):
    connect(kept).delete_run(run_of(kept, 2).info.run_id)
    assert doctor(home=where(kept)).well


def test_artifacts_that_are_missing_are_written_again(kept, untouched):
    folder = kept.artifacts / "formula" / run_of(kept, 0).info.run_id / "artifacts"
    failed = kept.artifacts / "formula" / run_of(kept, 3).info.run_id / "artifacts"
    parent = kept.artifacts / "formula" / _runs(kept)["formula"].info.run_id / "artifacts"
    (folder / "confusion.json").unlink()
    shutil.rmtree(failed)
    (parent / "study.yaml").unlink()
    assert "3 artifacts are missing" in told(kept)
    mended(kept)
    assert "[3, 1]" in (folder / "confusion.json").read_text().replace("\n", "").replace("  ", "").replace(
        "3,1", "3, 1"
    )
    assert (failed / "traceback.txt").read_text() == "Traceback of the worker"
    assert (parent / "study.yaml").is_file()


def test_a_model_whose_files_are_gone_is_taken_off_its_run(kept, untouched):
    model = run_of(kept, 1).data.tags["hpo.model"].removeprefix("models:/")
    shutil.rmtree(kept.artifacts / "formula" / "models" / model)
    assert f"a run names a model whose files are gone | formula: trial 1, models:/{model}" in told(kept)
    mended(kept)
    assert "hpo.model" not in run_of(kept, 1).data.tags


def test_a_registered_model_whose_files_are_gone_is_told_and_stays_registered(kept, untouched):
    model = run_of(kept, 0).data.tags["hpo.model"].removeprefix("models:/")
    shutil.rmtree(kept.artifacts / "formula" / "models" / model)
    found = doctor(home=where(kept), fix=True)
    assert [finding.what for finding in found.wrong] == ["a registered model's files are gone"]
    assert "formula version 1 @challenger" in found.wrong[0].where
    assert "hpo.model" in run_of(kept, 0).data.tags


def test_folders_that_nobody_owns_are_set_aside_and_work_is_removed(kept, untouched):
    lost = kept.artifacts / "formula" / "0123456789abcdef0123456789abcdef" / "artifacts"
    lost.mkdir(parents=True)
    (lost / "weights").write_text("dear")
    for number in (3, 77):
        (kept.work / "formula" / str(number)).mkdir(parents=True)
    (kept.work / "nobody" / "0").mkdir(parents=True)
    for precious in ("formula/checkpoints/search-1-2.pt", "formula/2/result.json", "other/1/result.json"):
        (kept.work / precious).parent.mkdir(parents=True)
        (kept.work / precious).touch()
    assert "1 artifact folders that no run" in told(kept)
    assert "3 folders of work" in told(kept)
    mended(kept)
    aside = kept.root / "aside" / "formula" / "0123456789abcdef0123456789abcdef" / "artifacts" / "weights"
    assert aside.read_text() == "dear"
    left = {str(path.relative_to(kept.work)) for path in kept.work.rglob("*") if path.is_file()}
    assert left == {"formula/checkpoints/search-1-2.pt", "formula/2/result.json", "other/1/result.json"}


def test_what_a_complete_trial_left_waits_for_its_model_to_be_logged(kept):
    folder = kept.work / "formula" / "4"
    study = go_on(kept)
    candidate = study.ask(budget=6, worker="worker 0")
    folder.mkdir(parents=True)
    study.tell(replace(result_of(candidate.number, TrialState.COMPLETE, 0.95), folder=str(folder)))
    study.close()
    mended(kept)
    assert folder.is_dir()


def test_stale_leases_and_locks_are_removed(kept, untouched):
    stale = kept.locks / "lease-0.lock"
    for path in (stale, kept.locks / "gone.ask.lock"):
        path.touch()
        os.utime(path, (0, 0))
    assert "2 lock files of dead supervisors" in told(kept)
    mended(kept)
    assert not stale.exists()


def test_a_moved_project_is_told_and_its_places_rewritten_after_a_copy(kept, untouched, tmp_path):
    moved = Home.find(shutil.move(where(kept), tmp_path / "else where"))
    assert "was moved or copied" in told(moved)
    mended(moved)
    assert len(list(moved.root.glob("mlflow.db.before-move-*"))) == 1
    client = connect(moved)
    version = client.get_model_version("formula", "1")
    assert version.source.startswith((moved.artifacts / "formula").as_uri())
    assert client.list_artifacts(run_of(moved, 0).info.run_id)
    shutil.move(where(moved), where(kept))
    connect.cache_clear()
    doctor(home=where(kept), fix=True)


@pytest.mark.parametrize(("file", "package"), [("mlflow.db", "mlflow"), ("optuna.db", "optuna")])
def test_schemas_of_other_versions_are_told_with_the_command(kept, file, package):
    known, head = stores._revisions(package)
    older = sorted(known - {head})[0]
    write(kept, "UPDATE alembic_version SET version_num = ?", older, file=file)
    found = doctor(home=where(kept))
    assert f"written by an older {package}" in found.wrong[0].what
    assert "hpo store upgrade" in found.wrong[0].hint
    write(kept, "UPDATE alembic_version SET version_num = 'ffffffffffff'", file=file)
    assert f"written by a newer {package}" in told(kept)
    write(kept, "UPDATE alembic_version SET version_num = ?", head, file=file)
    assert doctor(home=where(kept)).well


@pytest.mark.parametrize("file", ["mlflow.db", "optuna.db"])
def test_a_damaged_database_is_told_and_nothing_is_repaired_by_it(kept, file):
    path = kept.root / file
    whole = path.read_bytes()
    for name in (f"{file}-wal", f"{file}-shm"):
        (kept.root / name).unlink(missing_ok=True)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + b"\x5a" * 40_000 + whole[middle + 40_000 :])
    assert "damaged" in told(kept) or "cannot be read" in told(kept)
    path.write_bytes(b"this is no database, but a text " * 100)
    found = doctor(home=where(kept), fix=True)
    assert not found.well
    assert any("cannot be read" in finding.what for finding in found.wrong)
    assert not any("no run" in finding.what or "no study" in finding.what for finding in found.fixed)


def test_an_emptied_study_storage_beside_a_full_ledger_is_told(kept):
    study = stored(kept)
    version = versions(kept)[0]
    announce_opening(kept, study, model=version, trial=0, purpose="promote")
    assert doctor(home=where(kept)).well
    for path in kept.root.glob("optuna.db*"):
        path.unlink()
    open_storage(kept).close()
    (lost,) = [finding for finding in doctor(home=where(kept), fix=True).wrong if "ledger" in finding.what]
    assert lost.what == "the ledger has 1 test opening of studies that the study storage does not have"
    assert lost.where == f"formula: {kept.root / 'optuna.db'}"
    assert "Restore it from a copy" in lost.hint
    assert lost_note(kept, study) == ""
    assert "was the database emptied?" in lost_note(kept, replace(study, created=study.created + 1))


def test_damaged_tags_of_the_ledger_are_written_again_from_it_or_moved_aside(kept, untouched):
    study, client = stored(kept), connect(kept)
    look = announce_opening(kept, study, model=resolve(kept, "formula"), trial=0, purpose="promote")
    parent = find_parent(client, study).info.run_id
    (tag,) = [name for name in client.get_run(parent).data.tags if name.startswith("mlflow.hpo.test_opening.")]
    for name in (tag, "hpo.test_opening.1"):
        client.set_tag(parent, name, '{"when": "2026')
    with pytest.raises(StoreError, match="would go uncounted"):
        openings(kept, study)
    assert "2 damaged tags of test openings in MLflow" in told(kept)
    mended(kept)
    assert openings(kept, study) == [look]
    assert json.loads((kept.root / SET_ASIDE).read_text())["text"] == '{"when": "2026'
    assert count_set_aside(kept.root) == 1  # which every later opening mentions


def test_little_space_is_told(kept, monkeypatch):
    monkeypatch.setattr("hpo.jobs.doctor._LEAST_FREE_BYTES", 10**18)
    assert "nearly full" in told(kept)


def test_a_second_study_of_the_same_storage_is_looked_at_too(kept, untouched, tmp_path):
    other = Home.find(tmp_path / "second").create()
    make_kept_study(other)
    assert doctor(home=where(other)).well, told(other)
