"""Pictures of one training: right numbers, and room for every class and name."""

import numpy as np
import pytest

from figure_checks import faults
from hpo.report.figures import save_png
from hpo.report.figures.classifier import class_accuracy_figure, confusion_figure, roc_figure, training_curves
from hpo.report.figures.images import confident_mistakes, mistakes_figure, rank_figure, ranks_of_truth
from hpo.report.text import short_names, short_paths, wrapped
from made_studies import epochs

LONG = "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)"


def answers(classes, count=600):
    """labels (n,) and probabilities (n, classes) of a network that is right more often than not."""
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, count)
    logits = rng.normal(size=(count, classes)) * 1.2
    logits[np.arange(count), labels] += 2.5
    odds = np.exp(logits)
    return labels, odds / odds.sum(axis=1, keepdims=True)


def counts(labels, probabilities):
    classes = probabilities.shape[1]
    flat = np.bincount(labels * classes + probabilities.argmax(1), minlength=classes**2)
    return flat.reshape(classes, classes).tolist()


def named(classes):
    return [f"{LONG} {index}" if index % 2 else f"kind {index}" for index in range(classes)]


@pytest.mark.parametrize("classes", [2, 8, 20])
def test_no_label_is_cut_or_covered_however_many_classes_and_however_long_their_names(classes):
    labels, probabilities = answers(classes)
    names, confusion = named(classes), counts(labels, probabilities)
    mistakes = confident_mistakes(labels, probabilities)
    images = {place: np.zeros((28, 40, 3), np.uint8) for mistake in mistakes for place in mistake.positions}
    figures = [
        confusion_figure(confusion, names, title="trial 123, validation"),
        roc_figure(labels, probabilities, names, title="trial 123, validation"),
        class_accuracy_figure(confusion, names, title="trial 123, validation"),
        rank_figure(labels, probabilities, title="trial 123, validation"),
        mistakes_figure(mistakes, images, names, title="trial 123, validation: the surest mistakes"),
    ]
    assert [faults(figure) for figure in figures if figure is not None] == [[]] * (4 if classes == 2 else 5)


@pytest.mark.parametrize("folds", [1, 3])
def test_curves_mark_the_epoch_that_was_kept(folds):
    figure = training_curves(epochs(0.9, folds=folds), best_epoch=2, title="trial 1")
    assert faults(figure) == []
    assert len(figure.axes) == 3
    for panel in figure.axes:
        assert "best epoch 2" in [text.get_text() for text in panel.get_legend().get_texts()]
    assert len(figure.axes[0].lines) == 2 * folds + 1


def test_a_training_without_validation_images_has_curves_too():
    bare = [
        type(epoch)(epoch.number, {k: v for k, v in epoch.scores.items() if k.startswith("train")}, 0.1, 1.0)
        for epoch in epochs(0.9)
    ]
    assert [len(panel.lines) for panel in training_curves(bare).axes] == [1, 1]


def test_the_matrix_shows_counts_and_shares_of_the_true_class():
    figure = confusion_figure([[3, 1], [0, 4]], ["a", "b"])
    counted, shares = (sorted(text.get_text() for text in panel.texts) for panel in figure.axes[:2])
    assert counted == ["1", "3", "4"]
    assert shares == ["100", "25.0", "75.0"]


def test_the_surest_wrong_answers_come_first_each_beside_the_surest_right_ones():
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.99, 0.01, 0.0], [0.1, 0.8, 0.1], [0.3, 0.1, 0.6]])
    first, second = confident_mistakes(np.array([1, 2, 0, 1, 2]), probabilities)
    assert (first.position, first.predicted, first.true) == (0, 0, 1)
    assert (first.predicted_example, first.true_example) == (2, 3)
    assert (second.position, second.predicted_example, second.true_example) == (1, 3, 4)


def test_a_mistake_of_a_class_with_one_image_has_no_example_of_it():
    (mistake,) = confident_mistakes(np.array([0, 1]), np.array([[0.8, 0.2], [0.7, 0.3]]))
    assert (mistake.true_example, mistake.predicted_example) == (None, 0)
    assert mistakes_figure([mistake], {0: np.zeros((8, 8, 1), np.uint8), 1: np.ones((8, 8, 1), np.uint8)}, ["a", "b"])


def test_the_truth_ranks_first_exactly_where_the_answer_is_right():
    labels, probabilities = answers(8)
    ranks = ranks_of_truth(labels, probabilities)
    assert ((ranks == 1) == (probabilities.argmax(1) == labels)).all()
    assert ranks.max() <= 8
    bars = rank_figure(labels, probabilities).axes[0].patches
    assert sum(bar.get_height() for bar in bars) == (ranks > 1).sum()


def test_without_a_mistake_there_is_nothing_to_show():
    labels = np.array([0, 1, 2])
    assert rank_figure(labels, np.eye(3)) is None
    assert mistakes_figure(confident_mistakes(labels, np.eye(3)), {}, ["a", "b", "c"]) is None


def test_two_classes_have_one_curve_and_more_have_one_each_with_their_mean():
    from sklearn.metrics import roc_auc_score

    for classes, lines in ((2, 1), (5, 5)):
        labels, probabilities = answers(classes)
        panel = roc_figure(labels, probabilities, [f"kind {index}" for index in range(classes)]).axes[0]
        assert len(panel.lines) == lines + 1
    area = roc_auc_score(labels, probabilities, multi_class="ovr")
    assert f"{area:.4f}" in panel.get_legend().get_title().get_text()


def test_names_that_are_cut_still_differ():
    names = [f"{LONG} of the {index}" for index in range(20)] + [f"{index} {LONG}" for index in range(3)]
    assert len(set(short_names(names))) == len(names)
    assert all(len(name) <= 24 for name in short_names(names))
    assert short_names(["cat", "dog"]) == ["cat", "dog"]


def test_paths_are_called_by_the_shortest_end_that_no_other_has():
    paths = ["model.dropout", "model.kind", "training.optimizer.lr", "training.schedule.lr"]
    assert list(short_paths(paths).values()) == ["dropout", "model", "optimizer.lr", "schedule.lr"]


def test_captions_take_two_lines_at_most():
    assert wrapped("cat", 20) == "cat"
    assert [len(line) <= 20 for line in wrapped(LONG, 20).split("\n")] == [True, True]


def test_a_picture_has_the_size_that_was_asked_for(tmp_path):
    from PIL import Image

    save_png(training_curves(epochs(0.9)), tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size == (948, 280)
