"""A study of thousands of trials: asking costs what it costs in a short one, and asks the same whoever asks."""

from __future__ import annotations

import itertools
import shutil
import sys
from dataclasses import replace

import optuna
import pytest

from formula import objective, train
from hpo.home import Home
from hpo.search.lifecycle import open_study
from hpo.storage.reader import list_trials, read_study
from hpo.storage.trial_index import BEST, LATEST, MOST, OTHERS, EndedTrials
from many_trials import CONDITIONAL, GRID, SPACE, make_study
from search_fixtures import specify

SHORT, LONG = 510, 1500
SEARCHES = {
    "tpe": ("tpe", SPACE),
    "conditional": ("tpe", CONDITIONAL),
    "random": ("random", SPACE),
    "grid": ("grid", GRID),
}


def calls_of(work) -> int:
    """How many functions are called meanwhile."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def told(home, spec, count, *, pruned=False):
    """A handle on a study of so many trials, and what one more trial calls."""
    make_study(home, spec, count, images=10)
    study = open_study(home, spec, data_digest="sha256:0")

    def one():
        train(study, study.ask(budget=10_000, worker="w"), epochs=1)

    one()
    calls = min(calls_of(one) for _ in range(3))
    study.close()
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("search", SEARCHES)
def test_asking_and_telling_stays_as_quick_when_the_study_grows(home, make_spec, search):
    sampler, space = SEARCHES[search]
    short = told(home, make_spec(sampler, space=space, name="short"), SHORT)
    long = told(home, make_spec(sampler, space=space, name="long"), LONG)
    # A study of three times the length; what still grows is a list or two, in steps that no function is called for.
    assert long < 1.3 * short


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A folder with a study of so many random trials, and what specifies it."""
    folder = tmp_path_factory.mktemp("short")
    spec = specify(pruner="median", space=SPACE)
    make_study(Home.at(folder), spec, SHORT, images=10)
    return folder, spec


@pytest.fixture
def long_home(short, tmp_path):
    """A copy of it."""
    return Home.at(shutil.copytree(short[0], tmp_path / "copy"))


def test_reading_a_study_again_reads_only_what_is_new(long_home, short):
    study = open_study(long_home, short[1], data_digest="sha256:0")
    first = calls_of(study.result)
    train(study, study.ask(budget=10_000, worker="w"), epochs=1)
    assert calls_of(study.result) < first / 4
    assert len(study.result().trials) == SHORT + 1
    study.close()


@pytest.mark.slow
def test_long_study_resumed_asks_what_it_would_have_asked_unbroken(tmp_path, home, make_spec):
    spec = make_spec("tpe", space=SPACE)
    make_study(home, spec, SHORT, images=10)
    shutil.copytree(home.root, tmp_path / "other" / "mlruns")
    other = Home.at(tmp_path / "other")

    def ask(place, pieces):
        asked = []
        for piece in pieces:
            study = open_study(place, spec, data_digest="sha256:0")
            for _ in range(piece):
                asked.append(study.ask(budget=10_000, worker="w"))
                train(study, asked[-1], epochs=1)
            study.close()
        return asked

    unbroken = ask(home, [6])
    assert ask(other, [1, 2, 3]) == unbroken
    assert len({str(candidate.parameters) for candidate in unbroken}) == 6


def ended(number, *values, broken=0.0):
    """A complete trial as EndedTrials takes it."""
    trial = optuna.trial.create_trial(values=values, system_attrs={"constraints:limit": broken})
    trial.number = number
    return trial


def test_samplers_see_the_best_the_latest_and_some_of_all_others():
    ended_trials = EndedTrials([True])
    for number in range(5000):
        trial = ended(number, -abs(number - 1000.0), broken=float(number == 1000))
        ended_trials.add(trial, trial)
        if number < MOST:
            assert ended_trials.sample() == ended_trials.visible
    shown = [trial.number for trial in ended_trials.sample()]
    assert shown == sorted(set(shown))
    assert len(shown) <= MOST
    assert {*range(5000 - LATEST, 5000)} <= {*shown}
    # The one that breaks a limit is not among the best.
    assert {number for number in range(1000 - BEST // 2, 1000 + BEST // 2 + 1) if number != 1000} <= {*shown}
    others = [number for number in shown if number < 900 or 1100 < number < 4900]
    assert OTHERS / 2 - 20 <= len(others) <= OTHERS
    assert max(later - one for one, later in itertools.pairwise(others) if one > 1100) < 50


def test_what_samplers_see_does_not_depend_on_the_order_in_which_trials_ended():
    trials = [ended(number, float(number * 7919 % 1009)) for number in range(2000)]
    forwards, backwards = EndedTrials([False]), EndedTrials([False])
    for one, other in zip(trials, trials[::-1], strict=True):
        forwards.add(one, one)
        backwards.add(other, other)
    assert forwards.sample() == backwards.sample()


def test_with_several_objectives_samplers_see_the_front():
    ended_trials = EndedTrials([True, False])
    for number in range(3000):
        spoilt = float(number % 100 != 7)  # one in a hundred is on the front
        trial = ended(number, number - 5000 * spoilt, number + 5000 * spoilt)
        ended_trials.add(trial, trial)
    assert {*range(7, 3000, 100)} <= {trial.number for trial in ended_trials.sample()}


def test_pruners_see_every_trial(long_home, short):
    study = open_study(long_home, short[1], data_digest="sha256:0")
    candidate = study.ask(budget=10_000, worker="w")
    sampled = study._starter.view(None, sampled=True).get_all_trials(study._id, deepcopy=False)
    assert len(sampled) < SHORT
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            study._starter.pruner, "prune", lambda view, trial: seen.extend(view.get_trials(deepcopy=False)) or False
        )
        study.report(candidate.number, 1, objective(candidate.parameters))
    assert len(seen) == SHORT + 1
    study.close()


def test_list_of_trials_says_what_the_study_says_but_for_the_bulk(home, make_spec):
    for fresh in (False, True):
        spec = make_spec(space=SPACE)
        open_study(home, spec, data_digest="sha256:0", fresh=fresh).close()
        make_study(home, spec, 30 + fresh, images=10)
    for name, count in (("study", 31), ("study~2", 31), ("study~1", 30)):
        known = read_study(home, name)
        assert len(known.trials) == count
        short = tuple(replace(t, result=replace(t.result, epochs=(), predicted="")) for t in known.trials)
        assert list_trials(home, name) == replace(known, trials=short)
