"""sampler and pruner auto, priors of parameters, and samplers and pruners of the user's own."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
from pydantic import ValidationError
from threadpoolctl import threadpool_info, threadpool_limits

from formula import FINITE, MIXED, NUMERIC, objective, run_in_pieces, run_whole, sequence
from hpo.errors import SpecError
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study, opened
from hpo.search.mfgp import MultiFidelityGp
from hpo.search.priors import prior_share, prior_values
from hpo.search.results import misfit
from hpo.search.stages import from_unit, make_stage, to_unit
from hpo.spec.automatic import chosen_pruner, chosen_sampler
from hpo.spec.load import parse_study
from hpo.spec.own_code import named_functions
from hpo.spec.search import SearchSpec
from hpo.spec.space import Float, Int
from hpo.storage.optuna_storage import open_storage

LR = "training.optimizer.lr"


def other(home):
    root = home.root / "b"
    return replace(home, root=root, storage_url=f"sqlite:///{root / 'optuna.db'}")


def record_of(home):
    storage = open_storage(home)
    try:
        return storage.studies()["study"][1]
    finally:
        storage.close()


def test_auto_is_the_default_and_the_record_says_what_it_chose_and_why(home, make_spec):
    assert (SearchSpec(space=MIXED).sampler.name, SearchSpec(space=MIXED).pruner.name) == ("auto", "auto")
    open_study(home, make_spec("auto", "auto", epochs=50), data_digest="d").close()
    chosen = record_of(home)["chosen"]
    assert chosen["sampler"]["name"] == "mfgp"
    assert chosen["pruner"]["name"] == "successive_halving"
    assert "epoch 2, 6" in chosen["pruner"]["reason"]


@pytest.mark.parametrize(
    ("changes", "sampler", "pruner"),
    [
        ({}, "mfgp", "successive_halving"),
        ({"epochs": 5}, "mfgp", "none"),
        ({"objectives": ["valid_accuracy", "parameters"]}, "tpe", "none"),
        ({"space": {"model.hidden": {"choice": list(range(1, 40))}}}, "tpe", "successive_halving"),
    ],
)
def test_auto_follows_from_space_objectives_and_epochs(make_spec, changes, sampler, pruner):
    spec = make_spec("auto", "auto", **{"epochs": 50, **changes})
    assert chosen_sampler(spec)[0].name == sampler
    assert chosen_pruner(spec)[0].name == pruner
    assert chosen_sampler(spec)[1]
    assert chosen_pruner(spec)[1]


@pytest.mark.parametrize(
    ("schedule", "space", "rung"),
    [
        ({"name": "constant"}, NUMERIC, 2),
        ({"name": "one_cycle"}, NUMERIC, 15),
        ({"name": "cosine", "warmup": 0.1}, NUMERIC, 5),
        ({"name": "cosine"}, {**NUMERIC, "training.schedule.name": {"choice": ["cosine", "one_cycle"]}}, 15),
    ],
)
def test_no_trial_is_pruned_while_its_learning_rate_rises(schedule, space, rung):
    training = {"epochs": 50, "schedule": schedule}
    pruner, reason = chosen_pruner(plain_study(training=training, space=space))
    assert pruner.min_epochs == rung
    assert ("once the learning rate has risen" in reason) == (rung > 2)
    asked, _ = chosen_pruner(plain_study(training=training, space=space, pruner={"name": "auto", "min_epochs": 3}))
    assert (asked.name, asked.min_epochs, asked.reduction_factor) == ("successive_halving", 3, 3)


def test_a_study_that_an_earlier_rule_began_keeps_its_rungs(home):
    spec = plain_study(training={"epochs": 50, "schedule": {"name": "one_cycle"}})
    open_study(home, spec, data_digest="d").close()
    storage = open_storage(home)
    number, record = storage.studies()["study"]
    assert record["chosen"]["pruner"]["min_epochs"] == 15
    record["chosen"]["pruner"] = {"name": "successive_halving", "reason": "of an earlier version"}
    storage.database.set_study_user_attr(number, "hpo.study", record)
    storage.close()
    for _ in range(2):
        resumed = open_study(home, spec, data_digest="d")
        resumed.close()
        assert chosen_pruner(resumed.spec)[0].min_epochs == 2
        assert record_of(home)["chosen"]["pruner"]["min_epochs"] == 2
    with opened(home, "study") as study:
        assert chosen_pruner(study.spec)[0].min_epochs == 2


def test_the_spec_of_a_record_has_the_rungs_of_the_file(home):
    spec = plain_study(training={"epochs": 50, "schedule": {"name": "one_cycle"}})
    open_study(home, spec, data_digest="d").close()
    assert chosen_pruner(parse_study(record_of(home)["spec"]))[0].min_epochs == 15
    with opened(home, "study") as study:
        assert chosen_pruner(study.spec)[0].min_epochs == 15


def test_every_cell_of_a_grid_is_trained_to_its_end_by_default(make_spec):
    assert chosen_pruner(make_spec("grid", "auto", FINITE, epochs=50))[0].name == "none"


def test_names_in_the_study_file_stay(make_spec):
    spec = make_spec("random", "median", epochs=50)
    assert chosen_sampler(spec) == (spec.search.sampler, "")
    assert chosen_pruner(spec) == (spec.search.pruner, "")


def plain_study(*, training=None, **search):
    search = {"space": NUMERIC, **search}
    parts = {"data": {"name": "digits"}, "model": {"kind": "mlp"}, "training": training or {}}
    return parse_study({"name": "study", **parts, "search": search})


def test_a_study_that_began_with_another_default_keeps_its_sampler_and_pruner(home):
    open_study(home, plain_study(sampler="tpe", pruner="none"), data_digest="d").close()
    resumed = open_study(home, plain_study(), data_digest="d")
    resumed.close()
    assert resumed.spec.search.sampler.name == "tpe"
    assert resumed.spec.search.pruner.name == "none"
    named = open_study(home, plain_study(sampler="auto"), data_digest="d")
    named.close()
    assert named.spec.search.sampler.name == "auto"


def with_priors(make_spec, value, confidence="medium"):
    space = {**NUMERIC, LR: {**NUMERIC[LR], "prior": {"value": value, "confidence": confidence}}}
    return make_spec("random", space=space)


def test_the_first_candidate_has_the_values_of_the_priors(home, make_spec):
    result = run_whole(home, with_priors(make_spec, 3e-3), 2)
    assert result.trials[0].candidate.parameters[LR] == 3e-3


def share_after(home, spec, trials):
    study = open_study(home, spec, data_digest="d")
    stage = make_stage(spec, 0, origins={})
    ended = study._index().ended(None).visible
    study.close()
    assert len(ended) == trials
    return prior_share(stage, ended, maximize=True)


@pytest.mark.parametrize(("value", "trusted"), [(0.01, True), (1e-4, False)])
def test_a_prior_is_trusted_as_long_as_the_best_trials_are_near_it(home, make_spec, value, trusted):
    spec = with_priors(make_spec, value, "high")
    run_whole(home, spec, 24)
    share = share_after(home, spec, 24)
    assert share > 0.4 if trusted else share < 0.1


def test_a_bad_prior_costs_little_at_the_end(home, make_spec):
    good = run_whole(home, make_spec("mfgp", space=NUMERIC), 24).best.value
    bad = run_whole(other(home), with_priors(make_spec, 1e-4, "high"), 24).best.value
    assert bad > 0.9 * good


@pytest.mark.parametrize(("first", "trusted"), [("valid_accuracy", True), ("valid_loss", False)])
def test_of_several_objectives_the_first_judges_the_priors(home, make_spec, monkeypatch, first, trusted):
    shares = []

    def draw(stage, trials, *, maximize, seed):
        shares.append(prior_share(stage, trials, maximize=maximize))
        return prior_values(stage, trials, maximize=maximize, seed=seed)

    monkeypatch.setattr("hpo.search.samplers.prior_values", draw)
    space = {**NUMERIC, LR: {**NUMERIC[LR], "prior": {"value": 0.01, "confidence": "high"}}}
    study = open_study(home, make_spec(space=space, objectives=[first, "parameters"]), data_digest="d")
    while candidate := study.ask(budget=24, worker="w"):
        # Best, or with a loss worst, where the prior is.
        scores = {first: objective(candidate.parameters), "parameters": 100.0 * candidate.number}
        study.tell(TrialResult(candidate.number, TrialState.COMPLETE, scores=scores))
    study.close()
    assert shares[-1] > 0.4 if trusted else shares[-1] < 0.1


def test_a_study_with_priors_resumes_exactly(home, make_spec):
    spec = with_priors(make_spec, 3e-3)
    expected = sequence(run_whole(home, spec, 11))
    assert sequence(run_in_pieces(other(home), spec, 11)) == expected


@pytest.mark.parametrize("prior", [1.0, {"value": 1e-9, "confidence": "low"}, "much"])
def test_a_prior_outside_of_the_range_is_refused(prior):
    with pytest.raises(ValidationError, match="is not in the range"):
        Float.model_validate({"float": [1e-4, 1e-1], "log": True, "prior": prior})


@pytest.mark.parametrize(
    "part",
    [
        Float.model_validate({"float": [1e-4, 1e-1], "log": True}),
        Float.model_validate({"float": [0, 0.5], "step": 0.1}),
        Int.model_validate({"int": [16, 256], "log": True}),
        Int.model_validate({"int": [4, 40], "step": 4}),
    ],
)
def test_places_of_a_range_give_values_that_it_takes_and_back(part):
    for place in (0.0, 0.31, 0.5, 0.99, 1.0):
        value = from_unit(part, place)
        assert part.takes(value)
        assert from_unit(part, to_unit(part, value)) == pytest.approx(value)
    assert [from_unit(part, 0), from_unit(part, 1)] == pytest.approx(part.ends())


OWN = """
import optuna
from threadpoolctl import threadpool_info

