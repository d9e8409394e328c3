"""Pictures of a study: drawn for any kind of it, with every trial in its place."""

from dataclasses import replace

import pytest

from figure_checks import faults
from hpo.metrics import highest_of
from hpo.records import ENSEMBLE, StudyResult, TrialState
from hpo.report.figures import PHONE, for_phone, pairs, robust_limits, space
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
    "heat": pairs.heat_map,
    "contour": lambda study: pairs.contour(study, {}),
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
    drawn = [number for points in panel.collections for number in points.get_gid().removeprefix("trials-").split("-")]
    assert set(map(int, drawn)) == {trial.number for trial in values}
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
    (mean, *_) = [lines for lines in panel.collections if hasattr(lines, "get_segments")]
    assert mean.get_segments()[0][0][1] == pytest.approx(sum(trial.value for trial in trials) / len(trials))
    assert f"n={len(trials)}" in [text.get_text() for text in panel.texts]


def test_fewer_than_five_values_are_dots_and_of_one_trial_those_of_its_folds():
    panel = next(panel for panel in space.effects(staged_study()).axes if panel.get_title() == "activation")
    dots = panel.collections[0].get_offsets()
    for place, trial in enumerate(staged_study().ranked("activation")):
        where = {"relu": 0, "tanh": 1}[trial.candidate.parameters["model.activation"]]
        assert sorted(y for x, y in dots if x == where) == pytest.approx([trial.value + d for d in (-0.03, 0, 0.03)])
        assert place < 2
    assert not panel.containers


def test_from_five_values_on_an_effect_is_a_mean_with_its_deviation():
    panel = next(panel for panel in space.effects(random_study()).axes if panel.get_title() == "model")
    (bars,) = panel.containers
    assert len(bars.lines[0].get_xdata()) == 3


def _with_values(values):
    study = random_study(len(values))
    trials = [replace(t, state=TrialState.COMPLETE, result=replace(t.result, value=v, state=TrialState.COMPLETE))
              for t, v in zip(study.trials, values, strict=True)]  # fmt: skip
    return replace(study, trials=tuple(trials))


def test_two_early_failures_do_not_squash_the_axis_and_are_marked_at_its_edge():
    values = [0.05, 0.1] + [0.9 + 0.005 * n for n in range(18)]
    for draw in (course.optimisation_history, space.slices):
        panel = draw(_with_values(values)).axes[0]
        low, high = panel.get_ylim()
        assert 0.85 < low < 0.9
        assert 0.985 < high < 1.02
        assert "2 below 0.9" in [text.get_text() for text in panel.texts]
        marks = [each for each in panel.collections if (each.get_gid() or "") == "trials-0-1"]
        assert len(marks) == 1
        assert all(low < y < 0.9 for _, y in marks[0].get_offsets())


def test_an_axis_without_outliers_shows_all_and_says_nothing():
    values = [0.5 + 0.02 * n for n in range(20)]
    panel = course.optimisation_history(_with_values(values)).axes[0]
    assert panel.get_ylim()[0] < 0.5
    assert not panel.texts


@pytest.mark.parametrize("values", [[], [0.9], [0.9] * 7, [0.9] * 7 + [0.1], [float("nan"), 0.3, 0.4]])
def test_limits_hold_every_kind_of_values(values):
    low, high = robust_limits(values)
    assert low <= high
    finite = [value for value in values if value == value]
    assert not finite or (low, high) == (min(finite), max(finite))


def test_colours_end_at_the_largest_possible_score():
    study = _with_values([0.95 + 0.002 * n for n in range(26)])
    figure = pairs.contour(study, {})
    bar = figure.axes[1]
    assert bar.get_ylim()[1] == pytest.approx(1.0)
    assert max(bar.get_yticks()) <= 1.0
    assert highest_of("valid_accuracy") == 1.0
    assert highest_of("valid_loss") == highest_of("parameters") == highest_of("my.module:score") == float("inf")


def test_on_a_phone_figures_are_narrow_and_no_label_is_cut():
    for study in STUDIES.values():
        with for_phone():
            figures = {kind: draw(study) for kind, draw in DRAWN.items()}
        shown = {kind: figure for kind, figure in figures.items() if figure is not None}
        assert all(figure.get_figwidth() <= PHONE for figure in shown.values())
        found = {kind: faults(figure) for kind, figure in shown.items()}
        assert {kind: each for kind, each in found.items() if each} == {}


def test_the_heat_map_frames_the_best_cell_of_each_grid():
    figure = pairs.heat_map(staged_study())
    panel = next(panel for panel in figure.axes if panel.get_title() == "size")
    best = staged_study().ranked("size")[0]
    bold = [text.get_text() for text in panel.texts if text.get_fontweight() == "bold"]
    assert bold == [f"{best.value:.4f}"]
    assert len(panel.texts) == 12


def test_an_ensemble_which_no_worker_trains_is_not_in_the_timeline():
    study = random_study()
    last = study.trials[-1]
    made = replace(
        last, candidate=replace(last.candidate, number=last.number + 1, stage=ENSEMBLE), started=2e9, worker=""
    )
    rows = [
        [label.get_text() for label in course.timeline(each).axes[0].get_yticklabels()]
        for each in (study, replace(study, trials=(*study.trials, made)))
    ]
    assert rows == [["worker 0", "worker 1"]] * 2


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
    panel = pairs.contour(random_study(), shares).axes[0]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("batch_size", "weight_decay")


def test_nothing_is_drawn_of_importances_that_could_not_be_had():
    assert course.importance_figure({}) is None
    assert isinstance(random_study(), StudyResult)
