"""Studies moved between stores: all that belongs to them, once."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import StoreError
from hpo.home import Home
from hpo.jobs.doctor import doctor
from hpo.jobs.stop import stop_study
from hpo.jobs.transfer import export_study, import_study
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.storage.reader import read_study
from hpo.tracking.champions import champions, record_champion
from hpo.tracking.ledger import announce_opening, complete_opening, image_digests, name_images
from hpo.tracking.registry import resolve, set_alias
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker
from kept_study import go_on, kept_spec, left, stored
from whole_study import tracked, whole

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def rich(kept: Home) -> Home:
    """The kept study with a champion, a challenger, an opening, odd metrics and a trial whose supervisor died."""
    study = stored(kept)
    tracker = Tracker(kept)
    tracker.register(study, 1)
    champion = resolve(kept, "formula/1")
    look = announce_opening(kept, study, model=champion, trial=0, purpose="promote")
    complete_opening(kept, study, look, {"test_accuracy": 0.75})
    announce_opening(kept, study, model=champion, trial=1, purpose="evaluate")
    record_champion(kept, "formula", 1, why="there was no champion before")
    set_alias(kept, "formula", "champion", 1, tags={"why": "better"}, scores={"test_accuracy": 0.75})
    client = connect(kept)
    run = client.search_runs([client.get_experiment_by_name("formula").experiment_id], "tags.`hpo.trial` = '2'")[0]
    for step, value in enumerate([float("nan"), float("inf"), 0.1 + 0.2]):
        client.log_metric(run.info.run_id, "odd", value, step=step)
    client.log_text(run.info.run_id, "two words", "a folder/näme with blanks.txt")
    client.update_registered_model("formula", description="Digits.")
    going = go_on(kept)
    candidate = going.ask(budget=6, worker="w")
    going.report(candidate.number, 1, 0.25)
    going.close()
    return kept


@pytest.fixture
def stores(tmp_path: Path, empty_stores: Path, database: str) -> Home:
    """Stores on servers, as far as SQLite can stand for MLflow's."""
    folder = tmp_path / "shared"
    folder.mkdir()
    shutil.copyfile(empty_stores / "mlruns" / "mlflow.db", tmp_path / "elsewhere.db")
    tracking = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    (folder / "hpo.toml").write_text(f'storage = "{database}"\ntracking = "{tracking}"\n', encoding="utf-8")
    home = Home.find(folder).create()
    connect(home).create_experiment("formula", artifact_location=(tmp_path / "elsewhere").as_uri())
    return home


@pytest.fixture
def other(empty_stores: Path, tmp_path: Path) -> Path:
    """A folder to move to."""
    return Path(shutil.copytree(empty_stores, tmp_path / "other"))


def _folder(home: Home) -> Path:
    return home.root.parent


def _move(home: Home, target: Path, file: Path) -> Home:
    export_study("formula", home=_folder(home), file=file)
    import_study(file, home=target)
    return Home.find(target)


@pytest.mark.slow
def test_study_is_the_same_on_shared_stores_and_back(rich: Home, stores: Home, other: Path, tmp_path: Path) -> None:
    _move(rich, _folder(stores), tmp_path / "one.zip")
    back = _move(stores, other, tmp_path / "two.zip")
    study = stored(rich)
    first = whole(rich, study)
    assert len(first["runs"]) == 5
    assert len(first["versions"]) == 2
    assert len(first["openings"]) == 2
    assert whole(stores, study) == first
    assert whole(back, study) == first
    assert [resolve(back, f"formula/{number}").aliases for number in (1, 2)] == [("champion",), ("challenger",)]


@pytest.mark.slow
def test_second_import_changes_nothing(rich: Home, other: Path, tmp_path: Path) -> None:
    there = _move(rich, other, tmp_path / "study.zip")
    before = whole(there, stored(there))
    again = import_study(tmp_path / "study.zip", home=other)
    assert (again.relation, again.trials, again.runs, again.models, again.versions) == ("same", 0, 0, 0, 0)
    assert whole(there, stored(there)) == before
    client = connect(there)
    for run in client.search_runs([client.get_experiment_by_name("formula").experiment_id]):
        client.delete_tag(run.info.run_id, "hpo.moved")  # as if each had been cut short at its end
    import_study(tmp_path / "study.zip", home=other)
    assert whole(there, stored(there)) == before


