from __future__ import annotations

import pytest

from formula import FINITE, FINITE_CELLS, MIXED, NUMERIC, run_all, train
from hpo.errors import SpecError
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.storage.foreign import foreign_trials

LR, DROP = "training.optimizer.lr", "model.dropout"


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "qmc"])
def test_given_candidates_come_first_and_the_sampler_draws_the_rest(home, make_spec, sampler):
    start = [{LR: 0.05, DROP: 0.2, "training.batch_size": 32}, {LR: 0.02}]
    study = open_study(home, make_spec(sampler, space=NUMERIC, start=start), data_digest="d")
    first, second, third = (study.ask(budget=9, worker="w") for _ in range(3))
    study.close()
    assert first.parameters == start[0]
    assert second.parameters[LR] == 0.02
    assert second.parameters.keys() == NUMERIC.keys()
    assert [one.ordinal for one in (first, second, third)] == [0, 1, 2]
    assert third.parameters[LR] not in (0.05, 0.02)


def test_given_candidate_that_was_interrupted_keeps_its_values(home, make_spec, monkeypatch):
    spec = make_spec(space=NUMERIC, start=[{LR: 0.05}])
    study = open_study(home, spec, data_digest="d")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study._starter, "_sign", killed)
    with pytest.raises(KeyboardInterrupt):
        study.ask(budget=9, worker="w")
    study.close()
    study = open_study(home, spec, data_digest="d")
    study.reap()
    again = study.ask(budget=9, worker="w")
    assert (again.parameters[LR], again.ordinal) == (0.05, 0)
    study.tell(TrialResult(again.number, TrialState.STOPPED))
    assert study.ask(budget=9, worker="w").parameters == again.parameters
    assert study.ask(budget=9, worker="w").parameters[LR] != 0.05
    study.close()


def test_given_values_are_cells_of_a_grid_and_the_grid_stays_whole(home, make_spec):
    start = [
        {"training.optimizer.name": "sgd", "model.hidden": [64, 32]},
        {"training.optimizer.name": "adam", "training.optimizer.momentum": 0.3},
        {"training.optimizer.name": "adam", "model.hidden": 32},
        {"model.hidden": 32, "training.optimizer.name": "adam"},
        {"training.optimizer.name": "adam", "model.hidden": [64, 32]},
        {"training.optimizer.name": "adam", "model.hidden": []},
        {"training.optimizer.name": "adam"},
    ]
    study = open_study(home, make_spec("grid", space=FINITE, start=start), data_digest="d")
    run_all(study)
    trials = [trial.candidate.parameters for trial in study.result().trials]
    study.close()
    assert start[0].items() <= trials[0].items()
    assert trials[2] == start[2]
    assert len(trials) == len({str(sorted(one.items())) for one in trials}) == FINITE_CELLS


def test_each_stage_takes_what_it_varies_of_the_given_candidates(home, make_spec):
    stages = [
        {"name": "drop", "space": {DROP: MIXED[DROP]}, "sampler": "random", "trials": 2},
        {"name": "rate", "space": {LR: MIXED[LR]}, "sampler": "random", "trials": 2},
    ]
    study = open_study(home, make_spec(space={}, stages=stages, start=[{LR: 0.05, DROP: 0.2}]), data_digest="d")
    run_all(study)
    trials = [trial.candidate.parameters for trial in study.result().trials]
    study.close()
    assert trials[0] == {DROP: pytest.approx(0.2)}
    assert trials[2][LR] == 0.05


@pytest.mark.parametrize(
    ("path", "value"), [(LR, 5), (DROP, 0.25), ("model.hidden", 33), ("training.batch_size", 20.5), (LR, "much")]
)
def test_given_value_outside_the_space_is_refused(home, make_spec, path, value):
    with pytest.raises(SpecError, match=rf"search\.start\[0\]\.{path}: .* is not in the space"):
        open_study(home, make_spec(start=[{path: value}]), data_digest="d")


