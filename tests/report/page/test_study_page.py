"""The page of a study: what it tells, what it must not tell, and what it says of that which is missing."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest

import page_findings as told
from hpo.records import FINAL, SplitCard, TrialState
from hpo.report.figures import svg_text
from hpo.report.figures.space import slices
from hpo.report.statistics import confusion_intervals, share_interval
from hpo.report.study_page import Findings, Samples, study_page
from hpo.report.text import trial_tooltip, without_folders
from hpo.report.trials import trials_table

FOUR = {"valid_accuracy": 0.7, "valid_loss": 0.5}


def text(findings: Findings) -> str:
    """What a reader of the page reads."""
    body = re.sub(r"<(script|style).*?</\1>", "", study_page(findings), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.fixture(scope="module")
def crowded() -> str:
    return study_page(told.crowded())


def test_page_is_one_file_that_asks_nothing_of_a_network(crowded: str) -> None:
    page = crowded
    assert len(page) < 4_000_000
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert not re.findall(r"url\((?!#)", page)


def test_the_same_study_gives_the_same_page(crowded: str) -> None:
    assert study_page(told.crowded()) == crowded


@pytest.mark.parametrize(
    "ends", [(), (TrialState.PRUNED,) * 3, (TrialState.FAILED,), (TrialState.RUNNING, TrialState.STOPPED)]
)
def test_study_without_a_complete_trial_has_a_page_that_says_so(ends: tuple[TrialState, ...]) -> None:
    page = text(told.findings(*(told.trial(number, end) for number, end in enumerate(ends))))
    assert "no complete trial yet" in page
    assert "Which rate is best?" in page
    assert "No model of this study is registered" in page
    assert "training.optimizer.lr" in page


def test_test_scores_appear_only_after_the_test_part_was_opened() -> None:
    trials = [told.trial(0), told.trial(1)]
    sealed = text(told.findings(*trials, data=told.data(), model=told.model(1)))
    assert "never opened, so there are no test results" in sealed
    assert "score validation 95 % interval accuracy" in sealed
    opened = text(told.findings(*trials, data=told.data(), model=told.model(1), openings=(told.look(1, 1),) * 2))
    assert "opened twice" in opened
    assert "score validation 95 % interval test 95 % interval accuracy" in opened
    other = text(told.findings(*trials, data=told.data(), model=told.model(1), openings=(told.look(1, 0),)))
    assert "opened once, but not for this model" in other


def test_published_numbers_stand_beside_those_of_the_same_score() -> None:
    references = [
        {"label": "by hand", "score": "test_accuracy", "value": 0.79, "source": "R1", "note": "6,000 epochs"},
        {"label": "before", "score": "valid_accuracy", "value": 0.9, "source": "R2"},
    ]
    about = told.spec(references=references)
    page = text(told.findings(told.trial(0), about=about, data=told.data(), openings=(told.look(),)))
    assert "by hand test accuracy 0.7900 0.8100" in page
    assert "+2.00 points 6,000 epochs R1" in page
    assert "before validation accuracy 0.9000 0.8000" in page
    assert "-10.00 points" in page
    sealed = text(told.findings(told.trial(0), about=about))
    assert "0.7900 test part not opened" in sealed


def test_registered_model_is_the_one_the_page_tells_of() -> None:
    trials = [told.trial(0), told.trial(1), told.trial(2, stage=FINAL)]
    assert "trial 2, the final training" in text(told.findings(*trials))
    assert "trial 0, the best trial, version 4" in text(told.findings(*trials, model=told.model(0, 4)))


def test_folds_are_told_one_by_one() -> None:
    page = text(told.findings(told.trial(0, folds=(FOUR, {**FOUR, "valid_accuracy": 0.9}), confusion=())))
    assert "fold 0 0.7000" in page
    assert "fold 1 0.9000" in page


def test_several_objectives_show_the_trials_that_none_beats() -> None:
    about = told.spec(search={"space": told.SPACE, "objectives": ["valid_accuracy", "parameters"]})
    aims = (("valid_accuracy", "maximize"), ("parameters", "minimize"))
    values = [(0.8, 10.0), (0.9, 20.0), (0.7, 30.0)]
    trials = [told.trial(number, value=pair[0], values=pair) for number, pair in enumerate(values)]
    study = told.study(*trials, objectives=aims)
    findings = Findings(study, about, told.findings().made)
    page = text(findings)
    front = page.split("none beats in every objective")[1].split("Data")[0]
    assert "0.9 20" in front
    assert "0.7 30" not in front
    assert 'aria-label="Pareto front"' in study_page(findings)


def test_each_stage_shows_only_the_parameters_it_varied() -> None:
    stages = [
        {"name": "rate", "space": {"training.optimizer.lr": {"choice": [0.1, 0.01]}}},
        {"name": "drop", "space": {"model.dropout": {"choice": [0.0, 0.5]}}},
    ]
    about = told.spec(search={"stages": stages})
    both = {"training.optimizer.lr": 0.1, "model.dropout": 0.5}
    trials = [
        told.trial(0, stage="rate", parameters={"training.optimizer.lr": 0.1}),
        told.trial(1, stage="rate", parameters={"training.optimizer.lr": 0.01}),
        told.trial(2, stage="drop", parameters=both),
        told.trial(3, stage="drop", parameters={**both, "model.dropout": 0.0}),
    ]
    figure = slices(told.study(*trials, spec=about.model_dump(mode="json")))
    assert figure is not None
    shown = re.findall(r'data-trials="([\d-]*)"', svg_text(figure, transparent=True))
    assert [sorted(each.split("-")) for each in shown] == [["0", "1"], ["2", "3"]]
    assert "rate training.optimizer.lr 0.1, 0.01" in text(told.findings(*trials, about=about))


def test_hovering_tells_parameters_score_and_epochs() -> None:
    words = trial_tooltip(told.study(), told.trial(3))
    assert "trial 3" in words
    assert "validation accuracy 0.8300" in words
    assert "5 epochs, best 5, 12 s" in words
    assert "lr = 0.000173" in words
    assert "activation = tanh" in words


def test_names_of_users_cannot_break_the_page() -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    space = {"model.activation": {"choice": ["relu", "tanh"]}, "training.optimizer.lr": {"choice": [0.1, 0.2]}}
    stage = [{"name": "a", "space": space}]
    about = told.spec(question=evil, search={"stages": stage})
    page = study_page(told.findings(told.trial(0, stage=evil), told.trial(1, parameters={"x": evil}), about=about))
    assert evil not in page
    assert "<img src=x" not in page


def test_page_tells_what_is_missing() -> None:
    page = text(told.findings(told.trial(0), missing=("The images are not on this machine.",)))
    assert "What is missing The images are not on this machine." in page


def test_values_that_are_no_numbers_are_gaps_in_the_charts() -> None:
    trials = [told.trial(0), told.trial(1, TrialState.PRUNED, value=float("nan")), told.trial(2)]
    page = study_page(told.findings(*trials))
    assert "NaN" not in page
    history = page.split("Optimisation history</h3>")[1].split("</svg>")[0]
    assert re.findall(r'data-trials="([\d-]*)"', history) == ["0-2", ""]


def test_the_answer_is_one_sentence_with_its_interval_next_to_the_published_numbers() -> None:
    references = [{"label": "by hand", "score": "test_accuracy", "value": 0.79, "source": "R1"}]
    about, card = told.spec(references=references), told.data()
    sealed = text(told.findings(told.trial(0), about=about, data=card))
    assert "trial 0, has a validation accuracy of 0.8000 (95 % interval 0." in sealed
    assert "its test score is not measured yet. The best published test accuracy is 0.7900 (by hand)." in sealed
    page = study_page(told.findings(told.trial(0), about=about, data=card, openings=(told.look(),)))
    opened = told.findings(told.trial(0), about=about, data=card, openings=(told.look(),))
    assert "has a test accuracy of 0.8100 (95 % interval 0." in text(opened)
    assert "): 2.00 points above the best published number, 0.7900 (by hand)." in text(opened)
    assert 'aria-label="published numbers"' in page
    assert 'aria-label="published numbers"' not in study_page(told.findings(told.trial(0)))
    assert "there is no answer" in text(told.findings())


def test_class_shares_are_a_plot_and_numbers() -> None:
    split = SplitCard({"train": 700, "valid": 300, "test": 0}, {"train": (0.25, 0.75), "valid": (0.3, 0.7)})
    page = study_page(told.findings(told.trial(0), data=told.data(), split=split))
    assert 'aria-label="share of each class"' in page
    assert "25.0%" in text(told.findings(told.trial(0), data=told.data(), split=split))


def test_all_trials_are_in_one_table_best_first() -> None:
    study = told.study(told.trial(0), told.trial(1, TrialState.FAILED), told.trial(2), told.trial(3, TrialState.PRUNED))
    rows = re.findall(r"<tr><td.*?</tr>", trials_table(study))
    assert [re.search(r'data-trial="(\d+)"', row)[1] for row in rows] == ["2", "0", "1", "3"]
    assert "0.8200" in rows[0]
    assert "failed" in rows[2]
    assert '<td class="number" data-name="epochs">5</td>' in rows[0]


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("/home/ann/data/mine.npz: damaged", "mine.npz: damaged"),
        ("C:\\Users\\ann\\mine.npz", "mine.npz"),
        ("path: '~/data/mine.npz'", "path: 'mine.npz'"),
        ("https://example.org/a/b.npz", "https://example.org/a/b.npz"),
        ("T-shirt/top, 3 of 4/5, and/or", "T-shirt/top, 3 of 4/5, and/or"),
    ],
)
def test_a_page_has_the_names_of_files_and_no_folders_of_a_machine(given: str, shown: str) -> None:
    assert without_folders(given) == shown


def test_folders_with_spaces_are_left_out_where_the_path_is_known_and_prose_is_not_cut() -> None:
    source = "/home/anna lee/x/labels.csv"
    assert without_folders(source, source) == "labels.csv"
    assert without_folders(f"column a of {source} and and/or", source) == "column a of labels.csv and and/or"
    assert without_folders("/home/anna lee/x/long/1.png: broken", source) == "long/1.png: broken"
    assert without_folders("C:\\a b\\mine.npz is odd", "C:\\a b\\mine.npz") == "mine.npz is odd"
    assert without_folders("see train/a/b.npz", "/a/b.npz") == "see train/a/b.npz"
    assert without_folders("https://x.org/a/b.npz", "https://x.org/a/b.npz") == "https://x.org/a/b.npz"
    assert without_folders("/mine.npz has 4/5", "/mine.npz") == "/mine.npz has 4/5"


def test_no_part_of_the_page_names_a_folder_of_the_machine() -> None:
    card = replace(told.data(), source="/home/ann/images/mine.npz", warnings=("/home/ann/images/mine.npz has groups",))
    about = told.spec(data={"name": "npz", "path": "/home/ann/images/mine.npz"})
    missing = ("The images could not be read: /home/ann/cache/x/y.npy",)
    page = study_page(told.findings(told.trial(0), about=about, data=card, missing=missing))
    assert "/home/" not in page
    assert "mine.npz" in page


def test_class_without_training_images_has_no_strip() -> None:
    samples = Samples((told.strip(np.random.default_rng(0)), b""), (0.5,) * 3, (0.2,) * 3, 700)
    page = study_page(told.findings(told.trial(0), data=told.data(), samples=samples))
    assert page.count('alt="training images of class') == 1


def test_intervals_hold_the_score_and_shrink_with_the_images() -> None:
    few, many = ([[45 * k, 5 * k], [10 * k, 40 * k]] for k in (1, 100))
    small, large = confusion_intervals(few, seed=0), confusion_intervals(many, seed=0)
    assert set(small) == {"accuracy", "balanced_accuracy", "macro_f1"}
    for score, interval in small.items():
        assert interval.low < interval.value < interval.high
        assert large[score].high - large[score].low < 0.2 * (interval.high - interval.low)
    assert confusion_intervals([[0, 0], [0, 0]], seed=0) == {}
    share = share_interval(0.85, 100, seed=0)
    assert share.value == 0.85
    assert share.high - share.low == pytest.approx(small["accuracy"].high - small["accuracy"].low, abs=0.02)


def test_page_says_which_sampler_and_pruner_auto_chose_and_why() -> None:
    page = text(told.findings(told.trial(0)))
    assert "sampler auto: mfgp, because" in page
    assert "pruner auto: " in page
