"""An ensemble of a real study of the digits is one model like any other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.data import overview
from hpo.data.test_set import digests_of_test
from hpo.errors import DataError, HpoError
from hpo.events import Notice, StudyEnded
from hpo.execute import ensemble as ensemble_module
from hpo.execute.bases import study_data
from hpo.execute.ensemble import Proposal, kept_trials, limits_of, validation_images
from hpo.execute.run_study import run_study
from hpo.execute.workers import ensemble_jobs
from hpo.execute.workers.job_process import finish_trial
from hpo.home import Home
from hpo.jobs.compare import compare
from hpo.jobs.ensemble import ensemble, register_ensemble
from hpo.jobs.evaluate import evaluate
from hpo.jobs.promote import promote
from hpo.jobs.rerun import rerun
from hpo.jobs.shared.image_history import base_verdict
from hpo.jobs.shared.model_reference import find_model
from hpo.locks import is_locked
from hpo.models.safe_loader import Program
from hpo.records import ENSEMBLE, FINAL, Candidate, StudyResult, Trial, TrialResult, TrialState, pack_classes
from hpo.report.ensembles import Gain
from hpo.report.statistics import Interval
from hpo.search.study import Study
from hpo.spec.load import load_study, parse_study
from hpo.spec.outcome import EnsembleSpec, PredictSpec
from hpo.storage.reader import read_study
from hpo.tracking.champions import outlasts
from hpo.tracking.registry import fetch, resolve, set_alias
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker

QUICK = {
    "training.precision": "float32",
    "training.epochs": 2,
    "training.patience": None,
    "search.pruner": "none",
    "search.sampler": "random",
    "keep.figures": "none",
}


@pytest.fixture(scope="module")
def place(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits-mlp with six trials and two final trainings, and digits-cnn with two trials."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(digits_cache, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_DATA", str(folder / "data"))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("MLFLOW_TRACKING_URI", "HPO_STORAGE", "HPO_HOME"):
            patch.delenv(name, raising=False)
        run_study(load_study("digits-mlp", overrides={**QUICK, "final.seeds": 2}), trials=6, workers=0, home=folder)
        run_study(load_study("digits-cnn", overrides=QUICK), trials=2, workers=0, home=folder)
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


def _temperature(folder: Path) -> float:
    return json.loads((folder / "config.json").read_text()).get("temperature", 1.0)


def _warmed(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities (n, classes) at a temperature: p^(1 / T), normalised."""
    powers = probabilities.astype(np.float64) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def _kept(home: Home, name: str, tmp_path: Path):
    """The study, its data and validation images, and its trials with a model."""
    study = read_study(home, name)
    spec = parse_study(study.spec)
    card = study_data(study, spec)
    images = validation_images(spec, card)
    files = Tracker(home).kept_predictions(study, {trial.number for trial in study.trials}, tmp_path)
    return study, card, images, kept_trials(study, files, images)


@pytest.fixture
def eight(home: Home, tmp_path: Path):
    """An ensemble of eight trials, of which one counts three times, and the folders of their models."""
    study, card, images, kept = _kept(home, "digits-mlp", tmp_path)
    chosen, counts = kept[:8], (3, 1, 1, 1, 1, 1, 1, 1)
    shares = np.array(counts) / sum(counts)
    mean = np.tensordot(shares, [each.probabilities for each in chosen], axes=1).astype(np.float32)
    gain = Gain("accuracy", Interval(0.0, 0.0, 0.0), 0.0, 0.0, 8, len(images.rows))
    proposal = Proposal(tuple(chosen), counts, gain, images, mean)
    version = register_ensemble(home, proposal, study.title, card)
    return version, proposal, [Tracker(home).model_files(each.uri, tmp_path) for each in chosen], shares


