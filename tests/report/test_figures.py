"""Pictures: drawn for any study, with room for what they show."""

import numpy as np
import pytest

from hpo.records import Candidate, Epoch, StudyResult, Trial, TrialResult, TrialState
from hpo.report.figures import confusion_figure, optimisation_history, slices, training_curves

LONG = "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)"


@pytest.mark.parametrize("classes", [2, 8, 20])
def test_the_matrix_has_room_beside_long_class_names(classes):
    counts = np.random.default_rng(0).integers(0, 300, (classes, classes)).tolist()
    figure = confusion_figure(counts, [LONG, *map(str, range(classes - 1))])
    figure.canvas.draw()
    box = figure.axes[0].get_window_extent()
    width, height = figure.get_size_inches() * figure.dpi
    assert box.width > 0.4 * width
    assert box.height > 0.4 * height
    assert sum(text.get_text() != "" for text in figure.axes[0].texts) == np.count_nonzero(counts)


def test_curves_mark_the_epoch_that_was_kept():
    epochs = [
        Epoch(n, {f"{p}_{s}": 1 / n for p in ("train", "valid") for s in ("loss", "accuracy")}, 0.1, 1.0)
        for n in (1, 2, 3)
    ]
    figure = training_curves(epochs, best_epoch=2)
    assert len(figure.axes) == 2
    assert "best epoch 2" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def _study(values):
    trials = tuple(
        Trial(
            Candidate(number, number, {"a.rate": 10.0**-number, "a.kind": "x" if number % 2 else "y"}, 0),
            TrialState.COMPLETE if value else TrialState.PRUNED,
            TrialResult(number, TrialState.COMPLETE if value else TrialState.PRUNED, value or 0.1, 1),
        )
        for number, value in enumerate(values)
    )
    space = {"a.rate": {"float": [1e-9, 1.0], "log": True}, "a.kind": {"choice": ["x", "y"]}}
    return StudyResult("s", 1, "maximize", "valid_accuracy", trials, {"search": {"space": space}})


def test_the_history_has_every_trial_and_a_line_that_never_falls():
    figure = optimisation_history(_study([0.5, None, 0.4, 0.8]))
    steps = figure.axes[0].lines[0].get_ydata()
    assert list(steps) == [0.5, 0.5, 0.8]
    assert sum(len(points.get_offsets()) for points in figure.axes[0].collections) == 4


def test_slices_have_a_panel_for_each_parameter_and_the_scale_of_its_range():
    figure = slices(_study([0.5, 0.6, 0.7]))
    scales = {panel.get_xlabel(): panel.get_xscale() for panel in figure.axes if panel.get_visible()}
    assert scales == {"a.kind": "linear", "a.rate": "log"}
