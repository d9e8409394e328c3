"""A study that grows: no trial is lost, those that fit count on, and the same candidates follow after interruptions."""

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import optuna
import pytest

from formula import run_all, sequence, train
from hpo.errors import SpecError, StoreError
from hpo.home import Home
from hpo.locks import ask_lock, lock
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.spec.study import set_place
from hpo.storage.reader import read_snapshots

FIRST = {
    "training.optimizer.lr": {"float": [1e-3, 1e-1], "log": True},
    "training.optimizer.name": {"choice": ["sgd", "adam"]},
    "model.hidden": {"choice": [32, 64, [64, 32]]},
}
# A wider and narrower range, new and removed choices, and a new parameter that one optimizer has.
SECOND = {
    "training.optimizer.lr": {"float": [5e-3, 3e-1], "log": True},
    "training.optimizer.name": {"choice": ["adam", "sgd", "rmsprop"]},
    "model.hidden": {"choice": [32, [64, 32], 128]},
    "training.optimizer.momentum": {"float": [0.0, 0.9], "when": {"training.optimizer.name": ["sgd", "rmsprop"]}},
}
# The optimizer is fixed, dropout is new, 64 is back.
THIRD = {
    "training.optimizer.lr": {"float": [1e-3, 3e-1], "log": True},
    "model.hidden": {"choice": [32, 64, [64, 32], 128]},
    "model.dropout": {"float": [0.0, 0.5]},
}
DROPOUT = {"model.dropout": {"float": [0.0, 0.5]}}
SLOW = [("tpe", "median"), ("random", "hyperband"), ("cmaes", "none")]
SGD = {"training.optimizer.name": "sgd", "training.optimizer.momentum": 0.0}


def worth(parameters):
    lr, hidden = parameters.get("training.optimizer.lr", 0.01), parameters.get("model.hidden")
    return 1 - abs(lr - 0.02) - (0.1 if hidden == 64 else 0.2) - 0.1 * parameters.get("model.dropout", 0.0)


@pytest.fixture
def study_of(home):
    """open(spec, extend) on one home."""

    def opened(spec, *, extend=False, place=None):
        return open_study(place or home, spec, data_digest="d", extend=extend)

    return opened


def fixed_to(spec, values):
    plain = spec.model_dump()
    for path, value in values.items():
        set_place(plain, path, value)
    return type(spec).model_validate(plain)


def run(study_of, spec, budget, **options):
    study = study_of(spec, **options)
    run_all(study, budget, worth=worth)
    result, notes = study.result(), study.notes
    study.close()
    return result, notes


def fits_second(trial):
    parameters = trial.candidate.parameters
    return parameters["training.optimizer.lr"] >= 5e-3 and parameters["model.hidden"] != 64


def test_what_changed_is_told_and_nothing_happens_without_extend(study_of, make_spec):
    before, _ = run(study_of, make_spec("random", space=FIRST), 12)
    fit = sum(map(fits_second, before.trials))
    assert 0 < fit < 12
    with pytest.raises(SpecError) as caught:
        study_of(make_spec("random", space=SECOND))
    text = caught.value.message
    assert "training.optimizer.lr: [0.001, 0.1] -> [0.005, 0.3], moved" in text
    assert "training.optimizer.name: new choices ['rmsprop']" in text
    assert "model.hidden: new choices [128] and without [64]" in text
    assert "training.optimizer.momentum is new, and was 0.0" in text
    assert f"{fit} of 12 trials are in the new space and count" in text
    assert "hpo run study --extend" in caught.value.hint
    again, notes = run(study_of, make_spec("random", space=FIRST), 12)
    assert (sequence(again), notes) == (sequence(before), [])


