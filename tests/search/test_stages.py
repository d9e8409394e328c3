from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formula import run_all, sequence, train
from hpo.errors import SpecError
from hpo.records import Candidate, StudyResult, Trial, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.search.stages import narrowed, stage_warnings, total_trials
from hpo.spec.search import WarmStart
from hpo.spec.space import Space
from hpo.storage.reader import read_study
from staged import RATE, SIZES, STAGES, worth


def of_stage(result, name):
    return [trial for trial in result.trials if trial.candidate.stage == name and trial.state.finished]


@pytest.fixture
def staged(make_spec):
    return make_spec("random", space={}, stages=STAGES)


def test_stages_run_in_order_and_build_on_the_best_before_them(home, staged):
    study = open_study(home, staged, data_digest="d")
    run_all(study, worth=worth)
    result = study.result()
    assert study.exhausted
    assert not study.blocked
    study.close()
    stages = [trial.candidate.stage for trial in result.trials]
    assert stages == ["neurons"] * 4 + ["rate"] * 6 + ["drops"] * 12 + ["joint"] * 4
    assert len(result.trials) == total_trials(staged)
    # The two best sizes are 32 and 16 or 64; each candidate has one of them, and both are explored.
    best = {trial.candidate.parameters["model.hidden"] for trial in result.ranked("neurons")[:2]}
    assert {trial.candidate.parameters["model.hidden"] for trial in of_stage(result, "rate")} == best
    pairs = {(t.candidate.parameters["model.hidden"], t.candidate.parameters["training.optimizer.lr"]) for t in
             result.ranked("rate")[:2]}  # fmt: skip
    cells = [tuple(trial.candidate.parameters.values()) for trial in of_stage(result, "drops")]
    assert len(set(cells)) == 12
    assert {cell[:2] for cell in cells} == pairs
    for trial in result.trials:
        staged.with_values(trial.candidate.parameters)
    # All that earlier stages varied, around the best of them.
    centre = max((trial for trial in result.trials if trial.candidate.stage != "joint"), key=lambda trial: trial.value)
    for trial in of_stage(result, "joint"):
        assert trial.candidate.parameters.keys() == centre.candidate.parameters.keys()
        ratio = trial.candidate.parameters["training.optimizer.lr"] / centre.candidate.parameters[
            "training.optimizer.lr"]  # fmt: skip
        assert abs(math.log10(ratio)) <= 0.75 + 1e-9


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (
            {**SIZES, "model.dropout": {"float": [0.0, 0.5]}},
            "model.dropout: was not searched, is searched always",
        ),
        ({"model.dropout": {"float": [0.0, 0.5]}}, "neurons.model.hidden: was searched always, is not searched"),
        ({"model.hidden": {**SIZES["model.hidden"], "when": {"model.kind": "mlp"}}}, "is searched when"),
    ],
)
def test_what_a_stage_with_trials_varies_stays(home, make_spec, space, said):
    first = {"name": "neurons", "space": SIZES, "trials": 4}
    study = open_study(home, make_spec("random", space={}, stages=[first, STAGES[1]]), data_digest="d")
    train(study, study.ask(budget=99, worker="w"), worth=worth)
    study.close()
    with pytest.raises(SpecError, match=said) as caught:
        open_study(home, make_spec("random", space={}, stages=[{**first, "space": space}, STAGES[1]]), data_digest="d")
    assert "--fresh" in caught.value.hint
    # A stage without trials is free to change.
    open_study(home, make_spec("random", space={}, stages=[first, STAGES[2]]), data_digest="d").close()


def test_a_space_with_trials_does_not_turn_into_stages_nor_back(home, make_spec, staged):
    study = open_study(home, make_spec("random", space=SIZES), data_digest="d")
    train(study, study.ask(budget=99, worker="w"), worth=worth)
    study.close()
    with pytest.raises(SpecError, match=r"search.space has become search.stages, and trials exist") as caught:
        open_study(home, staged, data_digest="d")
    assert "search.start_from: {study: study, best: 5}, then hpo run study --fresh" in caught.value.hint
    (earlier,) = read_study(home, "study").trials
    started = staged.search.model_copy(update={"start_from": WarmStart(study="study", best=5)})
    study = open_study(home, staged.model_copy(update={"search": started}), data_digest="d", fresh=True)
    first = study.ask(budget=99, worker="w")
    assert first.parameters == earlier.candidate.parameters, "what the message advises carries the trials over"
    train(study, first, worth=worth)
    study.close()
    with pytest.raises(SpecError, match=r"search.stages has become search.space, and trials exist"):
        open_study(home, make_spec("random", space=SIZES), data_digest="d")


