"""What hpo clean deletes, and what it never does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.home import Home
from hpo.jobs.clean import clean
from hpo.tracking.registry import versions
from hpo.tracking.store import connect
from kept_study import go_on, run_of, stored, tracked


def files(home: Home) -> set[Path]:
    found = home.root.rglob("*")
    return {path for path in found if path.is_file() and path.suffix not in (".lock", ".db-shm", ".db-wal")}


def cleaned(home: Home, **options):
    """Show, then do: what is done is what was shown, and the showing changed nothing."""
    place = home.root.parent
    before = files(home)
    shown = clean(home=place, **options)
    assert files(home) == before
    done = clean(home=place, really=True, **options)
    assert done.waste == shown.waste
    assert not clean(home=place, **options).waste
    return done


def models(home: Home) -> set[int]:
    return {number for number in (0, 1) if "hpo.model" in run_of(home, number).data.tags}


def test_a_store_in_order_has_nothing_to_clean(kept):
    assert not clean(home=kept.root.parent, really=True).waste


def test_models_beyond_the_best_go_but_never_registered_ones(kept):
    trials, runs = stored(kept).trials, tracked(kept)
    done = cleaned(kept, keep_models="none")
    assert [(each.kind, each.what) for each in done.waste] == [("model", "trial 1")]
    assert done.bytes > 6000
    assert models(kept) == {0}
    assert [version.aliases for version in versions(kept)] == [("challenger",)]
    assert stored(kept).trials == trials
    assert tracked(kept) == runs


def test_models_among_the_best_stay(kept):
    assert not cleaned(kept, keep_models="best:2").waste
    assert models(kept) == {0, 1}


def test_pictures_go_and_models_stay(kept):
    done = cleaned(kept, keep_figures="best:1")
    assert [(each.kind, each.what, each.bytes) for each in done.waste] == [("figures", "trial 1", 1000)]
    assert models(kept) == {0, 1}


def test_an_unknown_policy_is_refused(kept):
    with pytest.raises(SpecError, match="--keep-models best: unknown policy"):
        clean(home=kept.root.parent, keep_models="best")


def test_work_of_trials_that_are_over_goes(kept):
    (kept.work / "formula" / "3").mkdir(parents=True)
    (kept.work / "formula" / "3" / "weights").write_bytes(b"w" * 500)
    done = cleaned(kept)
    assert [(each.kind, each.study, each.bytes) for each in done.waste] == [("work", "formula", 500)]


def test_what_a_killed_export_has_left_goes_but_not_what_one_is_writing(kept):
    left, foreign = (kept.root.parent / f"{name}.zip.part" for name in ("formula", "holiday"))
    left.write_bytes(b"half")
    foreign.write_bytes(b"half")
    assert not clean(home=kept.root.parent, really=True).waste
    for path in (left, foreign):
        os.utime(path, (1e9, 1e9))
    assert [(each.kind, each.what) for each in cleaned(kept).waste] == [("killed export", str(left))]
    assert foreign.exists()


def test_what_was_deleted_in_mlflow_goes_with_its_files(kept):
    client = connect(kept)
    run = run_of(kept, 3)
    client.delete_run(run.info.run_id)
    number = client.create_experiment("other", artifact_location=(kept.artifacts / "other").as_uri())
    client.log_text(client.create_run(number).info.run_id, "text", "note.txt")
    client.delete_experiment(number)
    done = cleaned(kept)
    assert sorted(each.kind for each in done.waste) == ["deleted experiment", "deleted run", "deleted run"]
    assert not (kept.artifacts / "formula" / run.info.run_id / "artifacts").exists()
    assert not list((kept.artifacts / "other").rglob("note.txt"))
    assert "trial 3" not in tracked(kept)
    assert client.get_experiment_by_name("other") is None


def test_an_experiment_with_a_registered_model_is_never_deleted_for_good(kept):
    client = connect(kept)
    client.delete_experiment(client.get_experiment_by_name("formula").experiment_id)
    clean(home=kept.root.parent, really=True)
    version = client.get_model_version("formula", "1")
    assert (Path(version.source.removeprefix("file://")) / "MLmodel").is_file()
    assert client.get_experiment_by_name("formula") is not None


def test_a_running_study_is_left_alone(kept):
    (kept.work / "formula" / "3").mkdir(parents=True)
    study = go_on(kept)
    done = clean(home=kept.root.parent, keep_models="none", keep_figures="none", really=True)
    assert not done.waste
    assert done.notes == ("formula is running: it was left alone.",)
    assert models(kept) == {0, 1}
    study.close()


def test_data_that_no_study_here_uses_goes_only_when_asked(kept, tmp_path, monkeypatch):
    cache = tmp_path / "data"
    monkeypatch.setenv("HPO_DATA", str(cache))
    digest = stored(kept).data_digest.removeprefix("sha256:")[:32]
    for name in (digest, "0" * 32):
        (cache / "prepared" / name / "development").mkdir(parents=True)
        (cache / "prepared" / name / "development" / "images.npy").write_bytes(b"i" * 100)
    (cache / "prepared" / "index").mkdir()
    (cache / "prepared" / "index" / "a.json").write_text('{"digest": "sha256:' + "0" * 64 + '"}')
    (cache / "prepared" / "index" / "b.json").write_text('{"digest": "sha256:' + digest + '"}')
    (cache / "features" / "k").mkdir(parents=True)
    (cache / "downloads").mkdir()
    assert not clean(home=kept.root.parent).waste
    done = cleaned(kept, data=True)
    assert sorted(each.kind for each in done.waste) == ["features", "index", "prepared data"]
    assert [path.name for path in (cache / "prepared").glob("*/development")] == ["development"]
    assert (cache / "prepared" / digest).is_dir()
    assert (cache / "prepared" / "index" / "b.json").is_file()
    assert (cache / "downloads").is_dir()


def test_what_doctor_set_aside_goes_only_when_asked(kept):
    (kept.root / "aside" / "formula" / "ab").mkdir(parents=True)
    assert not clean(home=kept.root.parent).waste
    assert [each.kind for each in cleaned(kept, aside=True).waste] == ["set aside"]
    assert not (kept.root / "aside" / "formula").exists()
