"""Test images of the digits under several studies, splits and homes: the models that were measured on or saw them."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny_study as tiny
from hpo.data.prepare import prepare
from hpo.data.test_set import digests_of_test, ledger_folder
from hpo.execute.run_study import run_study
from hpo.home import Home
from hpo.jobs.evaluate import evaluate
from hpo.jobs.promote import promote
from hpo.jobs.shared import image_history
from hpo.jobs.shared.image_history import base_verdict, development_digests, study_history
from hpo.records import DataCard, ModelVersion, StudyResult
from hpo.spec.load import load_study, parse_study
from hpo.spec.models import TransferSpec
from hpo.tracking.ledger import announce_opening, name_images


@pytest.fixture(scope="module")
def prepared(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with two test parts."""
    spec = load_study("digits-mlp", overrides={"split.seed": 1})
    folder = tmp_path_factory.mktemp("two")
    prepare(spec.data, spec.split, cache=shutil.copytree(digits_cache, folder / "elsewhere"))
    # A cache remembers its path: no copy is to lead back to it.
    return (folder / "elsewhere").rename(folder / "cache")


@pytest.fixture
def home(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("HPO_DATA", shutil.copytree(prepared, tmp_path / "cache").as_posix())
    for name in ("MLFLOW_TRACKING_URI", "HPO_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    return Home.at(tmp_path / "home")


def digits(seed: int = 0) -> DataCard:
    spec = load_study("digits-mlp", overrides={"split.seed": seed})
    return prepare(spec.data, spec.split)


def study(title: str, card: DataCard, created: float = 1.0) -> StudyResult:
    name, _, generation = title.partition("~")
    return replace(tiny.study(), name=name, generation=int(generation or 1), created=created, data_digest=card.digest)


def opened(home: Home, by: StudyResult, card: DataCard) -> None:
    cache, model = ledger_folder(card), ModelVersion(by.title, 1, (), "run", "models:/x/1", by.title, 0)
    opening = announce_opening(home, by, model=model, trial=0, purpose="promote", cache=cache)
    name_images(home, by, opening, digests_of_test(card), trained=development_digests(card), cache=cache)


def test_studies_generations_and_homes_are_counted_on_the_same_images(home: Home, tmp_path: Path) -> None:
    card = digits()
    assert study_history(home, study("base", card), card).sentences == ()
    for title in ("base", "base~2", "other"):
        opened(home, study(title, card), card)
    assert study_history(home, study("new", card), card).sentences == (
        "This test part: 3 times, by base, base~2, other.",
    )
    (sentence,) = study_history(Home.at(tmp_path / "second"), study("new", card), card).sentences
    assert sentence.startswith("This test part: 3 times, by base (another home), ")
    shutil.rmtree(ledger_folder(card))
    assert study_history(home, study("new", card), card).openings == 3


def test_another_split_of_the_same_images_is_told_with_counts(home: Home) -> None:
    first, second = digits(0), digits(1)
    opened(home, study("base", first), first)
    history = study_history(home, study("other", second), second)
    theirs, ours = set(digests_of_test(first)), digests_of_test(second)
    shared = sum(digest in theirs for digest in ours)
    assert 0 < shared < len(ours)
    assert (history.openings, history.answered, history.answered_models) == (0, shared, ("base",))
    (trained,) = history.trained
    assert (trained.name, trained.count) == ("base", len(ours) - shared)
    assert history.sentences[0] == (
        f"{shared:,} of {len(ours):,} of these images have answered before, in other test parts: once, by base."
    )


def test_training_images_of_a_measured_model_are_known_without_its_data_or_missed_aloud(home: Home) -> None:
    first, second = digits(0), digits(1)
    opened(home, study("base", first), first)
    told = study_history(home, study("other", second), second)
    shutil.rmtree(Path(first.folder).parent)
    assert study_history(home, study("other", second), second) == told
    assert [each.name for each in told.trained] == ["base"]
    for folder in (home.root, ledger_folder(second)):
        for file in (folder / "test_images").iterdir():
            file.unlink()
    *_, sentence = study_history(home, study("other", second), second).sentences
    assert sentence == "It was not compared with the training images of base: they are not at hand."


@pytest.mark.slow
def test_a_transfer_from_a_base_of_another_split_is_told_and_refused(home: Home) -> None:
    place, quick = home.root.parent, {"training.epochs": 1, "keep.figures": "none"}
    run_study(load_study("digits-cnn", overrides=quick), trials=1, workers=0, home=place)
    tree = load_study("digits-cnn", overrides={**quick, "split.seed": 1}).model_dump(mode="json")
    tree |= {"name": "other", "model": {"kind": "transfer", "from_model": "models:/digits-cnn@challenger"}}
    tree["search"] |= {"space": {"training.optimizer.lr": {"choice": [0.001, 0.01]}}}
    run_study(parse_study(tree), trials=1, workers=0, home=place)
    done = promote("other", home=place)
    assert not done.promoted
    assert "base has not seen the test part" in done.reason
    (look,) = evaluate(["other"], home=place)
    assert any("are development images of its base, trial 0 of digits-cnn" in each for each in look.history)


def test_lines_without_images_count_by_their_study(home: Home) -> None:
    card = digits()
    mine = study("base", card)
    opening = announce_opening(home, mine, model=ModelVersion("base", 1, (), "", "", "base", 0), trial=0, purpose="")
    old = {key: value for key, value in asdict(opening).items() if key not in ("data", "images", "purpose")}
    (home.root / "openings.jsonl").write_text(json.dumps(old) + "\n")
    assert study_history(home, mine, card).openings == 1
    assert study_history(home, study("base", card, created=2.0), card).openings == 0


def test_a_transfer_whose_base_has_seen_test_images_is_refused_with_the_numbers(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, other = digits(0), digits(1)
    spec = TransferSpec.model_construct(from_model="models:/m-1")
    untaught, taught = (SimpleNamespace(teacher=teacher) for teacher in (None, "models:/m-2"))
    setups = [SimpleNamespace(model=spec, training=untaught), SimpleNamespace(model=None, training=taught)]
    for setup, base, passed in ((setups[0], other, False), (setups[0], card, True), (setups[1], other, False)):
        model: Any = SimpleNamespace(card=card, setup=setup)
        monkeypatch.setattr(image_history, "_base_training", lambda *_, base=base: ("trial 0 of base", base, []))
        (verdict,) = base_verdict(home, model)
        assert (verdict.passed, verdict.limit) == (passed, "0 test images")
        assert (f"of {card.test_count:,} test images in trial 0 of base" in verdict.measured) is not passed
    model.setup.training = untaught
    assert list(base_verdict(home, model)) == []