@pytest.mark.slow
def test_staged_search_in_pieces_tries_the_same_candidates_as_in_one_go(home, make_spec):
    epochs = 4
    spec = make_spec("random", "hyperband", {}, stages=STAGES, epochs=epochs)
    whole = open_study(home, spec, data_digest="d")
    run_all(whole, epochs=epochs, worth=worth)
    expected = sequence(whole.result())
    whole.close()
    other = replace(home, root=home.root / "b", storage_url=f"sqlite:///{home.root / 'b' / 'optuna.db'}")
    for piece in range(30):
        study = open_study(other, spec, data_digest="d")
        study.reap()
        if piece % 2 == 0 and (broken := study.ask(budget=100, worker="w")):
            if piece % 4:
                study.tell(TrialResult(broken.number, TrialState.STOPPED))
            study.close()
            continue
        for _ in range(2):
            if candidate := study.ask(budget=100, worker="w"):
                train(study, candidate, epochs=epochs, worth=worth)
        study.close()
    study = open_study(other, spec, data_digest="d")
    result = study.result()
    study.close()
    assert result.count(TrialState.STOPPED) > 9
    assert sequence(result) == expected


def test_next_stage_waits_for_the_last_trials_of_the_one_before(home, staged):
    one, two = (open_study(home, staged, data_digest="d") for _ in range(2))
    running = [study.ask(budget=100, worker="w") for study in (one, two, one, two)]
    assert {candidate.stage for candidate in running} == {"neurons"}
    assert one.ask(budget=100, worker="w") is None
    assert one.blocked
    assert not one.exhausted
    for study, candidate in zip((one, two, one), running[:3], strict=True):
        train(study, candidate, worth=worth)
    assert one.ask(budget=100, worker="w") is None
    assert one.blocked
    two.close()
    one.reap()
    again = one.ask(budget=100, worker="w")
    assert not one.blocked
    assert (again.stage, again.parameters, again.attempt) == ("neurons", running[3].parameters, 2)
    train(one, again, worth=worth)
    assert one.ask(budget=100, worker="w").stage == "rate"
    one.close()


def test_budget_ends_a_staged_search_within_a_stage_and_more_budget_goes_on(home, staged):
    study = open_study(home, staged, data_digest="d")
    run_all(study, 7, worth=worth)
    assert not study.exhausted
    assert study.counted() == 7
    run_all(study, 11, worth=worth)
    assert [trial.candidate.stage for trial in study.result().trials] == ["neurons"] * 4 + ["rate"] * 6 + ["drops"]
    study.close()


def test_sampler_of_a_stage_learns_from_this_stage_only(home, make_spec):
    stages = [STAGES[0] | {"carry": 1}, STAGES[1]]
    seen = []
    for place, exponent in (("a", 1), ("b", 3)):
        here = replace(home, root=home.root / place, storage_url=f"sqlite:///{home.root / place / 'optuna.db'}")
        study = open_study(here, make_spec(space={}, stages=stages), data_digest="d")
        while candidate := study.ask(budget=100, worker="w"):
            # Other values in the first stage, the same winner.
            value = worth(candidate.parameters)
            value = value**exponent if candidate.stage == "neurons" else value
            study.tell(TrialResult(candidate.number, TrialState.COMPLETE, value, 1))
        seen.append([trial.candidate.parameters for trial in study.result().trials])
        study.close()
    assert seen[0] == seen[1]


@pytest.mark.parametrize("pruner", ["median", "wilcoxon", "successive_halving"])
def test_pruner_does_not_compare_across_stages(home, make_spec, pruner):
    stages = [STAGES[0] | {"carry": 1}, {"name": "rate", "space": RATE, "sampler": "random", "trials": 3}]
    study = open_study(home, make_spec("random", pruner, {}, stages=stages), data_digest="d")
    while candidate := study.ask(budget=100, worker="w"):
        value = 0.9 if candidate.stage == "neurons" else 0.1
        pruned = [study.report(candidate.number, epoch, value + epoch / 100) for epoch in range(1, 10)]
        assert not any(pruned)
        study.tell(TrialResult(candidate.number, TrialState.COMPLETE, value, 9))
    study.close()