def test_trials_that_fit_count_on_and_the_others_stay_on_record(study_of, make_spec, home):
    before, _ = run(study_of, make_spec("random", space=FIRST), 12)
    fit = [trial for trial in before.trials if fits_second(trial)]
    assert "model.hidden" in before.best.candidate.parameters
    assert before.best.candidate.parameters["model.hidden"] == 64, "else its choice is not the one that goes"
    after, notes = run(study_of, make_spec("random", space=SECOND), 12, extend=True)
    assert f"{len(fit)} of 12 trials" in notes[0]
    assert [trial.number for trial in after.trials] == list(range(24 - len(fit)))
    assert [trial.result for trial in after.trials[:12]] == [trial.result for trial in before.trials]
    assert [trial.outside for trial in after.trials] == [
        index < 12 and not fits_second(trial) for index, trial in enumerate(after.trials)
    ]
    assert len(after.counted) == 12
    assert after.best.value == max(trial.value for trial in after.trials if not trial.outside)
    # They were trained with the momentum that the file had.
    assert {trial.candidate.parameters["training.optimizer.momentum"] for trial in after.trials[:12]} == {0.0}
    new = after.trials[12:]
    assert {"rmsprop", "adam", "sgd"} >= {trial.candidate.parameters["training.optimizer.name"] for trial in new}
    assert all(
        ("training.optimizer.momentum" in trial.candidate.parameters)
        == (trial.candidate.parameters["training.optimizer.name"] != "adam")
        for trial in new
    )
    snapshot = read_snapshots(home, results=True)[0].study
    assert [trial.outside for trial in snapshot.trials] == [trial.outside for trial in after.trials]


def test_samplers_and_pruners_see_old_trials_as_trials_of_the_new_space(study_of, make_spec):
    run(study_of, make_spec("random", space=FIRST), 12)
    study = study_of(make_spec("tpe", space=SECOND), extend=True)
    seen = study._starter.view(None, sampled=True).get_all_trials(study._id)
    assert {trial.number for trial in seen} == {trial.number for trial in study.result().counted}
    for trial in seen:
        assert isinstance(trial, optuna.trial.FrozenTrial)
        trial._validate()
        assert "model.hidden" not in trial.params, "its options have changed: it has a name of its own"
        assert trial.distributions["model.hidden~2"].choices == ("32", "[64, 32]", "128")
        name = trial.params["training.optimizer.name~2"]
        assert trial.params.get("training.optimizer.momentum") == (0.0 if name == "sgd" else None)
        assert trial.distributions["training.optimizer.lr"].high == 0.3
    study.close()


def grow_twice(study_of, make_spec, sampler, pruner, home, *, pieces):
    """Each space with 10 more trials; with pieces, every run is interrupted several times."""
    specs = [
        fixed_to(make_spec(sampler, pruner, space), SGD if space is THIRD else {}) for space in (FIRST, SECOND, THIRD)
    ]
    budget = 0
    for spec in specs:
        study = study_of(spec, extend=True, place=home)
        budget = study.counted() + 10
        study.close()
        for _ in range(2 if pieces else 0):
            study = study_of(spec, place=home)
            study.reap()
            for _ in range(3):
                train(study, study.ask(budget=budget, worker="w"), epochs=4, worth=worth)
            candidate = study.ask(budget=budget, worker="w")
            study.report(candidate.number, 1, 0.1)
            study.close()  # without a word, as a killed process
        study = study_of(spec, extend=not pieces, place=home)
        study.reap()
        run_all(study, budget, epochs=4, worth=worth)
        result = study.result()
        study.close()
    return result


@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [
        ("mfgp", "successive_halving"),
        *(pytest.param(*names, marks=pytest.mark.slow) for names in SLOW),
    ],
)
def test_a_study_that_grew_twice_in_pieces_is_the_one_that_grew_in_one_go(
    study_of, make_spec, tmp_path, sampler, pruner
):
    whole, pieces = (
        grow_twice(study_of, make_spec, sampler, pruner, Home.find(tmp_path / name).create(), pieces=name == "pieces")
        for name in ("whole", "pieces")
    )
    assert TrialState.STOPPED in {trial.state for trial in pieces.trials}
    assert sequence(pieces) == sequence(whole)
    assert len(whole.counted) == len(pieces.counted) >= 10
    assert sum(trial.state.finished for trial in whole.trials) == 30
    # Of the first space: all that the third has, 64 included, which the second had not.
    old = [trial for trial in whole.trials[:10] if not trial.outside]
    assert {trial.candidate.parameters["training.optimizer.name"] for trial in old} <= {"sgd"}
    assert {trial.candidate.parameters["model.dropout"] for trial in old} <= {0.0}