@pytest.mark.slow
def test_study_comes_home_with_what_it_did_meanwhile(rich: Home, other: Path, tmp_path: Path) -> None:
    there = _move(rich, other, tmp_path / "study.zip")
    going = go_on(there)
    tracker = Tracker(there)
    candidate = going.ask(budget=6, worker="w")
    tracker.reconcile(going.result(), go_on_spec := going._spec)
    tracker.start_trial(candidate, go_on_spec.with_values(candidate.parameters), worker="w")
    result = TrialResult(candidate.number, TrialState.COMPLETE, 0.95, 1, scores={"valid_accuracy": 0.95})
    going.tell(result)
    tracker.end_trial(going.result().trials[candidate.number].result)
    tracker.keep_model(candidate.number, left(tmp_path / "left"))
    tracker.register(going.result(), candidate.number)
    going.close()
    export_study("formula", home=other, file=tmp_path / "later.zip")
    assert import_study(tmp_path / "study.zip", home=other).relation == "ahead"
    back = import_study(tmp_path / "later.zip", home=_folder(rich), move_aliases=True)
    assert (back.relation, back.notes) == ("behind", ())
    assert whole(rich, stored(rich)) == whole(there, stored(there))
    assert resolve(rich, "formula@challenger").version == 3


def test_moved_study_is_in_order_and_reads_as_before(kept: Home, other: Path, tmp_path: Path) -> None:
    there = _move(kept, other, tmp_path / "study.zip")
    assert read_study(there, "formula") == read_study(kept, "formula")
    assert doctor(home=other).wrong == ()


@pytest.mark.slow
def test_number_of_a_version_stays_though_an_earlier_one_was_deleted(rich: Home, other: Path, tmp_path: Path) -> None:
    client = connect(rich)
    client.delete_registered_model_alias("formula", "champion")
    client.delete_model_version("formula", "1")
    there = _move(rich, other, tmp_path / "study.zip")
    assert resolve(there, "formula").version == 2
    assert tracked(there, "formula") == tracked(rich, "formula")


def test_images_of_openings_come_along_and_those_that_the_model_was_trained_on(
    kept: Home, other: Path, tmp_path: Path
) -> None:
    study, tested, trained = stored(kept), [bytes([i] * 16) for i in range(9)], [bytes([i] * 16) for i in range(9, 40)]
    look = announce_opening(kept, study, model=resolve(kept, "formula"), trial=0, purpose="promote")
    look = name_images(kept, study, look, tested, trained=trained)
    there = _move(kept, other, tmp_path / "study.zip")
    assert not (there.root / "test_images").exists()
    assert image_digests(there, look.images) == frozenset(tested)
    assert image_digests(there, look.trained) == frozenset(trained)


def test_running_study_is_not_exported(kept: Home, tmp_path: Path) -> None:
    going = go_on(kept)
    with pytest.raises(StoreError, match="it is running") as error:
        export_study("formula", home=_folder(kept), file=tmp_path / "study.zip")
    assert "hpo stop formula" in error.value.hint
    going.close()
    assert not (tmp_path / "study.zip").exists()


def test_running_study_is_not_replaced(kept: Home, other: Path, tmp_path: Path) -> None:
    there = _move(kept, other, tmp_path / "study.zip")
    going = go_on(there)
    with pytest.raises(StoreError, match="it is running"):
        import_study(tmp_path / "study.zip", home=other)
    going.close()
    assert stored(there).trials == stored(kept).trials


def test_what_waits_on_the_disk_to_be_logged_is_told(kept: Home, tmp_path: Path) -> None:
    going = go_on(kept)
    candidate = going.ask(budget=6, worker="w")
    waiting = left(kept.work / "formula" / str(candidate.number))
    going.tell(TrialResult(candidate.number, TrialState.COMPLETE, 0.95, 1, folder=str(waiting)))
    going.close()
    (note,) = export_study("formula", home=_folder(kept), file=tmp_path / "study.zip").notes
    assert f"work of trials {candidate.number} on the disk" in note


