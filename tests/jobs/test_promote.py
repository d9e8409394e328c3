"""Champions of real studies of the digits: gates first, then the test part, then the alias."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.data.overview import validation_part
from hpo.errors import ModelError
from hpo.execute.run_study import run_study
from hpo.home import Home
from hpo.jobs.doctor import _ledgers
from hpo.jobs.evaluate import evaluate
from hpo.jobs.promote import promote
from hpo.jobs.shared import gates
from hpo.jobs.shared.model_reference import ModelReference, find_model
from hpo.predict import load_model
from hpo.records import FINAL
from hpo.spec.load import load_study
from hpo.spec.outcome import PromoteSpec
from hpo.spec.study import StudySpec
from hpo.storage.reader import read_study
from hpo.tracking.champions import champions
from hpo.tracking.ledger import openings
from hpo.tracking.registry import resolve, set_alias, versions
from hpo.tracking.runs import PREDICTIONS, validation_predictions
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker

QUICK = {
    "training.precision": "float32",
    "search.pruner": "none",
    "search.sampler": "random",
    "training.patience": None,
    "keep.figures": "none",
}


@pytest.fixture(scope="module")
def place(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generations of digits-mlp: version 1 hardly trained, version 2 the better of two final trainings."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(digits_cache, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_DATA", str(folder / "data"))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("MLFLOW_TRACKING_URI", "HPO_STORAGE", "HPO_HOME"):
            patch.delenv(name, raising=False)
        weak = load_study("digits-mlp", overrides={**QUICK, "training.epochs": 1})
        run_study(weak, trials=2, workers=0, home=folder, keep_models="best:1")
        strong = load_study("digits-mlp", overrides={**QUICK, "training.epochs": 6, "final.seeds": 2})
        run_study(strong, trials=1, workers=0, home=folder, fresh=True)
    return folder


@pytest.fixture
def home(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A copy that a test may write to."""
    for name in ("MLFLOW_TRACKING_URI", "HPO_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HPO_DATA", str(place / "data"))
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    shutil.rmtree(place / "data" / "openings", ignore_errors=True)  # the ledger of the tests before
    shutil.copytree(place / "mlruns", tmp_path / "mlruns", ignore=shutil.ignore_patterns("work"))
    return Home.find()


def stand(home: Home, *, champion: int | None, challenger: int) -> None:
    """Let these versions of digits-mlp meet."""
    set_alias(home, "digits-mlp", "challenger", challenger)
    if champion is not None:
        set_alias(home, "digits-mlp", "champion", champion)


def looks(home: Home, title: str) -> list[tuple[int, str]]:
    return [(look.version, look.purpose) for look in openings(home, read_study(home, title))]


def champion(home: Home) -> int | None:
    return next((each.version for each in versions(home, "digits-mlp") if "champion" in each.aliases), None)


def test_the_first_champion_passes_the_gates_that_need_no_other(home: Home) -> None:
    stand(home, champion=None, challenger=1)
    promotion = promote("digits-mlp")
    assert [gate.name for gate in promotion.gates] == ["reloads"]
    assert (promotion.promoted, promotion.refused, champion(home)) == (True, False, 1)
    assert promotion.scores["test_accuracy"] > 0.1
    assert looks(home, "digits-mlp~1") == [(1, "promote")]
    again = promote("digits-mlp")
    assert (again.promoted, again.refused, again.scores) == (False, False, promotion.scores)
    assert looks(home, "digits-mlp~1") == [(1, "promote")]


def test_a_better_challenger_passes_and_the_history_tells_of_both(home: Home) -> None:
    stand(home, champion=None, challenger=1)
    promote("digits-mlp")
    stand(home, champion=1, challenger=2)
    promotion = promote("digits-mlp")
    beats, reloads, signature = promotion.gates
    assert (beats.name, reloads.name, signature.name) == ("beats the champion", "reloads", "same signature")
    assert all(gate.passed for gate in promotion.gates)
    # The same generation's data and split: all validation images, and both seeds of the race.
    assert "288 validation images, seeds: 2 against 1" in beats.measured
    assert promotion.reason == beats.measured
    assert promotion.champion_scores["test_accuracy"] < promotion.scores["test_accuracy"]
    first, second = champions(home, "digits-mlp")
    assert (first.version, second.version, first.until) == (1, 2, second.since)
    assert second.why == beats.measured
    shown = CliRunner().invoke(app, ["models", "digits-mlp"])
    assert "there was no champion before" in shown.stdout
    told = json.loads(CliRunner().invoke(app, ["models", "digits-mlp", "--json"]).stdout)
    assert [each["champion"][0]["forced"] for each in told] == [False, False]