def test_an_ensemble_of_eight_loads_by_mlflow_without_hpo_and_answers_the_mean_of_its_members(
    eight, place, home, tmp_path
):
    version, _, folders, shares = eight
    images = np.load(next((place / "data").rglob("development_images.npy")))[:200]
    # Each model has a temperature of its own; the ensemble is made of the networks alone, and then has one, too.
    members = [_warmed(Program(folder / "net.pt2").predict(images), 1 / _temperature(folder)) for folder in folders]
    made = fetch(home, version, tmp_path) / "artifacts"
    mean = _warmed(np.tensordot(shares, members, axes=1), _temperature(made))
    np.save(tmp_path / "images.npy", images)
    script = (
        "import sys, numpy\n"
        "sys.modules['hpo'] = None\n"
        "import mlflow\n"
        f"model = mlflow.pyfunc.load_model({str(fetch(home, version, tmp_path))!r})\n"
        f"numpy.save({str(tmp_path / 'found.npy')!r}, model.predict(numpy.load({str(tmp_path / 'images.npy')!r})))\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path, env={**os.environ})
    np.testing.assert_allclose(np.load(tmp_path / "found.npy"), mean, atol=1e-5)


def test_an_ensemble_is_recorded_with_its_members_and_made_once(eight, home, tmp_path):
    version, proposal, _, _ = eight
    study = read_study(home, "digits-mlp")
    (trial,) = study.ranked(ENSEMBLE)
    assert dict(trial.result.members) == proposal.named
    assert trial.result.parameter_count == sum(each.result.parameter_count for each in proposal.members)
    assert trial.number not in {each.number for each in [*study.ranked(), *study.counted]}
    note = connect(home).get_model_version(version.name, str(version.version))
    assert f"{proposal.members[0].name} x3" in note.tags["hpo.members"]
    assert proposal.members[1].name in note.description
    again = register_ensemble(home, proposal, study.title, study_data(study, parse_study(study.spec)))
    assert again.version == version.version
    assert len(read_study(home, "digits-mlp").ranked(ENSEMBLE)) == 1
    assert not home.work.exists() or not list(home.work.iterdir())


def test_an_ensemble_passes_the_gates_and_is_measured_compared_explained_and_reported_as_any_model(
    eight, home, tmp_path
):
    version, *_ = eight
    promotion = promote("digits-mlp")
    assert promotion.promoted
    assert [gate.passed for gate in promotion.gates] == [True]
    assert promotion.challenger.version == version.version
    name = f"digits-mlp/{version.version}"
    (measured,) = evaluate([name])
    assert not measured.opened
    compared = compare([name, f"digits-mlp#{eight[1].members[0].trial.number}"])
    assert compared.image_count == len(eight[1].images.rows)
    runner = CliRunner()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    for command in (
        ["explain", name, str(tmp_path / "a.png"), "--out", str(tmp_path / "maps")],
        ["predict", name, str(tmp_path / "a.png")],
        ["report", "digits-mlp", "--out", str(tmp_path / "page.html")],
        ["trials", "digits-mlp"],
        ["doctor"],
    ):
        done = runner.invoke(app, command)
        assert done.exit_code == 0, (command, done.output)
    assert len(list((tmp_path / "maps").glob("*.png"))) == 1
    with pytest.raises(HpoError, match="an ensemble, which was not trained"):
        rerun(f"digits-mlp#{version.trial}")


class Killed(BaseException):
    """What ends a process wherever it is."""


def _killed(*_: object, **__: object) -> None:
    raise Killed


@pytest.mark.parametrize("at", [(Path, "rename"), (Tracker, "keep_model"), (Tracker, "register")])
@pytest.mark.parametrize("next_one", ["ensemble", "run"])
def test_an_ensemble_whose_process_is_killed_is_finished_by_the_next_one(home, monkeypatch, at, next_one):
    with monkeypatch.context() as patch:
        patch.setattr(*at, _killed)
        with pytest.raises(Killed):
            ensemble("digits-mlp")
    (recorded,) = read_study(home, "digits-mlp").ranked(ENSEMBLE)
    asked = {**QUICK, "final.seeds": 2} | ({"ensemble.members": 8} if at[1] == "rename" else {})
    if next_one == "run":
        run_study(load_study("digits-mlp", overrides=asked), trials=6, workers=0, home=home.root.parent)
    else:
        assert ensemble("digits-mlp").version.trial == recorded.number
    study = read_study(home, "digits-mlp")
    assert [trial.number for trial in study.ranked(ENSEMBLE)] == [recorded.number]
    assert recorded.number in Tracker(home).kept_models(study)
    assert not home.work.exists() or not list(home.work.iterdir())


def test_an_ensemble_is_recorded_by_one_supervisor_at_a_time(home, monkeypatch):
    """A second one that has computed the same ensemble meanwhile takes that of the first."""
    add, finish, made = Study.add, ensemble_module.finish_ensemble, []

    def locked_add(self: Study, *given: object, **named: object) -> object:
        assert is_locked(home.locks / "digits-mlp.ensemble.lock")
        return add(self, *given, **named)

    def overtaken(*given: object) -> object:
        result = finish(*given)
        if not made:
            made.append(None)
            made.append(ensemble("digits-mlp").version)
        return result

    monkeypatch.setattr(Study, "add", locked_add)
    monkeypatch.setattr(ensemble_module, "finish_ensemble", overtaken)
    second = ensemble("digits-mlp").version
    assert second.version == made[1].version
    assert len(read_study(home, "digits-mlp").ranked(ENSEMBLE)) == 1


def test_a_later_run_that_finds_nothing_better_leaves_the_ensemble_challenger(home):
    made = ensemble("digits-mlp").version
    events: list[object] = []
    spec = load_study("digits-mlp", overrides={**QUICK, "final.seeds": 2})
    run_study(spec, trials=6, workers=0, home=home.root.parent, watch=events.append)
    assert resolve(home, "digits-mlp@challenger").version == made.version
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any(f"the ensemble of trial {made.trial} stays the model of the study" in text for text in told)


@pytest.mark.parametrize(
    ("stage", "number", "value", "stays"),
    [
        ("", 3, 0.9, True),  # it was there when the ensemble was made, by which that won
        ("", 8, 0.79, True),
        ("", 8, 0.8, True),
        ("", 8, 0.81, False),
        (FINAL, 3, 0.9, True),
        (FINAL, 8, 0.7, False),  # somebody has asked for it
        (ENSEMBLE, 8, 0.7, False),
    ],
)
def test_a_trial_replaces_an_older_ensemble_where_it_is_better_or_final(stage, number, value, stays):
    def trial(number: int, stage: str, value: float) -> Trial:
        result = TrialResult(number, TrialState.COMPLETE, value)
        return Trial(Candidate(number, 0, {}, 0, stage=stage), TrialState.COMPLETE, result)

    for direction, sign in (("maximize", 1.0), ("minimize", -1.0)):
        study = StudyResult("a", 1, direction, "valid_accuracy")
        assert outlasts(study, trial(5, ENSEMBLE, sign * 0.8), trial(number, stage, sign * value)) == stays


def test_the_gate_judges_an_ensemble_on_images_that_did_not_choose_its_members(home, tmp_path):
    """Of members that other images choose, every answer is class 0; those of the ensemble itself are good."""
    study, card, images, kept = _kept(home, "digits-mlp", tmp_path)
    best = next(each for each in kept if each.trial.candidate.stage != FINAL)  # a final training has two seeds
    champion = Tracker(home).register(study, best.trial.number)
    set_alias(home, "digits-mlp", "champion", champion.version)
    mean = np.mean([each.probabilities for each in kept[:2]], axis=0)
    unknown = Gain("accuracy", Interval(0.0, 0.0, 0.0), 0.0, 0.0, 8, len(images.rows))
    zeros = replace(unknown, judged=(pack_classes([0] * len(images.rows)),) * 5)
    for gain, said in ((unknown, "not known: its members were chosen"), (zeros, "members chosen on others of them")):
        register_ensemble(home, Proposal(tuple(kept[:2]), (1, 1), gain, images, mean), study.title, card)
        refused = promote("digits-mlp")
        (beats,) = [gate for gate in refused.gates if not gate.passed]
        assert beats.name == "beats the champion"
        assert said in beats.measured
        assert not refused.promoted
    assert "seeds" not in beats.measured
    share = np.mean(images.labels == 0) - np.mean(best.probabilities.argmax(1) == images.labels)
    assert beats.measured.startswith(f"{100 * share:+.2f} points of accuracy")
    made = find_model(home, f"digits-mlp/{refused.challenger.version}")
    assert [set(each) for each in made.judged] == [{0}] * 5
    compared = compare([f"digits-mlp/{champion.version}", made.name])
    assert compared.contestants[1].scores["accuracy"].value == np.mean(images.labels == 0)


def test_hpo_ensemble_makes_what_its_dry_run_tells(home):
    told = ensemble("digits-mlp", dry_run=True)
    assert told.version is None
    assert not read_study(home, "digits-mlp").ranked(ENSEMBLE)
    made = ensemble("digits-mlp")
    assert (made.members, made.gain) == (told.members, told.gain)
    assert made.version.aliases == ("challenger",)
    assert made.version.scores["valid_accuracy"] > 0.5
    found = find_model(home, f"digits-mlp/{made.version.version}")
    labels = validation_images(found.spec, found.card).labels
    assert np.mean([np.mean(each == labels) for each in found.judged]) == pytest.approx(made.gain.ensemble)


def test_seeds_of_a_final_training_are_candidates(home, tmp_path):
    study, _, _, kept = _kept(home, "digits-mlp", tmp_path)
    finals = {trial.number for trial in study.ranked(FINAL)}
    assert len(finals) == 2
    assert finals <= {each.trial.number for each in kept}


def test_limits_of_the_command_are_kept(home):
    small = ensemble("digits-mlp", members=2, dry_run=True)
    assert len(small.members) <= 2
    fewer = ensemble("digits-mlp", parameters=small.parameters - 1, dry_run=True)
    assert fewer.parameters < small.parameters
    with pytest.raises(HpoError, match="within the limits"):
        ensemble("digits-mlp", latency_ms=1e-6)
    done = CliRunner().invoke(app, ["ensemble", "digits-mlp", "--members", "3", "--dry-run", "--json"])
    assert len(json.loads(done.output)["members"]) <= 3


def _edited(monkeypatch, **changes: object) -> None:
    """From now on studies are opened with a spec that differs in these parts."""
    opened = Study.spec.fget
    monkeypatch.setattr(Study, "spec", property(lambda self: opened(self).model_copy(update=changes)))


def test_an_ensemble_beyond_a_limit_of_the_study_is_not_made(home, monkeypatch):
    """Its own score is known only once it is made: neither a trial nor a version is left."""
    limited = load_study("digits-mlp", overrides={**QUICK, "search.constraints": ["valid_loss <= 0"]})
    _edited(monkeypatch, search=limited.search)
    with pytest.raises(HpoError, match=r"beyond a limit of the study: valid_loss <= 0 \(it has 0\."):
        ensemble("digits-mlp")
    assert not read_study(home, "digits-mlp").ranked(ENSEMBLE)


@pytest.mark.parametrize(("asked", "most"), [(5000, 1000), (500, 500), (None, 1000)])
def test_options_only_tighten_the_constraints_of_the_study(asked, most):
    spec = load_study("digits-mlp", overrides={"search.constraints": ["parameters <= 1000"]})
    assert limits_of(spec, EnsembleSpec(parameters=asked)).parameters == most


def test_an_ensemble_keeps_the_split_whose_images_judge_it(home):
    made = ensemble("digits-mlp")
    model = find_model(home, f"digits-mlp/{made.version.version}")
    edited = load_study("digits-mlp", overrides={**QUICK, "final.split": {"kind": "holdout", "seed": 5}})
    later = replace(model, spec=edited)
    assert later.setup.split == model.setup.split
    assert later.setup.split.seed != 5


def test_views_of_an_ensemble_keep_within_its_latency(home, monkeypatch):
    """They are chosen after the members, whose times alone were within the limit."""
    asked = []

    def finish(left, data, predict):
        asked.append(predict.views)
        return finish_trial(left, data, predict)

    monkeypatch.setattr(ensemble_jobs, "finish_trial", finish)
    times = iter([[0.1] * 10, [40.0], [4.0]])
    monkeypatch.setattr(ensemble_module, "measure_latency", lambda folders: next(times)[: len(folders)])
    monkeypatch.setattr(ensemble_jobs, "measure_latency", lambda folders: next(times))
    _edited(monkeypatch, predict=PredictSpec(views="auto"))
    made = ensemble("digits-mlp", latency_ms=5.0)
    assert asked == ["auto", "off"]
    assert find_model(home, f"digits-mlp/{made.version.version}").trial.result.scores["latency_ms"] == 4.0


def test_trials_of_several_studies_on_the_same_images_are_members_of_one(home):
    told = ensemble("digits-cnn", ["digits-mlp"], dry_run=True)
    assert told.candidates == 2 + 8
    assert ensemble("digits-cnn", ["digits-mlp", "digits-mlp", "digits-cnn"], dry_run=True) == told
    done = CliRunner().invoke(app, ["ensemble", "digits-cnn", "--from", "digits-mlp", "--json", "--dry-run"])
    assert json.loads(done.output)["members"] == told.members


@pytest.mark.slow
def test_a_study_that_may_have_trained_on_the_validation_images_gives_no_member(home):
    other = load_study("digits-mlp", overrides={**QUICK, "split.seed": 5, "training.epochs": 1})
    run_study(other, trials=2, workers=0, home=home.root.parent, fresh=True)
    with pytest.raises(DataError, match="validation images of digits-cnn are not among its own"):
        ensemble("digits-cnn", ["digits-mlp"], dry_run=True)


@pytest.mark.slow
def test_a_study_that_asks_for_an_ensemble_registers_it_at_the_end_of_its_run_and_others_say_what_it_would_gain(home):
    events = []
    spec = load_study("digits-mlp", overrides={**QUICK, "final.seeds": 2})
    run_study(spec, trials=6, workers=0, home=home.root.parent, watch=events.append)
    (ended,) = [event for event in events if isinstance(event, StudyEnded)]
    assert "kept models together" in ended.ensemble
    assert not read_study(home, "digits-mlp").ranked(ENSEMBLE)
    asked = load_study("digits-mlp", overrides={**QUICK, "final.seeds": 2, "ensemble.members": 4})
    for _ in range(2):  # resumed, it is the same one
        run_study(asked, trials=6, workers=0, home=home.root.parent, watch=events.append)
        (trial,) = read_study(home, "digits-mlp").ranked(ENSEMBLE)
        assert events[-1].model.trial == trial.number
        assert resolve(home, "digits-mlp@challenger").trial == trial.number
    assert len(trial.result.members) <= 4


def test_a_final_training_learns_from_an_ensemble_and_joins_the_race(home, monkeypatch):
    made = ensemble("digits-mlp")
    taught = load_study(
        "digits-mlp", overrides={**QUICK, "final.seeds": 1, "final.teacher": f"digits-mlp/{made.version.version}"}
    )
    before = {trial.number for trial in read_study(home, "digits-mlp").ranked(FINAL)}
    run_study(taught, trials=6, workers=0, home=home.root.parent)
    (trial,) = [trial for trial in read_study(home, "digits-mlp").ranked(FINAL) if trial.number not in before]
    setup = find_model(home, f"digits-mlp#{trial.number}").setup
    assert setup.training.teacher.startswith("models:/m-")
    assert rerun(f"digits-mlp#{trial.number}").agreement == "equal"
    # A later run without the teacher writes the record of the study again; that of the training still tells of it.
    plain = load_study("digits-mlp", overrides={**QUICK, "final.seeds": 2})
    run_study(plain, trials=6, workers=0, home=home.root.parent)
    model = find_model(home, f"digits-mlp#{trial.number}")
    assert model.setup.training.teacher == setup.training.teacher
    assert [verdict.passed for verdict in base_verdict(home, model)] == [True]
    seen = digests_of_test(model.card)
    monkeypatch.setattr(overview, "development_digests", lambda _: frozenset(seen))
    assert [verdict.passed for verdict in base_verdict(home, model)] == [False]


def test_weights_are_averaged_only_where_validation_images_say_so(home):
    """Trials with one initialisation and architecture; those of other widths are left out."""
    spec = load_study(
        "digits-mlp",
        overrides={
            **QUICK,
            "training.seed": 1,
            "search.space": {"training.label_smoothing": {"choice": [0.0, 0.05, 0.1]}},
            "search.sampler": "grid",
        },
    )
    run_study(spec, trials=3, workers=0, home=home.root.parent, fresh=True)
    told = ensemble("digits-mlp", soup=True, dry_run=True)
    made = ensemble("digits-mlp", soup=True)
    assert made.members == told.members
    study = read_study(home, "digits-mlp")
    if made.version is None:
        assert not made.members or made.gain.lead.value <= 0
        return
    assert made.gain.lead.value > 0
    (trial,) = study.ranked(ENSEMBLE)
    assert trial.value >= study.best.value
    assert trial.result.parameter_count == study.best.result.parameter_count
    assert promote("digits-mlp").promoted
