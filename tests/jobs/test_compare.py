"""Comparisons of real studies of the digits: the same images for all, and the test part only when asked for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.errors import DataError, HpoError, ModelError
from hpo.events import TrialEnded
from hpo.execute.workers.task import Task, train_task
from hpo.home import Home
from hpo.jobs.compare import compare, write_comparison
from hpo.jobs.shared.model_reference import find_model
from hpo.spec.load import parse_study
from hpo.storage.reader import read_study
from hpo.tracking.ledger import openings

DIGITS = [str(digit) for digit in range(10)]
STUDIES = {
    "ten": {},
    "wide": {},
    "parity": {"data": {"groups": {"even": DIGITS[::2], "odd": DIGITS[1::2]}}, "task": "binary"},
    "some": {"data": {"groups": {"low": DIGITS[:3], "high": DIGITS[7:]}}, "task": "binary"},
    "split": {"split": {"kind": "holdout", "share": 0.2, "by": "stratified"}},
    "folds": {"split": {"kind": "kfold"}},
}


def _save_digits(path: Path) -> None:
    """The digits with parts of their own: 1,100 train, 337 validate, 360 test for every study."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = (images * 15).astype(np.uint8).reshape(-1, 8, 8)
    parts = {"train": slice(1100), "val": slice(1100, 1437), "test": slice(1437, None)}
    arrays = {f"{part}_images": images[rows] for part, rows in parts.items()}
    np.savez(path, **arrays, **{f"{part}_labels": labels[rows] for part, rows in parts.items()})


def _train(home: Home, name: str) -> None:
    """Two trials of a study, as a run leaves them: the better one's model is kept and registered."""
    from hpo.data.prepare import prepare
    from hpo.data.split import split_card
    from hpo.models import export_program
    from hpo.search.lifecycle import open_study
    from hpo.tracking.tracker import Tracker

    plain = {
        "name": name,
        "data": {"name": "npz", "path": str(home.root / "digits.npz"), **STUDIES[name].get("data", {})},
        "model": {"kind": "mlp", "hidden": 64 if name == "wide" else 16},
        "training": {"epochs": 4, "optimizer": {"name": "adam", "lr": 0.01}, "precision": "float32"},
        "search": {"sampler": "random", "trials": 2, "space": {"model.dropout": {"float": [0.0, 0.3]}}},
    }
    spec = parse_study({**STUDIES[name], **plain})
    card = prepare(spec.data, spec.split)
    study, tracker = open_study(home, spec, data_digest=card.digest), Tracker(home)
    tracker.open_study(study.result(), spec, card, split_card(card, spec.split))
    while (candidate := study.ask(budget=2, worker="here")) is not None:
        setup = spec.with_values(candidate.parameters)
        tracker.start_trial(candidate, setup, worker="here")
        folder = home.work / name / str(candidate.number)
        training = train_task(Task(candidate.number, setup, candidate.seed, card, str(folder)), "cpu")
        event = next(training)
        while not isinstance(event, TrialEnded):
            event = training.send(True)
        result = replace(event.result, value=event.result.scores["valid_accuracy"])
        study.tell(result)
        tracker.end_trial(result)
    best = study.result().best
    assert best is not None
    if spec.split.kind != "kfold":
        folder = home.work / name / str(best.number)
        export_program(folder)
        tracker.keep_model(best.number, folder)
        tracker.register(study.result(), best.number)
    study.close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_DATA", str(folder / "data"))
        for name in ("MLFLOW_TRACKING_URI", "HPO_STORAGE"):
            patch.delenv(name, raising=False)
        home = Home.find(folder).create()
        _save_digits(home.root / "digits.npz")
        for name in STUDIES:
            _train(home, name)
    return folder