def test_a_worse_challenger_is_refused_with_the_amount_and_the_test_part_stays_closed(home: Home) -> None:
    stand(home, champion=2, challenger=1)
    done = CliRunner().invoke(app, ["promote", "digits-mlp"])
    assert done.exit_code == 1
    assert "refused" in done.stdout
    assert "points of accuracy over version 2 (95 % interval -" in done.stdout
    assert champion(home) == 2
    assert not (home.root / "openings.jsonl").exists()
    assert champions(home, "digits-mlp") == []


def test_force_promotes_a_refused_challenger_and_is_remembered(home: Home) -> None:
    stand(home, champion=2, challenger=1)
    promotion = promote("digits-mlp", force=True)
    assert (promotion.promoted, promotion.forced, promotion.refused) == (True, True, False)
    assert promotion.reason.startswith("forced, although: beats the champion: -")
    (reign,) = champions(home, "digits-mlp")
    assert (reign.version, reign.forced, champion(home)) == (1, True, 1)


def _entrants(home: Home) -> tuple[ModelReference, ModelReference]:
    return find_model(home, "digits-mlp/2"), find_model(home, "digits-mlp/1")


def _with_split(entrant: ModelReference, **split: object) -> ModelReference:
    changed = entrant.spec.split.model_copy(update=split)
    return replace(entrant, spec=entrant.spec.model_copy(update={"split": changed}))


def test_seeds_of_the_race_speak_for_a_candidate(home: Home) -> None:
    new, old = _entrants(home)
    assert new.trial.candidate.stage == FINAL
    assert (len(gates._seeds(new)), len(gates._seeds(old))) == (2, 1)
    # As after an update between the two: an earlier version recorded no settings, which were those of the spec.
    trials = [
        replace(each, candidate=replace(each.candidate, final=None)) if each.number == new.trial.number else each
        for each in new.study.trials
    ]
    assert sum(each.candidate.final is not None for each in trials if each.candidate.stage == FINAL) == 1
    assert len(gates._seeds(replace(new, study=replace(new.study, trials=tuple(trials))))) == 2


def test_seeds_of_a_race_speak_for_a_candidate_whose_views_were_chosen_too(home: Home, tmp_path: Path) -> None:
    """Not the luckiest of them alone: each by the views that other images chose."""
    new, old = _entrants(home)
    uris = Tracker(home).kept_models(new.study)
    part = validation_part(new.card, new.setup.split)
    for index, trial in enumerate(gates._seeds(new)):
        run = resolve(home, uris[trial.number]).run_id
        found = validation_predictions(home, run)
        assert found is not None
        judged = np.full(len(part.labels), index)
        np.savez(tmp_path / Path(PREDICTIONS).name, **found, judged=judged)
        connect(home).log_artifact(run, tmp_path / Path(PREDICTIONS).name, str(Path(PREDICTIONS).parent))
    answers = gates._predicted_classes(home, new, part, new.card.class_names)
    assert sorted(answers[:, 0].tolist()) == [0, 1]
    assert (answers == answers[:, :1]).all()
    verdict = gates.beats_champion(home, new, old.kept(""), old, "")
    assert "seeds: 2 against 1" in verdict.measured


def test_the_score_of_several_objectives_is_the_first_that_is_no_cost(home: Home) -> None:
    new, old = _entrants(home)
    aims = [{"score": "parameters"}, {"score": "valid_macro_f1"}]
    spec = load_study("digits-mlp", overrides={**QUICK, "search.objectives": aims})
    verdict = gates.beats_champion(home, replace(new, spec=spec), old.kept(""), old, "")
    assert "points of macro F1" in verdict.measured
    result = replace(new.trial.result, scores={}, value=50_000.0)
    cheap = replace(new, spec=spec, trial=replace(new.trial, result=result))
    assert gates._network_score(cheap, "valid_macro_f1") is None


