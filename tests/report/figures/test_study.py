"""Pictures of a study: drawn for any kind of it, with every trial in its place."""

from dataclasses import replace

import pytest

from figure_checks import faults
from hpo.records import StudyResult
from hpo.report.figures import space
from hpo.report.figures import study as course
from made_studies import random_study, staged_study, two_objectives

SHARES = {"": {"PED-ANOVA": {"a.b": 0.7, "a.c": 0.3}, "fANOVA": {"a.b": 0.2, "a.c": 0.8}}}
DRAWN = {
    "history": course.optimisation_history,
    "curves": course.learning_curves,
    "timeline": course.timeline,
    "front": course.pareto_front,
    "importance": lambda _: course.importance_figure(SHARES),
    "slices": space.slices,
    "effects": space.effects,
    "loss": lambda study: space.effects(study, score="valid_loss"),
    "heat": space.heat_map,
    "contour": lambda study: space.contour(study, {}),
    "parallel": space.parallel_coordinates,
}
STUDIES = {"random": random_study(), "staged": staged_study(), "trade-off": two_objectives()}
NONE = {"random": {"front", "heat"}, "staged": {"front", "contour"}, "trade-off": {"heat"}}


@pytest.mark.parametrize("name", STUDIES)
def test_every_kind_of_study_has_its_pictures_with_no_label_cut_or_covered(name):
    figures = {kind: draw(STUDIES[name]) for kind, draw in DRAWN.items()}
    assert {kind for kind, figure in figures.items() if figure is None} == NONE[name]
    shown = {kind: faults(figure) for kind, figure in figures.items() if figure is not None}
    assert {kind: found for kind, found in shown.items() if found} == {}


def test_a_study_of_one_trial_and_one_of_none_need_no_special_care():
    study = random_study()
    for kept in (study.trials[:1], ()):
        for draw in DRAWN.values():
            draw(replace(study, trials=kept))


def test_the_history_has_every_trial_with_a_value_and_a_line_that_never_gets_worse():
    study = random_study()
    (panel,) = course.optimisation_history(study).axes
    values = [trial for trial in study.trials if trial.value is not None]
    assert sum(len(points.get_offsets()) for points in panel.collections) == len(values)
    steps = list(panel.lines[0].get_ydata())
    assert steps == sorted(steps)
    assert steps[-1] == study.best.value


def test_slices_have_the_scale_of_their_range():
    scales = {panel.get_title(): panel.get_xscale() for panel in space.slices(random_study()).axes if panel.get_title()}
    assert scales["lr"] == scales["batch_size"] == "log"
    assert scales["weight_decay"] == scales["model"] == "linear"


def test_effects_are_means_over_the_trials_that_share_a_value():
    study = staged_study()
    panel = next(panel for panel in space.effects(study).axes if panel.get_title() == "size: optimizer")
    trials = [trial for trial in study.ranked("size") if trial.candidate.parameters["training.optimizer.name"] == "sgd"]
    assert panel.lines[0].get_ydata()[0] == pytest.approx(sum(trial.value for trial in trials) / len(trials))
    assert f"n={len(trials)}" in [text.get_text() for text in panel.texts]


def test_a_value_that_one_trial_has_shows_its_deviation_over_folds():
    panel = next(panel for panel in space.effects(staged_study()).axes if panel.get_title() == "activation")
    bars = panel.collections[0].get_segments()
    assert [round(high[1] - low[1], 6) for low, high in bars] == [0.06, 0.06]


def test_the_heat_map_frames_the_best_cell_of_each_grid():
    figure = space.heat_map(staged_study())
    panel = next(panel for panel in figure.axes if panel.get_title() == "size")
    best = staged_study().ranked("size")[0]
    bold = [text.get_text() for text in panel.texts if text.get_fontweight() == "bold"]
    assert bold == [f"{best.value:.4f}"]
    assert len(panel.texts) == 12


def test_pauses_between_runs_are_cut_out_of_the_timeline():
    (panel,) = course.timeline(random_study()).axes
    assert panel.get_xlabel() == "time (minutes)"
    assert panel.get_xlim()[1] < 20
    assert "pause, cut out" in panel.get_legend_handles_labels()[1]


def test_the_front_holds_the_trials_that_no_other_beats():
    study = two_objectives()
    (panel,) = course.pareto_front(study).axes
    assert len(panel.lines[0].get_xdata()) == len(study.pareto())
    assert panel.get_xlabel() == "parameters"


def test_the_contour_shows_the_two_most_important_numeric_parameters():
    shares = {"training.batch_size": 0.5, "training.optimizer.weight_decay": 0.3, "training.optimizer.lr": 0.1}
    panel = space.contour(random_study(), shares).axes[0]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("batch_size", "weight_decay")


def test_nothing_is_drawn_of_importances_that_could_not_be_had():
    assert course.importance_figure({}) is None
    assert isinstance(random_study(), StudyResult)