def test_study_starts_from_the_best_of_another_where_they_fit(home, make_spec):
    other = open_study(home, make_spec("random", name="other"), data_digest="d")
    run_all(other, 8)
    best = [trial.candidate.parameters for trial in other.result().ranked()[:2]]
    other.close()
    lr = best[0][LR]
    space = {
        LR: {"float": [lr / 1.001, lr * 1.001]},
        DROP: MIXED[DROP],
        "training.label_smoothing": {"float": [0, 0.1]},
    }
    spec = make_spec("random", space=space, start_from={"study": "other", "best": 2}, start=[{DROP: 0.5}])
    study = open_study(home, spec, data_digest="d")
    given, first, second = (study.ask(budget=9, worker="w").parameters for _ in range(3))
    assert given[DROP] == 0.5
    assert (first[LR], first[DROP]) == (lr, best[0][DROP])
    assert second[DROP] == best[1][DROP]
    assert study.notes == [f"start_from other: {LR}={best[1][LR]!r} is not in this space and is left to the sampler."]
    study.close()
    # What it started from was written down: the other study may change.
    other = open_study(home, make_spec("random", name="other"), data_digest="d", fresh=True)
    train(other, other.ask(budget=1, worker="w"))
    other.close()
    study = open_study(home, spec, data_digest="d")
    study.reap()
    again = [study.ask(budget=9, worker="w").parameters for _ in range(3)]
    study.close()
    assert again == [given, first, second]


def test_values_that_are_drawn_per_another_place_there_but_not_here_are_left_to_the_sampler(home, make_spec):
    space = {LR: {"float": [0.01, 0.1]}, DROP: MIXED[DROP]}
    relative = {**space, LR: {**space[LR], "per": "training.batch_size", "reference": 256}}
    other = open_study(home, make_spec("random", name="other", space=relative), data_digest="d")
    train(other, other.ask(budget=1, worker="w"))
    (best,) = [trial.candidate.parameters for trial in other.result().ranked()]
    other.close()
    study = open_study(home, make_spec("qmc", space=space, start_from={"study": "other"}), data_digest="d")
    first = study.ask(budget=9, worker="w").parameters
    assert first[DROP] == best[DROP]
    assert first[LR] != best[LR], "with batches of 128 that study used half of it"
    told = f"start_from other: {LR} is drawn per training.batch_size, reference 256.0 there, not here, "
    assert study.notes == [told + "and is left to the sampler."]
    study.close()


def test_candidates_to_try_first_that_are_added_later_are_not_passed_over_in_silence(home, make_spec):
    open_study(home, make_spec(space=NUMERIC, start=[{LR: 0.05}]), data_digest="d").close()
    study = open_study(home, make_spec(space=NUMERIC, start=[{LR: 0.05}, {LR: 0.02}]), data_digest="d")
    assert study.notes == ["search.start has changed, and counts only when a study begins: --fresh begins one."]
    study.close()


def test_a_candidate_to_try_first_is_tried_although_the_one_before_it_has_left_the_space(home, make_spec):
    sizes = {"model.hidden": {"choice": [32, 64]}, DROP: {"float": [0.0, 0.5]}}
    start = [{"model.hidden": 64}, {"model.hidden": 32, DROP: 0.25}]
    study = open_study(home, make_spec(space=sizes, start=start), data_digest="d")
    train(study, study.ask(budget=9, worker="w"))
    study.close()
    others = {**sizes, "model.hidden": {"choice": [32, 128]}}
    study = open_study(home, make_spec(space=others, start=start), data_digest="d", extend=True)
    assert study.ask(budget=9, worker="w").parameters == start[1]
    assert study.ask(budget=9, worker="w").parameters not in start
    study.close()


