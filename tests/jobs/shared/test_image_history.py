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
from hpo.data.overview import development_digests
from hpo.data.prepare import prepare
from hpo.data.test_set import digests_of_test, ledger_folder
from hpo.errors import DataError
from hpo.execute import bases, ensemble
from hpo.execute.bases import Trained, check_bases
from hpo.execute.ensemble import EnsembleContext, make_ensemble
from hpo.execute.run_study import run_study
from hpo.execute.soup import Soup, make_soup
from hpo.home import Home
from hpo.jobs.evaluate import evaluate
from hpo.jobs.promote import promote
from hpo.jobs.shared.image_history import base_verdict, study_history
from hpo.records import (
    ENSEMBLE,
    Candidate,
    DataCard,
    ModelVersion,
    StudyResult,
    Trial,
    TrialResult,
    TrialState,
)
from hpo.spec.load import load_study, parse_study
from hpo.spec.models import TransferSpec
from hpo.spec.study import Setup
from hpo.tracking import registry
from hpo.tracking.ledger import announce_opening, name_images
from hpo.tracking.tracker import Tracker


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


def setups() -> tuple[Setup, Setup, Setup]:
    """One that builds on no other model, one that starts from a model, and one that learns from one."""
    plain = load_study("digits-mlp").setup
    transfer = TransferSpec(kind="transfer", from_model="models:/m-1")
    training = plain.training.model_copy(update={"teacher": "models:/m-2"})
    return plain, plain.model_copy(update={"model": transfer}), plain.model_copy(update={"training": training})


def trained_on(card: DataCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every base be of a study on these data."""
    of_base = [("trial 0 of base", card, Trained("", {}))]
    monkeypatch.setattr(bases, "_base_trainings", lambda *_: iter(of_base))


def left(folder: Path, setup: Setup, **config: object) -> Path:
    """The files of a logged model that tell how it was trained."""
    folder.mkdir(parents=True)
    (folder / "setup.json").write_text(setup.model_dump_json())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def members(**named: Setup) -> list[dict[str, object]]:
    return [{"trial": f"a~1#{name}", "setup": setup.model_dump(mode="json")} for name, setup in named.items()]


def test_a_model_whose_base_has_seen_test_images_is_refused_with_the_numbers(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, other = digits(0), digits(1)
    plain, moved, taught = setups()
    for setup, base, passed in ((moved, other, False), (moved, card, True), (taught, other, False)):
        model: Any = SimpleNamespace(card=card, setup=setup, version=None)
        trained_on(base, monkeypatch)
        (verdict,) = base_verdict(home, model)
        assert (verdict.passed, verdict.limit) == (passed, "0 test images")
        assert (f"of {card.test_count:,} test images in trial 0 of base" in verdict.measured) is not passed
    model.setup = plain
    assert list(base_verdict(home, model)) == []


@pytest.mark.parametrize("kind", ["one network", "members", "averaged"])
def test_bases_are_those_of_the_files_of_a_model_whatever_the_record_of_its_study_says_now(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    plain, _, taught = setups()
    if kind == "one network":
        left(tmp_path / "model" / "artifacts", taught)
    else:
        left(tmp_path / "model" / "artifacts", plain, **{kind: members(one=plain, two=taught)})
    monkeypatch.setattr(registry, "fetch", lambda *_: tmp_path / "model")
    trained_on(digits(1), monkeypatch)
    model: Any = SimpleNamespace(card=digits(0), setup=plain, version=SimpleNamespace())
    (verdict,) = base_verdict(home, model)
    assert not verdict.passed


@pytest.mark.parametrize("average", ["probabilities", "weights"])
def test_an_ensemble_and_a_soup_with_a_member_whose_base_has_seen_test_images_are_not_made(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: str
) -> None:
    """hpo ensemble and the end of hpo run make both by these functions."""
    plain, _, taught = setups()
    context = EnsembleContext(digits(0), Tracker(home), home.work, call, call)
    by: Any = SimpleNamespace(title="a~1", lease=Path("a"), spec=load_study("digits-mlp"))
    result = TrialResult(0, TrialState.COMPLETE)

    def make() -> object:
        if average == "weights":
            folder = left(tmp_path / "soup", plain, averaged=members(one=plain, two=taught))
            return make_soup(Soup(replace(result, folder=str(folder)), None), by, context)
        folders = [left(tmp_path / name, setup) for name, setup in (("one", plain), ("two", taught))]
        kept: Any = tuple(SimpleNamespace(name=f"a~1#{folder.name}", result=result) for folder in folders)
        proposal: Any = SimpleNamespace(members=kept, named={}, gain=SimpleNamespace(judged=()))
        monkeypatch.setattr(ensemble, "_known", lambda *_: None)
        monkeypatch.setattr(EnsembleContext, "model_folders", lambda *_: folders)
        return make_ensemble(proposal, by, context)

    trained_on(digits(1), monkeypatch)
    with pytest.raises(DataError, match=r"a~1#two: its base has seen [\d,]+ in trial 0 of base of the"):
        make()


def test_a_member_whose_base_is_not_at_hand_is_named(home: Home) -> None:
    plain, _, taught = setups()
    trained = [Trained(name, setup.model_dump(mode="json")) for name, setup in (("a~1#1", plain), ("a~1#2", taught))]
    said = check_bases(home, trained, digits(0))
    assert said.startswith("a~1#2 was not compared with its base: the training of its base models:/m-2 is not at hand:")


def test_of_a_base_that_is_an_ensemble_the_studies_of_all_members_are_compared(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _, taught = setups()
    first, second = digits(0), digits(1)
    parts = {"digits-mlp~1": study("digits-mlp", first), "other~1": study("other", second)}
    spec = load_study("digits-mlp").model_dump(mode="json")
    trial = Trial(Candidate(0, 0, {}, 0, stage=ENSEMBLE), TrialState.COMPLETE, TrialResult(0, TrialState.COMPLETE))
    monkeypatch.setattr(bases, "read_study", lambda _, name: replace(parts[name], spec=spec, trials=(trial,)))
    version = ModelVersion("digits-mlp", 2, (), "run", "models:/m-2", "digits-mlp", 0)
    monkeypatch.setattr(registry, "resolve", lambda *_: version)
    made_of = [{**each, "trial": name} for each, name in zip(members(a=plain, b=plain), parts, strict=True)]
    left(tmp_path / "model" / "artifacts", plain, members=made_of)
    monkeypatch.setattr(registry, "fetch", lambda *_: tmp_path / "model")
    model: Any = SimpleNamespace(card=first, setup=taught, version=None)
    (verdict,) = base_verdict(home, model)
    assert "test images in other~1, of whose trials it is made" in verdict.measured


def call(function: Any, *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)
