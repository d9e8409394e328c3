"""The page of a data set tells its facts."""

from __future__ import annotations

import pytest

from hpo.records import DataCard
from hpo.report.figures.images import saliency_figure
from hpo.report.page import DataFacts, data_page

CARD = DataCard("mine", "", "", "sha256:ab", ("a<b", "c"), (8, 9, 1), 30, 10, 20, False, "mine.npz", citation="Me")


def facts(**changes: object) -> DataFacts:
    values = {
        "data": CARD,
        "split": "the parts that the data set comes with",
        "counts": {"train": (15, 5), "valid": (5, 5), "test": (8, 2)},
        "mean": (0.5,),
        "std": (0.25,),
        "copies": {"train": 4, "valid": 0, "test": 1},
        "shared": {"train and valid": 2, "train and test": 3, "valid and test": 0},
        "contradictions": (),
        "samples": {"a<b": (1, 2), "c": (3,)},
    }
    return DataFacts(**{**values, **changes})  # type: ignore[arg-type]


def test_a_page_tells_every_number() -> None:
    page = data_page(facts(), dict.fromkeys((1, 2, 3), b"\x89PNG"))
    for text in (
        "train 20, valid 10, test 10",
        "9 x 8 pixels, 1 channel<",
        "not the publisher",
        "a&lt;b",
        "15 (75.0%)",
        "3.0 times",
        "by up to 30.0 points",
        "127.5",
        'test images that occur in train</td><td class="number">3</td><td class="number">30.00%',
        "No two images",
        "The test part is sealed",
    ):
        assert text in page, text
    assert page.count("<img") == 3


def test_contradictions_are_shown_with_their_labels_and_the_first_twelve_only() -> None:
    groups = tuple(((number, "a<b"), (number + 100, "c")) for number in range(20))
    found = facts(contradictions=groups)
    assert found.pictured == (1, 2, 3, *range(12))
    page = data_page(found, dict.fromkeys(found.pictured, b"\x89PNG"))
    assert "40 images of train and validation, in 20 groups; the first 12:" in page
    assert "a&lt;b (row 11), c (row 111)" in page
    assert "row 112" not in page


@pytest.mark.parametrize(
    "parts", [{"train": (3, 0), "test": (1, 1)}, {"train": (1, 1), "valid": (1, 1), "test": (1, 1)}]
)
def test_any_parts_make_a_page(parts: dict[str, tuple[int, ...]]) -> None:
    copies = dict.fromkeys(parts, 0)
    assert "Classes" in data_page(facts(counts=parts, copies=copies, shared={"train and test": 0}, samples={}), {})


@pytest.mark.parametrize("classes", [2, 20])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_saliency_figure_shows_ten_classes_and_the_explained_one(classes: int, channels: int) -> None:
    import numpy as np

    image = np.zeros((8, 8, channels), np.uint8)
    names = [f"class {label}" for label in range(classes)]
    probabilities = np.linspace(0, 0.1, classes)[::-1]
    maps = {"gradient": np.zeros((8, 8)), "integrated": np.eye(8)}
    figure = saliency_figure(image, maps, probabilities.tolist(), names, target=classes - 1, title="x")
    figure.savefig("/dev/null", format="png")
    *panels, bars = figure.axes
    assert [panel.get_title() for panel in panels] == ["image", "gradient", "integrated gradients"]
    shown = [label.get_text() for label in bars.get_yticklabels()]
    assert len(shown) == min(classes, 10)
    assert {names[0], names[-1]} <= set(shown)