def _commits(file: Path, home: Path, counted: Any, last: int) -> None:
    """Import in this process, which dies instead of its commit number `last`; counted tells how many there were."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    @event.listens_for(Engine, "commit")
    def count(connection: Any) -> None:
        counted.value += 1
        if counted.value == last:
            os.kill(os.getpid(), signal.SIGKILL)

    import_study(file, home=home)
    os._exit(0)


def _die(file: Path, home: Path, last: int) -> int:
    """The commits of an import that dies at one of them; 0: at none."""
    counted = FORK.Value("i", 0)
    child = FORK.Process(target=_commits, args=(file, home, counted, last))
    child.start()
    child.join(120)
    assert child.exitcode in (0, -signal.SIGKILL)
    return counted.value


def _killed_imports(rich: Home, empty_stores: Path, folder: Path, stops: Callable[[int], list[list[int]]]) -> None:
    """Import with kills at the commits that stops(commits in all) names, a list for each target; then to the end."""
    file = folder / "study.zip"
    export_study("formula", home=_folder(rich), file=file)
    wanted = whole(rich, stored(rich))
    total = _die(file, Path(shutil.copytree(empty_stores, folder / "counted")), 0)
    for place, kills in enumerate(stops(total)):
        target = Path(shutil.copytree(empty_stores, folder / str(place)))
        for kill in kills:
            _die(file, target, kill)
        import_study(file, home=target)
        assert whole(Home.find(target), stored(Home.find(target))) == wanted, kills


@pytest.mark.slow
def test_killed_imports_are_completed_by_the_next(rich: Home, empty_stores: Path, tmp_path: Path) -> None:
    choice = random.Random(0)  # noqa: S311 - a choice of tests
    _killed_imports(rich, empty_stores, tmp_path, lambda total: [sorted(choice.sample(range(1, total), 6))])


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_import_killed_at_any_commit_is_completed_by_the_next(rich: Home, empty_stores: Path, tmp_path: Path) -> None:
    _killed_imports(rich, empty_stores, tmp_path, lambda total: [[kill] for kill in range(1, total)])


def test_another_study_of_the_name_gets_no_generation_and_goes_on(kept: Home, other: Path, tmp_path: Path) -> None:
    mine = Home.find(other)
    open_study(mine, kept_spec(4), data_digest=stored(kept).data_digest).close()
    open_study(kept, kept_spec(9), data_digest=stored(kept).data_digest, fresh=True).close()
    for title in ("formula~2", "formula~1"):
        export_study(title, home=_folder(kept), file=tmp_path / "study.zip")
        with pytest.raises(StoreError, match=r"another study|not generations of one") as error:
            import_study(tmp_path / "study.zip", home=other)
        assert "--home" in error.value.hint
    assert whole(mine, stored(mine)) | {"openings": []} == whole(mine, stored(mine))
    assert (stored(mine).title, len(stored(mine).trials), tracked(mine, "formula")["runs"]) == ("formula", 0, [])


def test_generations_of_one_study_move_in_any_order(kept: Home, other: Path, tmp_path: Path) -> None:
    open_study(kept, kept_spec(9), data_digest=stored(kept).data_digest, fresh=True).close()
    for title in ("formula~2", "formula~1"):
        export_study(title, home=_folder(kept), file=tmp_path / "study.zip")
        assert import_study(tmp_path / "study.zip", home=other).relation == "absent"
    assert read_study(Home.find(other), "formula~1") == read_study(kept, "formula~1")


def _foreign(home: Home) -> None:
    """A registered model of the study's name that has nothing to do with it, and is the champion."""
    client = connect(home)
    model = client.create_logged_model(client.create_experiment("elsewhere", (home.artifacts / "x").as_uri()), "m")
    client.create_registered_model("formula")
    old = {"hpo.registered": "1000"}  # long before the one that is imported
    client.create_model_version("formula", model.artifact_location, tags=old)
    record_champion(home, "formula", 1, why="it was measured")
    set_alias(home, "formula", "champion", 1)


def test_no_alias_moves_to_an_imported_version_without_the_flag(kept: Home, other: Path, tmp_path: Path) -> None:
    record_champion(kept, "formula", 1, why="it is worse")
    set_alias(kept, "formula", "champion", 1)
    set_alias(kept, "formula", "challenger", 1)  # as earlier versions left it
    export_study("formula", home=_folder(kept), file=tmp_path / "study.zip")
    mine = Home.find(other).create()
    _foreign(mine)
    first, second = (import_study(tmp_path / "study.zip", home=other) for _ in range(2))
    assert first.versions == 1
    assert [note.partition(";")[0] for note in second.notes] == [
        "alias challenger is not set",
        "alias champion stays at version 1",
    ]
    assert connect(mine).get_registered_model("formula").aliases == {"champion": 1}
    assert [(term.version, term.why) for term in champions(mine, "formula")] == [(1, "it was measured")]
    assert not import_study(tmp_path / "study.zip", home=other, move_aliases=True).notes
    assert resolve(mine, "formula@champion").version == resolve(mine, "formula@challenger").version == 2
    assert champions(mine, "formula")[-1].version == 2


def test_missing_file_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such file") as error:
        import_study(tmp_path / "study.zip", home=tmp_path / "target")
    assert "hpo export" in error.value.hint


def test_export_into_a_folder_that_is_not_there_is_one_error(kept: Home, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be written"):
        export_study("formula", home=_folder(kept), file=tmp_path / "no" / "study.zip")


def test_each_generation_is_exported_by_its_own_name(kept, tmp_path):
    again = open_study(kept, kept_spec(9), data_digest=stored(kept).data_digest, fresh=True)
    assert again.title == "formula~2"
    again.close()
    place = kept.root.parent
    titles = {name: export_study(name, home=place, file=tmp_path / "x.zip") for name in ("formula~1", "formula~2")}
    assert {name: (done.title, done.trials) for name, done in titles.items()} == {
        "formula~1": ("formula", 4),
        "formula~2": ("formula~2", 0),
    }
    assert export_study("formula", home=place, file=tmp_path / "x.zip").title == "formula~2"
    assert stop_study("formula~1", home=place).title == "formula"
