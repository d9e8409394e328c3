"""Who follows a study sees what its supervisors did, once and in order."""

from __future__ import annotations

from formula import run_all, train
from hpo.events import TrialEnded, TrialStarted
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import ask_to_stop, open_study
from hpo.storage.reader import StudyWatcher


def test_follower_tells_each_trial_once_with_its_result_and_what_was_best(home, make_spec):
    study = open_study(home, make_spec(trials=12), data_digest="d")
    run_all(study, budget=3)
    follower = StudyWatcher(home, study.result())
    assert follower.new_events() == []
    assert follower.finished == 3
    told = []
    while candidate := study.ask(budget=8, worker="w"):
        told += follower.new_events()
        train(study, candidate, epochs=1)
        told += follower.new_events()
    assert follower.new_events() == []
    begun = [event for event in told if isinstance(event, TrialStarted)]
    ended = [event for event in told if isinstance(event, TrialEnded)]
    trials = study.result().trials
    assert [event.candidate for event in begun] == [trial.candidate for trial in trials[3:]]
    assert [event.result for event in ended] == [trial.result for trial in trials[3:]]
    best, marked = max(trial.value for trial in trials[:3]), []
    for trial in trials[3:]:
        marked.append(trial.value > best)
        best = max(best, trial.value)
    assert [event.best for event in ended] == marked
    assert follower.finished == 8
    study.close()


def test_trial_that_began_and_ended_between_two_looks_is_told_as_both(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    follower = StudyWatcher(home, study.result())
    run_all(study, budget=2)
    assert [type(event) for event in follower.new_events()] == [TrialStarted, TrialEnded] * 2
    study.close()


def test_stopped_trial_counts_once_its_retry_is_done(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    follower = StudyWatcher(home, study.result())
    study.tell(TrialResult(study.ask(budget=2, worker="w").number, TrialState.STOPPED, reason="interrupted"))
    (_, ended) = follower.new_events()
    assert ended.result.state is TrialState.STOPPED
    assert follower.finished == 0
    run_all(study, budget=2)
    follower.new_events()
    assert follower.finished == 2
    assert study.retry_failed() == 0
    study.close()


def test_follower_knows_when_a_study_was_summed_up_and_whether_anything_was_new(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    run_all(study, budget=2)
    assert study.claim_end()
    follower = StudyWatcher(home, study.result())
    follower.new_events()
    assert follower.over
    assert not follower.renewed
    run_all(study, budget=4)
    follower.new_events()
    assert follower.renewed
    assert not follower.over
    assert study.claim_end()
    follower.new_events()
    assert follower.over
    study.close()


def test_follower_sees_a_stop_that_was_asked_for_since_it_began(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    ask_to_stop(home, study.title, "earlier")
    follower = StudyWatcher(home, study.result())
    follower.new_events()
    assert not follower.stopped
    ask_to_stop(home, study.title, "now")
    follower.new_events()
    assert follower.stopped
    study.close()
