"""The card of a model says what its study knows, and no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import page_findings as told
from hpo.records import FINAL, SplitCard, TrialState
from hpo.report.card import model_card
from hpo.report.page import origin_rows

NO_GROUPS = "No groups (patients, places, devices) were declared"


def card(*trials: Any, data: dict[str, Any] | None = None, about: Any = None, **changes: Any) -> str:
    return model_card(told.findings(*trials, about=about, data=replace(told.data(), **(data or {})), **changes))


@pytest.mark.parametrize("place", ["split", "data"])
def test_declared_groups_are_told_as_groups(place: str) -> None:
    plain: dict[str, Any] = {"split": {"data": {"name": "npz", "path": "x.npz"}, "split": {"group": "groups"}}}
    plain["data"] = {"data": {"name": "table", "path": "x.csv", "group": "patient"}}
    text = card(told.trial(0), about=told.spec(**plain[place]), data={"groups": 40})
    assert "- groups: 40, each in one part" in text
    assert NO_GROUPS not in text


def test_clusters_of_near_duplicates_are_no_declared_groups() -> None:
    about = told.spec(split={"kind": "holdout", "near_duplicates": "together"})
    text = card(told.trial(0), about=about, data={"groups": 940})
    assert "- clusters of near-duplicates: 940, a single image counted as one; none is divided" in text
    assert "groups:" not in text
    assert NO_GROUPS in text
    rows = dict(origin_rows(replace(told.data(), groups=940), "", groups_declared=False))
    assert "groups" not in rows
    assert rows["clusters of near-duplicates"].startswith("940")


@pytest.mark.parametrize(
    ("ranges", "kind"),
    [
        ({}, "uint8"),
        ({"uint8": (0, 255)}, "uint8"),
        ({"uint16": (0, 4095)}, "uint16"),
        ({"float32": (0.0, 1.0)}, "float32"),
        ({"uint8": (0, 255), "uint16": (0, 4095)}, "uint8"),
    ],
)
def test_the_kind_of_pixel_is_that_of_the_signature(ranges: dict[str, Any], kind: str) -> None:
    assert f"model.predict(images)  # {kind} (n, height, width, channels)" in card(
        told.trial(0), data={"ranges": ranges}
    )


def test_a_model_of_several_labels_gives_no_one_class() -> None:
    assert "one of its classes" in card(told.trial(0))
    text = card(told.trial(0), data={"several_labels": True})
    assert "one of its classes" not in text
    assert "It gives every image a probability for each of its labels" in text


def test_a_model_of_all_images_has_the_scores_of_the_search_that_chose_it() -> None:
    search = [told.trial(0), told.trial(1), replace(told.trial(2), state=TrialState.FAILED)]
    final = told.trial(3, stage=FINAL, parameters=search[1].candidate.parameters, scores={}, confusion=())
    about = told.spec(final={"on": "all"})
    text = card(*search, final, about=about, model=told.model(3))
    assert "## Scores\n\nThis model was trained on the validation images too" in text
    assert (
        "with the same parameters, trial 1, has validation accuracy 0.8100, validation loss (nats per image) 0.3000."
        in text
    )
    assert "too high as an estimate" in text
    assert "It was chosen by the validation scores" not in text
    assert "| part |" not in text
    opened = card(*search, final, about=about, model=told.model(3), openings=(told.look(1, 3),))
    assert "| test | test accuracy | 0.8100 |" in opened
    assert "trial 1, has validation accuracy 0.8100" in opened


def test_a_model_of_the_search_says_that_its_validation_scores_chose_it() -> None:
    text = card(told.trial(0), split=SplitCard({"train": 700}, {"train": (0.5, 0.5)}))
    assert "| valid | validation accuracy | 0.8000 |" in text
    assert "It was chosen by the validation scores" in text
    assert "trained on the validation images" not in text


def test_no_folder_of_the_machine_is_in_a_card() -> None:
    source = "/home/anna lee/x/labels.csv"
    warnings = (f"column a of {source} names the images, too", "/home/ann/y/z.npz: odd")
    text = card(told.trial(0), data={"source": source, "warnings": warnings})
    assert "- source: labels.csv" in text
    assert "- note: column a of labels.csv names the images, too" in text
    assert "- note: z.npz: odd" in text
    assert "/home" not in text
    assert "anna lee" not in text