def sampler(*, seed, startup=2):
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)

def pruner(*, percentile=25.0):
    return optuna.pruners.PercentilePruner(percentile, n_startup_trials=1)

def nothing(**options):
    return 3

seen = []

class Counting(optuna.samplers.RandomSampler):
    def sample_independent(self, *given):
        seen.extend(pool["num_threads"] for pool in threadpool_info())
        return super().sample_independent(*given)

def counting(*, seed):
    return Counting(seed=seed)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_search.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_search", None)


@pytest.mark.usefixtures("own")
def test_functions_of_the_users_own_give_sampler_and_pruner_and_resume_exactly(home):
    spec = plain_study(
        sampler={"name": "my_search:sampler", "options": {"startup": 3}}, pruner={"name": "my_search:pruner"}
    )
    expected = run_whole(home, spec, 11, epochs=9)
    assert expected.count(TrialState.PRUNED)
    assert sequence(run_in_pieces(other(home), spec, 11, epochs=9)) == sequence(expected)


@pytest.mark.usefixtures("own")
def test_an_ask_computes_with_one_thread_and_gives_the_others_back(home):
    study = open_study(home, plain_study(sampler="my_search:counting"), data_digest="d")
    with threadpool_limits(2):
        study.ask(budget=1, worker="w")
        assert {pool["num_threads"] for pool in threadpool_info()} == {2}
    study.close()
    assert set(sys.modules["my_search"].seen) == {1}


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"sampler": "my_search:nothing"}, "returns int, which is no sampler of Optuna"),
        ({"pruner": "my_search:nothing"}, "returns int, which is no pruner of Optuna"),
        ({"sampler": {"name": "my_search:sampler", "options": {"odd": 1}}}, "calling it fails: TypeError"),
        ({"sampler": "my_search:absent"}, "has no function 'absent'"),
    ],
)
def test_what_is_no_sampler_or_pruner_is_refused_before_a_trial(home, search, words):
    with pytest.raises(SpecError, match=words):
        open_study(home, plain_study(**search), data_digest="d")