def test_start_from_an_absent_study_names_those_there_are(home, make_spec):
    open_study(home, make_spec(name="other"), data_digest="d").close()
    with pytest.raises(SpecError, match=r"no study 'othr' has run here \(known: other\)"):
        open_study(home, make_spec(start_from={"study": "othr"}), data_digest="d")
    study = open_study(home, make_spec(start_from={"study": "other"}), data_digest="d")
    assert study.notes == ["start_from other: it has no complete trial with a path that this space varies."]
    study.close()


@pytest.fixture
def foreign(tmp_path):
    """A study of somebody's own objective, with other names."""
    import optuna

    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "j.log")))
    for place in (f"sqlite:///{tmp_path / 'f.db'}", storage):
        study = optuna.create_study(study_name="theirs", storage=place, direction="maximize")
        for value, rate, drop in ((0.5, 1e-3, 0.1), (0.9, 1e-2, 0.2), (0.7, 1e9, 0.3)):
            study.enqueue_trial({"lr": rate, DROP: drop, "other": 1})
            study.optimize(
                lambda trial, value=value: (
                    trial.suggest_float("lr", 1e-9, 1e9, log=True),
                    trial.suggest_float(DROP, 0, 1),
                    trial.suggest_int("other", 0, 3),
                    value,
                )[-1],
                n_trials=1,
            )
    return tmp_path


@pytest.mark.parametrize("file", ["f.db", "j.log"])
def test_the_best_of_a_foreign_study_are_tried_first_under_the_names_of_this_one(home, make_spec, foreign, file):
    before = (foreign / file).read_bytes()
    wanted = {"study": "theirs", "storage": str(foreign / file), "names": {"lr": LR}, "best": 2}
    study = open_study(home, make_spec(start_from=wanted), data_digest="d")
    first = study.ask(budget=5, worker="w").parameters
    assert (first[LR], first[DROP]) == (1e-2, 0.2)
    assert study.ask(budget=5, worker="w").parameters[DROP] == 0.3
    assert study.notes == [f"start_from theirs: {LR}=1000000000.0 is not in this space and is left to the sampler."]
    assert (foreign / file).read_bytes() == before


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"study": "mine", "storage": "f.db"}, "cannot be read"),
        ({"study": "theirs", "storage": "none.db"}, "no such file"),
    ],
)
def test_a_foreign_study_that_cannot_be_read_is_one_clear_error(home, make_spec, foreign, wanted, message):
    wanted["storage"] = str(foreign / wanted["storage"])
    with pytest.raises(SpecError, match=message):
        open_study(home, make_spec(start_from=wanted), data_digest="d")


def test_an_address_of_sqlite_is_a_file_that_is_never_created(home, make_spec, foreign):
    found = foreign / "f.db"
    before = found.read_bytes()
    for driver in ("sqlite", "sqlite+pysqlite"):
        wanted = {"study": "theirs", "storage": f"{driver}:///{foreign / 'typo.db'}"}
        with pytest.raises(SpecError, match=r"typo\.db: no such file"):
            open_study(home, make_spec(start_from=wanted), data_digest="d")
    assert not (foreign / "typo.db").exists()
    assert foreign_trials("theirs", f"sqlite:///{found}")[0]["lr"] == 1e-2
    assert found.read_bytes() == before


def test_trials_of_a_foreign_study_that_violate_a_constraint_are_left_out(tmp_path):
    import optuna

    study = optuna.create_study(study_name="theirs", storage=f"sqlite:///{tmp_path / 'c.db'}", direction="maximize")

    def objective(trial):
        value = trial.suggest_float("value", 0, 1)
        trial.set_constraint("size", value - 0.5)
        return value

    for value in (0.4, 0.9):
        study.enqueue_trial({"value": value})
        study.optimize(objective, n_trials=1)
    assert foreign_trials("theirs", str(tmp_path / "c.db")) == [{"value": 0.4}]


def test_a_password_does_not_enter_the_record_of_a_study(make_spec):
    with pytest.raises(SpecError, match="must not hold a password"):
        make_spec(start_from={"study": "a", "storage": "postgresql+psycopg://me:secret@host/db"})