def test_stages_may_give_one_place_other_options(home, make_spec):
    stages = [
        {"name": "coarse", "space": SIZES},
        {"name": "fine", "space": {"model.hidden": {"choice": [24, 32, 48]}, **RATE}, "trials": 3},
    ]
    study = open_study(home, make_spec("random", space={}, stages=stages), data_digest="d")
    run_all(study, worth=worth)
    fine = of_stage(study.result(), "fine")
    study.close()
    assert {trial.candidate.parameters["model.hidden"] for trial in fine} <= {24, 32, 48}
    changed = [stages[0] | {"space": {"model.hidden": {"choice": [8, 16]}}}, stages[1]]
    with pytest.raises(SpecError, match=r"search\.stages\.coarse\.model\.hidden: was .* is now"):
        open_study(home, make_spec("random", space={}, stages=changed), data_digest="d")


def test_condition_may_ask_for_what_an_earlier_stage_found(home, make_spec):
    momentum = {
        "training.optimizer.momentum": {"float": [0, 0.9], "step": 0.3, "when": {"training.optimizer.name": "sgd"}}
    }
    stages = [
        {"name": "name", "space": {"training.optimizer.name": {"choice": ["sgd", "adam"]}}, "carry": 2},
        {"name": "momentum", "space": {**momentum, "model.dropout": {"float": [0, 0.2], "step": 0.1}}},
    ]
    spec = make_spec(space={}, stages=stages)
    study = open_study(home, spec, data_digest="d")
    run_all(study, worth=lambda parameters: 0.5)
    cells = [trial.candidate.parameters for trial in of_stage(study.result(), "momentum")]
    study.close()
    assert len(cells) == 3 * 4 + 3
    assert all(("training.optimizer.momentum" in cell) == (cell["training.optimizer.name"] == "sgd") for cell in cells)
    assert total_trials(spec) == 2 + 2 * 12  # the most that it can be


def test_stage_in_which_everything_failed_stops_the_search_with_its_reason(home, staged):
    study = open_study(home, staged, data_digest="d")
    for _ in range(4):
        candidate = study.ask(budget=100, worker="w")
        study.tell(TrialResult(candidate.number, TrialState.FAILED, reason="out of memory"))
    with pytest.raises(SpecError, match="stage neurons: every trial failed: out of memory"):
        study.ask(budget=100, worker="w")
    assert study.retry_failed() == 4
    run_all(study, worth=worth)
    result = study.result()
    study.close()
    assert len(result.counted) == total_trials(staged)
    assert [trial.candidate.ordinal for trial in result.counted] == list(range(26))


def test_later_stage_keeps_its_start_when_an_earlier_one_is_extended(home, make_spec):
    stages = [{"name": "rate", "space": RATE, "trials": 2}, {"name": "neurons", "space": SIZES}]
    study = open_study(home, make_spec("random", space={}, stages=stages), data_digest="d")
    run_all(study, 4, worth=lambda parameters: parameters["training.optimizer.lr"])
    study.close()
    study = open_study(
        home, make_spec("random", space={}, stages=[stages[0] | {"trials": 9}, stages[1]]), data_digest="d"
    )
    run_all(study, worth=lambda parameters: parameters["training.optimizer.lr"])
    result = study.result()
    study.close()
    assert [trial.candidate.stage for trial in result.trials[4:]] == ["rate"] * 7 + ["neurons"] * 2
    assert len({trial.candidate.parameters["training.optimizer.lr"] for trial in of_stage(result, "neurons")}) == 1
    assert {trial.candidate.parameters["model.hidden"] for trial in of_stage(result, "neurons")} == {8, 16, 32, 64}


def test_sampler_grid_on_a_continuous_stage_is_refused(home, make_spec):
    stages = [{"name": "rate", "space": RATE, "sampler": "grid", "trials": 4}]
    with pytest.raises(SpecError, match=r"stages\.rate\.training\.optimizer\.lr, sampler grid"):
        open_study(home, make_spec(space={}, stages=stages), data_digest="d")