def test_an_interrupted_candidate_that_fits_is_tried_again_and_one_that_does_not_ends(study_of, make_spec):
    study = study_of(make_spec("random", space=FIRST))
    cut = [study.ask(budget=6, worker="w") for _ in range(6)]
    study.close()
    after, _ = run(study_of, make_spec("random", space=SECOND), 6, extend=True)
    tries = {candidate.ordinal: [] for candidate in cut}
    for trial in after.trials:
        tries.setdefault(trial.candidate.ordinal, []).append(trial)
    states = {ordinal: [trial.state for trial in trials] for ordinal, trials in tries.items()}
    fits = {trials[0].candidate.ordinal: fits_second(trials[0]) for trials in tries.values()}
    again = [ordinal for ordinal in range(6) if states[ordinal][-1] is TrialState.COMPLETE]
    assert again == [ordinal for ordinal in range(6) if fits[ordinal]]
    assert 0 < len(again) < 6
    for ordinal in again:
        first, last = tries[ordinal]
        assert last.candidate.parameters == first.candidate.parameters
        assert last.candidate.seed == first.candidate.seed
    assert len(after.counted) == 6


def test_no_space_changes_under_a_running_trial(study_of, make_spec):
    study = study_of(make_spec("random", space=FIRST))
    candidate = study.ask(budget=3, worker="w")
    with pytest.raises(SpecError, match="trials are running") as caught:
        study_of(make_spec("random", space=SECOND), extend=True)
    assert "hpo stop" in caught.value.hint
    study.tell(TrialResult(candidate.number, TrialState.COMPLETE, 0.5))
    study.close()
    study_of(make_spec("random", space=SECOND), extend=True).close()


def test_who_had_the_study_open_hands_out_no_candidate_of_the_space_before_it_grew(study_of, make_spec, home):
    one = study_of(make_spec("random", space={"model.hidden": {"choice": [32, 64]}}))
    train(one, one.ask(budget=9, worker="w"), worth=worth)
    other = study_of(make_spec("random", space={"model.hidden": {"choice": [64, 128]}}), extend=True)
    with pytest.raises(StoreError, match="study: its space has changed meanwhile") as caught:
        one.ask(budget=9, worker="w")
    assert "hpo run study" in caught.value.hint
    run_all(other, 9, worth=worth)
    result = other.result()
    assert {trial.candidate.parameters["model.hidden"] for trial in result.counted} == {64, 128}
    one.close()
    other.close()


def test_who_had_the_study_open_neither_trains_its_best_nor_finds_enough_once_the_space_has_grown(study_of, make_spec):
    one = study_of(make_spec("random", space=FIRST, final={}, enough={"gain": 0.1}))
    train(one, one.ask(budget=9, worker="w"), worth=worth)
    best = one.result().best.candidate.parameters
    other = study_of(make_spec("random", space=SECOND, final={}, enough={"gain": 0.1}), extend=True)
    with pytest.raises(StoreError, match="its space has changed meanwhile"):
        one.enqueue_finals([(best, 1)])
    with pytest.raises(StoreError, match="its space has changed meanwhile"):
        one.verdict.conclude("enough for the smaller space")
    assert other.ask_final(worker="w") is None
    assert other.result().enough == ""
    one.close()
    other.close()


def test_who_had_the_study_open_draws_nothing_beyond_a_range_that_was_narrowed_meanwhile(study_of, make_spec):
    def spec(low, high):
        return make_spec("random", space={"model.dropout": {"float": [low, high]}})

    one = study_of(spec(0.0, 0.9))
    study_of(spec(0.0, 0.95)).close()
    train(one, one.ask(budget=9, worker="w"), worth=worth)  # a wider range takes its trials
    study_of(spec(0.0, 0.0001 + one.result().trials[0].candidate.parameters["model.dropout"])).close()
    with pytest.raises(StoreError, match="its space has changed meanwhile"):
        one.ask(budget=9, worker="w")
    one.close()


def test_what_is_enough_for_another_limit_ends_no_search(study_of, make_spec):
    loose, tight = (study_of(make_spec(space=FIRST, enough={"gain": gain})) for gain in (0.1, 0.01))
    loose.verdict.conclude("at most 0.05")
    assert (loose.verdict.told, tight.verdict.told) == ("at most 0.05", "")
    loose.close()
    tight.close()