def test_images_that_the_champion_was_trained_on_do_not_count(home: Home) -> None:
    from hpo.data.split import indices

    new, old = _entrants(home)
    champion = old.kept("")
    elsewhere = _with_split(old, seed=5)
    labels = np.load(Path(old.card.folder) / "development_labels.npy")
    valid = [indices(labels, split=each.setup.split, valid_start=None)[1] for each in (new, elsewhere)]
    verdict = gates.beats_champion(home, new, champion, elsewhere, "")
    assert f"{len(np.intersect1d(*valid)):,} validation images" in verdict.measured
    assert f"those of {len(validation_part(new.card, new.setup.split).labels)}" in verdict.measured


@pytest.mark.parametrize("lost", ["nothing left", "no training"])
def test_without_images_to_compare_on_the_objective_decides_and_says_so(home: Home, lost: str) -> None:
    new, old = _entrants(home)
    other = _with_split(old, kind="none") if lost == "nothing left" else None
    verdict = gates.beats_champion(home, new, old.kept(""), other, "the champion's training is not at hand")
    assert verdict.passed
    assert "without an interval: the champion" in verdict.measured
    assert not gates.beats_champion(home, old, new.kept(""), None, "").passed


def test_a_model_that_answers_otherwise_than_its_trial_is_refused(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpo.tracking.runs import validation_predictions

    def answers(home: Home, run_id: str):
        told = validation_predictions(home, run_id)
        return told | {"probabilities": told["probabilities"] * (1 - 1e-3)}

    stand(home, champion=None, challenger=2)
    measured = gates.parity(home, _entrants(home)[0], load_model("digits-mlp/2")).measured
    assert float(measured.split("largest difference ")[1].split(";")[0]) < 1e-5
    monkeypatch.setattr("hpo.tracking.runs.validation_predictions", answers)
    promotion = promote("digits-mlp")
    assert promotion.refused
    # The limit of float32, 0.0001, by the temperature of the program.
    limit = r"reloads: same predictions after reload \(largest difference 0\.001; limit 0\.000[1-9]\d*, 288 beyond it\)"
    assert re.match(limit, promotion.reason)
    assert not (home.root / "openings.jsonl").exists()


@pytest.mark.parametrize(("images", "passed"), [(17, True), (18, False)])
def test_few_images_between_two_classes_may_lie_further_in_coarse_numbers(images: int, passed: bool) -> None:
    theirs = np.tile([0.56, 0.44], (1712, 1))
    ours = theirs.copy()
    ours[:images] += [-0.07, 0.07]
    verdict = gates.parity_verdict(ours, theirs, kind="bfloat16", several=False, origin="")
    assert verdict.passed is passed
    assert f"{images} beyond it" in verdict.measured


def test_other_classes_or_another_order_of_them_is_another_signature(home: Home) -> None:
    model, champion = load_model("digits-mlp/2"), _entrants(home)[1].kept("")
    assert gates.same_signature(home, model, champion).passed
    turned = replace(model, class_names=model.class_names[::-1])
    verdict = gates.same_signature(home, turned, champion)
    assert not verdict.passed
    assert "9, 8, 7" in verdict.measured
    assert "0, 1, 2" in verdict.limit


def test_limits_that_the_study_declares_are_measured_here(home: Home) -> None:
    new, model = _entrants(home)[0], load_model("digits-mlp/2")

    def found(promote: PromoteSpec, constraints: list[str]) -> list[tuple[str, bool]]:
        search = new.spec.search.model_copy(update={"constraints": constraints})
        spec: StudySpec = new.spec.model_copy(update={"promote": promote, "search": search})
        return [(each.name, each.passed) for each in gates.limits(home, replace(new, spec=spec), model)]

    assert found(PromoteSpec(), []) == []
    assert found(PromoteSpec(latency_ms=1e4, size_mb=100), ["parameters <= 10000000"]) == [
        ("keeps its constraints", True),
        ("is fast", True),
        ("is small", True),
    ]
    assert not any(passed for _, passed in found(PromoteSpec(latency_ms=1e-3, size_mb=1e-3), ["parameters <= 10"]))


def test_evaluate_opens_the_test_part_once_for_each_model_and_remembers(home: Home) -> None:
    final = find_model(home, "digits-mlp/2").trial.number
    first = evaluate(["digits-mlp/1", f"digits-mlp~2#{final}"])
    assert [each.opened for each in first] == [True, True]
    again = evaluate(["digits-mlp@challenger", "digits-mlp/1"])
    assert [each.opened for each in again] == [False, False]
    assert [again[1].scores, again[0].scores] == [each.scores for each in first]
    assert (again[0].purpose, again[0].openings) == ("evaluate", 1)
    # Promotion remembers too.
    stand(home, champion=None, challenger=1)
    assert promote("digits-mlp").scores == first[0].scores
    assert looks(home, "digits-mlp~1") == [(1, "evaluate")]
    text = CliRunner().invoke(app, ["evaluate", "digits-mlp/1"]).stdout
    assert "The test part of digits-mlp has been opened once; this time it stayed closed." in text


def test_evaluating_a_trial_without_a_model_opens_nothing(home: Home) -> None:
    kept = find_model(home, "digits-mlp/1").trial.number
    with pytest.raises(ModelError, match="not kept"):
        evaluate(["digits-mlp/1", f"digits-mlp~1#{1 - kept}"])
    assert not (home.root / "openings.jsonl").exists()


def test_a_version_of_an_earlier_generation_leads_to_its_own_trial(home: Home) -> None:
    new, old = _entrants(home)
    assert (new.study.generation, old.study.generation) == (2, 1)


def test_a_look_that_is_killed_before_its_result_is_counted(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    stand(home, champion=None, challenger=1)
    with monkeypatch.context() as patch:
        patch.setattr("hpo.metrics.scores", killed)
        with pytest.raises(KeyboardInterrupt):
            promote("digits-mlp")
    assert champion(home) is None
    (look,) = openings(home, read_study(home, "digits-mlp~1"))
    assert (look.purpose, look.scores) == ("promote", {})
    assert promote("digits-mlp").openings == 2


def test_images_are_counted_over_generations_and_a_damaged_ledger_refuses(home: Home) -> None:
    evaluate(["digits-mlp/1"])
    (sentence,) = {line for line in evaluate(["digits-mlp/2"])[0].history if line.startswith("This test part")}
    assert sentence == "This test part: twice, by digits-mlp, digits-mlp~2."
    stand(home, champion=None, challenger=1)
    with (home.root / "openings.jsonl").open("a") as ledger:
        ledger.write('{"when": "2026-01-01T00:00:00"}\n')
    refused = CliRunner().invoke(app, ["promote", "digits-mlp"])
    assert refused.exit_code != 0
    assert champion(home) is None
    # Only this repair of the doctor: others would move the addresses of this copy, too.
    (case,) = _ledgers(home)
    assert "openings.jsonl: line 7" in case.finding.where
    assert case.mend is not None
    case.mend()
    promotion = promote("digits-mlp")
    assert promotion.promoted
    assert any("Damaged lines of the ledger that were set aside" in line for line in promotion.history)


def test_a_base_that_has_seen_test_images_refuses_unless_forced(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpo.data import overview
    from hpo.execute import bases

    # The training of the base is the study itself here, whose development images stand in for the test images.
    new = _entrants(home)[0]
    monkeypatch.setattr(bases.Trained, "bases", ["models:/m-1"])
    monkeypatch.setattr(
        bases, "_base_trainings", lambda *_: iter([("trial 0 of base", new.card, bases.Trained("", {}))])
    )
    monkeypatch.setattr(overview, "count_test_images", lambda card, seen: dict.fromkeys(seen, 7))
    stand(home, champion=None, challenger=2)
    refused = promote("digits-mlp")
    assert refused.refused
    assert refused.reason.startswith("base has not seen the test part: 7 of ")
    assert not (home.root / "openings.jsonl").exists()
    forced = promote("digits-mlp", force=True)
    assert (forced.promoted, forced.forced) == (True, True)
    assert "7 of" in champions(home, "digits-mlp")[0].why