@pytest.mark.parametrize("part", ["sampler", "pruner"])
def test_options_without_a_function_are_refused(part):
    with pytest.raises(ValidationError, match="Leave them out"):
        SearchSpec.model_validate({"space": NUMERIC, part: {"name": "auto", "options": {"a": 1}}})


@pytest.mark.parametrize("sampler", ["auto", "mfgp"])
def test_no_startup_trials_are_as_few_as_there_can_be(home, make_spec, sampler):
    result = run_whole(home, make_spec(sampler, space=MIXED, startup=0), 5)
    assert result.count(TrialState.COMPLETE) == 5


def test_classes_of_optuna_need_no_function_and_no_trust(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = plain_study(
        sampler={"name": "optuna.samplers:TPESampler", "options": {"n_startup_trials": 2}},
        pruner={"name": "optuna.pruners:PercentilePruner", "options": {"percentile": 25.0, "n_startup_trials": 1}},
    )
    assert named_functions(spec.model_dump()) == []
    assert run_whole(home, spec, 8, epochs=9).count(TrialState.PRUNED)


def test_mfgp_learns_from_pruned_trials(home, make_spec):
    spec = make_spec("mfgp", "successive_halving", NUMERIC, startup=5)
    result = run_whole(home, spec, 24, epochs=9)
    assert result.count(TrialState.PRUNED) > 5
    values = [objective(trial.candidate.parameters) for trial in result.trials]
    assert sum(values[12:]) / 12 > sum(values[:5]) / 5


@pytest.mark.parametrize("fails", [False, True])
def test_mfgp_leaves_alone_what_was_refused_or_failed(home, make_spec, fails):
    """The best is at the edge of what can be trained: without a lesson all candidates were proposed beyond it."""
    study = open_study(home, make_spec("mfgp", space=NUMERIC, startup=5), data_digest="d")
    refused = []
    for _ in range(24):
        candidate = study.ask(budget=99, worker="w")
        dropout = candidate.parameters["model.dropout"]
        refused.append(dropout < 0.25)
        result = TrialResult(candidate.number, TrialState.COMPLETE, 1 - dropout)
        if refused[-1]:
            error = ValueError("the network is larger than the image")
            failed = TrialResult(candidate.number, TrialState.FAILED, reason=str(error))
            result = failed if fails else misfit(candidate.number, error)
        study.tell(result)
    study.close()
    assert sum(refused[8:]) < 8


def test_mfgp_forgets_a_failure_once_the_candidate_was_tried_again(home, make_spec):
    study = open_study(home, make_spec("mfgp", space=NUMERIC, startup=2), data_digest="d")
    number = study.ask(budget=99, worker="w").number
    study.tell(TrialResult(number, TrialState.FAILED, reason="the disk was full"))
    assert _observed(study) == [{1.0: -math.inf}]
    assert study.retry_failed() == 1
    again = study.ask(budget=99, worker="w").number
    study.tell(TrialResult(again, TrialState.COMPLETE, 0.9))
    assert _observed(study) == [{1.0: 0.9}]
    study.close()


def _observed(study):
    """The scores that the model learns from."""
    stage = study._starter.progress.current(study._index()).stage
    seen = study._starter.sampler_view(stage).study(sampler=None, pruner=None)
    trials = seen.get_trials(deepcopy=False)
    return [each.curve for each in MultiFidelityGp(stage, seed=0)._observations(seen, trials)]