@pytest.mark.parametrize("staged", [False, True])
def test_a_range_whose_ends_have_moved_is_modelled_with_the_trials_of_before(study_of, make_spec, staged):
    def spec(high):
        space = {"model.dropout": {"float": [0.0, 0.5]}, "training.optimizer.lr": {"float": [1e-3, high], "log": True}}
        if staged:
            return make_spec("gp", space={}, stages=[{"name": "only", "space": space, "trials": 20}])
        return make_spec("gp", space=space)

    run(study_of, spec(0.1), 4)
    study = study_of(spec(0.2))
    train(study, study.ask(budget=9, worker="w"), worth=worth)
    stage = study._starter.progress.current(study._index()).stage
    trials = study._starter.sampler_view(stage).study(sampler=None, pruner=None).get_trials(deepcopy=False)
    together = optuna.search_space.intersection_search_space(trials)
    assert set(together) == {stage.label("model.dropout"), stage.label("training.optimizer.lr")}
    assert len(trials) == 5
    study.close()


def test_a_stage_learns_nothing_of_what_its_narrower_range_has_no_more(study_of, make_spec):
    def spec(high):
        space = {"model.dropout": {"float": [0.0, high]}}
        return make_spec("gp", space={}, stages=[{"name": "only", "space": space, "trials": 20}])

    before, _ = run(study_of, spec(0.9), 8)
    inside = [trial.number for trial in before.trials if trial.candidate.parameters["model.dropout"] <= 0.5]
    assert 0 < len(inside) < 8
    study = study_of(spec(0.5))
    stage = study._starter.progress.current(study._index()).stage
    assert [trial.number for trial in study._starter.sampler_view(stage).get_all_trials(study._id)] == inside
    study.close()


def test_a_space_grows_only_while_nobody_asks(study_of, make_spec, home):
    study_of(make_spec("random", space=FIRST)).close()
    with ThreadPoolExecutor() as pool:
        with lock(home, ask_lock("study")):
            growing = pool.submit(study_of, make_spec("random", space=SECOND), extend=True)
            with pytest.raises(TimeoutError):
                growing.result(1.5)
        growing.result(20).close()


def test_no_space_changes_once_final_trainings_have_begun(study_of, make_spec):
    study = study_of(make_spec("random", space=FIRST))
    run_all(study, 2, worth=worth)
    study.enqueue_finals([(study.result().best.candidate.parameters, 1)])
    study.close()
    with pytest.raises(SpecError, match="final trainings have begun") as caught:
        study_of(make_spec("random", space=SECOND), extend=True)
    assert "--fresh" in caught.value.hint


def test_a_wider_range_goes_on_without_a_word_from_the_user_and_a_lost_trial_does_not(study_of, make_spec):
    space = {"model.dropout": {"float": [0.1, 0.5]}}
    run(study_of, make_spec("random", space=space), 4)
    wider, notes = run(study_of, make_spec("random", space={"model.dropout": {"float": [0.0, 0.6]}}), 6)
    told = "The search space has changed: model.dropout: [0.1, 0.5] -> [0.0, 0.6], wider. "
    assert notes == [f"{told}4 of 4 trials are in the new space and count."]
    assert len(wider.counted) == 6
    with pytest.raises(SpecError, match="narrower"):
        study_of(make_spec("random", space={"model.dropout": {"float": [0.0, 0.001]}}))


def test_a_grid_that_grew_runs_the_cells_that_no_trial_has(study_of, make_spec):
    small = {"model.hidden": {"choice": [32, 64]}}
    run(study_of, make_spec("grid", space=small), 100)
    large = {"model.hidden": {"choice": [64, 128]}, "training.optimizer.name": {"choice": ["adam", "sgd"]}}
    name = make_spec(space=small).training.optimizer.name
    result, _ = run(study_of, make_spec("grid", space=large), 100, extend=True)
    cells = [
        (trial.candidate.parameters["model.hidden"], trial.candidate.parameters["training.optimizer.name"])
        for trial in result.counted
    ]
    assert sorted(cells) == [(64, "adam"), (64, "sgd"), (128, "adam"), (128, "sgd")]
    assert [trial.outside for trial in result.trials[:2]] == [
        trial.candidate.parameters["model.hidden"] == 32 for trial in result.trials[:2]
    ]
    assert {trial.candidate.parameters["training.optimizer.name"] for trial in result.trials[:2]} == {name}