@given(
    low=st.integers(1, 50),
    width=st.integers(0, 500),
    at=st.floats(0, 1),
    share=st.floats(0.01, 1),
    kind=st.sampled_from(["float", "int"]),
    log=st.booleans(),
    step=st.sampled_from([None, 1, 3]),
)
def test_refined_range_holds_its_centre_and_stays_within_the_old_one(low, width, at, share, kind, log, step):
    part = {kind: [low, low + width], "log": log and step is None, "step": step}
    space = Space.model_validate({"x": part, "y": {"choice": [1, 2, 3]}, "z": part})
    grid = space["x"].grid() if step else [low + at * width]
    centre = grid[int(at * (len(grid) - 1))]
    centre = round(centre) if kind == "int" else centre
    new = narrowed(space, {"x": centre, "y": 2}, share)
    (first, last), (start, end) = new["x"].ends(), space["x"].ends()
    assert new["x"].takes(centre)
    assert start - 1e-9 <= first <= last <= end + 1e-9
    assert new["y"] == space["y"]
    assert new["z"] == space["z"]
    if step or kind == "int":
        assert space["x"].takes(first)
        if len(space["x"].grid()) > 1:
            assert first < centre or last > centre
    elif not part["log"]:
        assert last - first <= share * width + 1e-9
    else:
        assert math.log(last / first) <= share * math.log(end / start) + 1e-9


def test_refined_ends_are_those_of_the_formula():
    space = Space.model_validate(
        {
            "lr": {"float": [1e-4, 1e-1], "log": True},
            "drop": {"float": [0, 0.5], "step": 0.1},
            "batch": {"int": [16, 256], "log": True},
            "epochs": {"int": [1, 100], "when": {"lr": [0.1]}},
        }
    )
    new = narrowed(space, {"lr": 1e-2, "drop": 0.1, "batch": 256, "epochs": 50}, 1 / 3)
    assert new["lr"].ends() == pytest.approx([10**-2.5, 10**-1.5])
    assert new["drop"].ends() == pytest.approx([0, 0.2])
    assert new["batch"].ends() == [math.floor(256 / 16 ** (1 / 6)), 256]
    assert new["epochs"].ends() == [34, 66]
    assert new["epochs"].when == {"lr": [0.1]}


def _study(spec, *trials):
    done = tuple(
        Trial(
            Candidate(number, number, values, 0, stage=stage),
            TrialState.COMPLETE,
            TrialResult(number, TrialState.COMPLETE, value),
        )
        for number, (stage, values, value) in enumerate(trials)
    )
    return StudyResult("study", 1, "maximize", "valid_accuracy", done, spec.model_dump(mode="json"))


def test_warning_names_each_place_in_which_the_end_left_a_stage_choice(make_spec):
    stages = [{"name": "neurons", "space": SIZES, "carry": 2}, {"name": "rate", "space": RATE, "trials": 2}]
    spec = make_spec(space={}, stages=stages)
    start = [("neurons", {"model.hidden": 32}, 0.8), ("neurons", {"model.hidden": 8}, 0.7)]
    lr = "training.optimizer.lr"
    kept = [("rate", {"model.hidden": 32, lr: 0.1}, 0.9), ("rate", {"model.hidden": 8, lr: 0.01}, 0.85)]
    assert stage_warnings(_study(spec, *start, *kept)) == []
    left = [("rate", {"model.hidden": 32, lr: 0.1}, 0.9), ("rate", {"model.hidden": 8, lr: 0.01}, 0.95)]
    assert stage_warnings(_study(spec, *start, *left)) == [
        "stage neurons chose model.hidden=32, the best trial has 8: the stages interact"
    ]
    # The last stage's winner left it, though no longer the best of all.
    worse = [("rate", {"model.hidden": 8, lr: 0.1}, 0.75), ("rate", {"model.hidden": 32, lr: 0.01}, 0.7)]
    assert stage_warnings(_study(spec, *start, *worse)) == [
        "stage neurons chose model.hidden=32, the winner of stage rate has 8: the stages interact"
    ]
    refined_spec = make_spec(space={}, stages=[*stages, {"name": "joint", "refine": 0.5, "trials": 2}])
    for moved, expected in ((0.012, 0), (0.05, 1)):
        joint = ("joint", {"model.hidden": 8, lr: moved}, 0.99)
        warnings = stage_warnings(_study(refined_spec, *start, *left, joint))
        assert sum(lr in line for line in warnings) == expected