@pytest.fixture
def home(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A copy that a test may write to."""
    for name in ("MLFLOW_TRACKING_URI", "HPO_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HPO_DATA", str(trained / "data"))
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    shutil.copytree(trained / "mlruns", tmp_path / "mlruns", ignore=shutil.ignore_patterns("work"))
    return Home.find()


def _other(home: Home, name: str) -> int:
    """The trial whose model was not kept."""
    best = read_study(home, name).best
    assert best is not None
    return 1 - best.number


def test_a_study_answers_as_its_winner_was_measured(home):
    comparison = compare(["ten", "wide"])
    assert (comparison.part, comparison.image_count) == ("validation", 337)
    for name, contestant in zip(("ten", "wide"), comparison.contestants, strict=True):
        best = read_study(home, name).best
        assert contestant.model == f"version 1, trial {best.number} of {name}"
        assert contestant.scores["accuracy"].value == pytest.approx(best.result.scores["valid_accuracy"])
        assert contestant.scores["macro_f1"].value == pytest.approx(best.result.scores["valid_macro_f1"], abs=1e-6)
        assert contestant.auc == pytest.approx(best.result.scores["valid_macro_auc"], abs=1e-6)
        assert contestant.confusion == best.result.confusion
    assert not openings(home, read_study(home, "ten"))


def test_names_of_trials_versions_and_aliases_lead_to_their_models(home):
    best, other = 1 - _other(home, "ten"), _other(home, "ten")
    assert {find_model(home, asked).trial.number for asked in ("ten", f"ten#{best}", "ten/1", "ten@challenger")} == {
        best
    }
    with pytest.raises(ModelError, match="no version 0"):  # a slash is for versions, # for trials
        find_model(home, "ten/0")
    assert find_model(home, f"ten#{other}").version is None
    with pytest.raises(HpoError, match="one model"):
        compare(["ten", "ten/1"])
    with pytest.raises(HpoError, match="one model"):
        compare(["ten", "ten"])
    with pytest.raises(HpoError, match="0 to 1"):
        compare(["ten", "ten#7"])
    with pytest.raises(ModelError, match="champion"):
        compare(["ten", "ten@champion"])


def test_a_trial_without_a_model_answers_with_what_it_predicted(home):
    other = _other(home, "ten")
    comparison = compare([f"ten#{other}", "wide"])
    first = comparison.contestants[0]
    result = read_study(home, "ten").trials[other].result
    assert first.scores["accuracy"].value == pytest.approx(result.scores["valid_accuracy"])
    assert (first.auc, first.curve) == (None, None)
    assert "model not kept" in first.model


def test_ten_classes_binarised_stand_beside_the_direct_model(home):
    comparison = compare(["ten", "parity"], binarise=True)
    assert comparison.class_names == ("even", "odd")
    ten, parity = comparison.contestants
    best = read_study(home, "ten").best.result
    blocks = np.array(best.confusion)
    assert ten.confusion == tuple(tuple(int(blocks[true::2, said::2].sum()) for said in range(2)) for true in range(2))
    assert "binarised" in ten.model
    assert "binarised" not in parity.model
    assert parity.scores["accuracy"].value == pytest.approx(
        read_study(home, "parity").best.result.scores["valid_accuracy"]
    )
    assert 0.8 < ten.auc <= 1
    with pytest.raises(HpoError, match="--binarise"):
        compare(["ten", "parity"])
    with pytest.raises(HpoError, match=r"data\.groups"):
        compare(["ten", "wide"], binarise=True)
    with pytest.raises(HpoError, match="differently"):
        compare(["ten", "parity", "some"], binarise=True)
    with pytest.raises(ModelError, match="probabilities"):
        compare([f"ten#{_other(home, 'ten')}", "parity"], binarise=True)


def test_only_images_that_none_was_trained_on_count_where_splits_differ(home):
    from hpo.data.prepare import prepare
    from hpo.data.split import indices

    comparison = compare(["ten", "split"])
    entrants = [find_model(home, name) for name in ("ten", "split")]
    card = prepare(entrants[0].spec.data, entrants[0].spec.split)
    labels = np.load(Path(card.folder) / "development_labels.npy")
    trained, held_out = zip(
        *(indices(labels, split=entrant.setup.split, valid_start=card.valid_start) for entrant in entrants), strict=True
    )
    shared = set(held_out[0]) & set(held_out[1])
    assert not shared & set(np.concatenate(trained))
    assert comparison.image_count == len(shared)
    assert any(f"{len(shared)} images" in note for note in comparison.notes)


def test_images_are_matched_where_classes_were_left_out(home):
    comparison = compare(["ten", "some"], binarise=True)
    assert comparison.class_names == ("low", "high")
    held_out = sum(map(sum, read_study(home, "some").best.result.confusion))
    assert 100 < comparison.image_count == held_out
    assert any("Only the" in note for note in comparison.notes)


def test_cross_validated_trials_have_no_images_of_their_own(home):
    with pytest.raises(DataError, match="cross-validated"):
        compare(["ten", "folds"])


def test_the_test_part_opens_only_when_asked_and_each_opening_is_written_down(home):
    comparison = compare(["ten", "wide"], test=True)
    assert (comparison.part, comparison.image_count) == ("test", 360)
    for name, contestant in zip(("ten", "wide"), comparison.contestants, strict=True):
        (opening,) = openings(home, read_study(home, name))
        assert (opening.model, opening.version) == (name, 1)
        assert opening.scores["test_accuracy"] == pytest.approx(contestant.scores["accuracy"].value)
    assert comparison.openings == {"ten": 1, "wide": 1}
    # Looking again is another look.
    again = compare(["ten", "parity"], test=True, binarise=True)
    assert again.openings == {"ten": 2, "parity": 1}


def test_what_cannot_be_compared_leaves_the_test_part_closed(home):
    for models in (["ten", f"wide#{_other(home, 'wide')}"], ["ten", "parity"], ["ten", "folds"], ["ten", "none"]):
        with pytest.raises(HpoError):
            compare(models, test=True)
    assert not (home.root / "openings.jsonl").exists()


def test_models_without_a_test_image_in_common_leave_it_closed(home, monkeypatch):
    digests = iter([[b"one"], [b"other"]])
    monkeypatch.setattr("hpo.data.test_set.digests_of_test", lambda card: next(digests))
    with pytest.raises(DataError, match="no image is in the test part of all: ten has 1"):
        compare(["ten", "wide"], test=True)
    assert not (home.root / "openings.jsonl").exists()


def test_the_command_prints_json_and_writes_figure_and_table(home, tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", "ten", "parity", "--binarise", "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [contestant["name"] for contestant in told["contestants"]] == ["ten", "parity"]
    assert told["contestants"][1]["mcnemar"]["p"] == told["contestants"][1]["p"]
    assert len(told["verdicts"]) == 1
    assert told["files"] == [str(out / "comparison.md"), str(out / "roc.png")]
    assert (out / "roc.png").read_bytes()[:4] == b"\x89PNG"
    assert "| parity | accuracy |" in (out / "comparison.md").read_text()
    plain = CliRunner().invoke(app, ["compare", "ten", "wide"])
    assert plain.exit_code == 0, plain.output
    assert "A   ten: version 1" in plain.stdout
    assert "337 validation images" in plain.stdout


def test_a_folder_that_takes_no_files_is_said_before_the_test_part_opens(home, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    done = CliRunner().invoke(app, ["compare", "ten", "wide", "--test", "--out", str(tmp_path / "file")])
    assert done.exit_code == 2
    assert "--out" in done.output
    assert not (home.root / "openings.jsonl").exists()
    with pytest.raises(HpoError, match="cannot be written"):
        write_comparison(compare(["ten", "wide"]), tmp_path / "file")