def test_failed_trials_are_retried_where_they_fit(study_of, make_spec):
    study = study_of(make_spec("random", space=FIRST))
    for _ in range(6):
        candidate = study.ask(budget=6, worker="w")
        study.tell(TrialResult(candidate.number, TrialState.FAILED, reason="no luck"))
    before = study.result()
    study.close()
    study = study_of(make_spec("random", space=SECOND), extend=True)
    assert study.retry_failed() == sum(map(fits_second, before.trials))
    run_all(study, 6, worth=worth)
    result = study.result()
    study.close()
    retried = [trial for trial in result.trials if trial.candidate.attempt > 1]
    by_ordinal = {trial.candidate.ordinal: trial.candidate.parameters for trial in result.trials[:6]}
    assert retried
    assert all(
        trial.candidate.parameters["model.hidden"] == by_ordinal[trial.candidate.ordinal]["model.hidden"]
        for trial in retried
    )


def test_a_new_meaning_of_values_cannot_be_grown_into(study_of, make_spec):
    run(study_of, make_spec("random", space=FIRST), 2)
    per = {
        **FIRST,
        "training.optimizer.weight_decay": {"float": [1e-5, 1e-3], "per": "training.batch_size", "reference": 64},
    }
    with pytest.raises(SpecError, match="other settings"):
        study_of(make_spec("random", space=per), extend=True)


def test_an_interrupted_candidate_is_not_handed_out_beyond_a_narrower_range(study_of, make_spec):
    study = study_of(make_spec("random", space=DROPOUT))
    candidates = [study.ask(budget=6, worker="w") for _ in range(6)]
    dropouts = sorted(candidate.parameters["model.dropout"] for candidate in candidates)
    end = (dropouts[-2] + dropouts[-1]) / 2
    for candidate in candidates:
        if candidate.parameters["model.dropout"] < end:
            train(study, candidate, worth=worth)
        else:
            study.tell(TrialResult(candidate.number, TrialState.STOPPED))
    study.close()
    narrow = make_spec("random", space={"model.dropout": {"float": [0.0, end]}})
    with pytest.raises(SpecError, match="of those that have not ended 1 are not in it"):
        study_of(narrow)
    result, _ = run(study_of, narrow, 6, extend=True)
    assert len(result.counted) == 6
    assert max(trial.candidate.parameters["model.dropout"] for trial in result.counted) <= end


def test_trials_count_again_once_the_space_comes_back_to_them_without_extend(study_of, make_spec):
    wide = make_spec("random", space=DROPOUT)
    run(study_of, wide, 8)
    study = study_of(make_spec("random", space={"model.dropout": {"float": [0.25, 0.5]}}), extend=True)
    fit = study.counted()
    study.close()
    assert 0 < fit < 8
    study = study_of(wide)
    assert "8 of 8 trials are in the new space and count" in study.notes[0]
    assert study.counted() == len(study.result().counted) == 8
    study.close()


@pytest.mark.parametrize("old", ["null", "absent"])
def test_a_new_parameter_has_the_value_that_it_had_null_included(study_of, make_spec, home, old):
    """Null is what training.patience had, by the study file or by the default of a record without it."""
    spec = make_spec("random", space=DROPOUT)
    assert spec.training.patience is None
    run(study_of, spec, 3)
    if old == "absent":
        with closing(sqlite3.connect(home.storage_url.removeprefix("sqlite:///"))) as database:
            [(text,)] = database.execute("SELECT value_json FROM study_user_attributes WHERE key = 'hpo.study'")
            record = json.loads(text)
            del record["spec"]["training"]["patience"]
            database.execute(
                "UPDATE study_user_attributes SET value_json = ? WHERE key = 'hpo.study'", (json.dumps(record),)
            )
            database.commit()
    grown = make_spec("random", space={**DROPOUT, "training.patience": {"int": [3, 5]}})
    study = study_of(fixed_to(grown, {"training.patience": 5}), extend=True)
    assert "training.patience is new, and was None" in study.notes[0]
    assert study.counted() == 0
    study.close()
