"""The text of a finished run: the winner and what to type next."""

from dataclasses import replace

from hpo.report.summary import study_summary
from made_studies import random_study, staged_study, two_objectives


def test_the_summary_names_the_winner_its_scores_and_the_next_commands():
    study = random_study()
    text = study_summary(study, winner=study.best, model="random", remarks=["final: a tie."])
    assert f"**Winner: trial {study.best.number}**, validation accuracy **{study.best.value:.4f}**" in text
    assert "| training.optimizer.lr |" in text
    assert "Why?" in text
    assert "final: a tie." in text
    for command in ("hpo report random", "hpo promote random", "hpo predict random IMAGE", "--trials 45"):
        assert command in text


def test_commands_that_need_a_model_wait_for_one():
    study = random_study()
    text = study_summary(study, winner=None)
    assert "Best of the search so far" in text
    assert "promote" not in text


def test_scores_of_folds_come_with_their_deviation_and_stages_with_their_winners():
    study = staged_study()
    text = study_summary(study, winner=study.best)
    assert "± 0.0300" in text
    assert text.count("| size | 12 |") == 1
    assert "--trials" not in text


def test_several_objectives_are_listed_and_an_empty_study_says_so():
    study = two_objectives()
    assert "Pareto front" in study_summary(study, winner=study.best)
    assert "no winner" in study_summary(replace(random_study(), trials=()), winner=None)
