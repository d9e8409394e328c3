"""Settings that are valid alone and cannot be meant together are refused when the file is loaded, with their line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpo.errors import SpecError
from hpo.search.stages import distribution
from hpo.spec.agreement import MOST_CELLS, conflicts
from hpo.spec.files import study_files
from hpo.spec.load import load_study, parse_study

STUDY = """
data: {name: digits}
split: {kind: holdout}
model: {kind: mlp, hidden: 32}
training: {epochs: 2}
search:
  trials: 3
  space:
    training.optimizer.lr: {float: [1e-4, 1e-1], log: true}
"""
LINE = len(STUDY.splitlines()) + 1  # of the first line that is added


def written(folder: Path, more: str, *, study: str = STUDY) -> Path:
    path = folder / "mine.yaml"
    path.write_text(f"{study}{more}", encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_study(path, overrides=overrides)
    assert caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(study_files()))
def test_no_study_that_ships_has_a_conflict(name):
    assert not conflicts(load_study(name))


@pytest.mark.parametrize(
    ("search", "monitor"),
    [
        ({"objective": "valid_macro_f1"}, "valid_macro_f1"),
        ({"objective": "valid_loss"}, "valid_loss"),
        ({}, "valid_accuracy"),
        ({"objectives": ["parameters", "valid_macro_auc"]}, "valid_macro_auc"),
        ({"objectives": ["parameters", "latency_ms"]}, "valid_accuracy"),
    ],
)
def test_the_monitor_follows_the_objective_unless_it_is_given(tmp_path, search, monitor):
    tree = yaml.safe_load(STUDY)
    tree["search"] |= search
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree))
    spec = load_study(path)
    assert spec.training.monitor == monitor
    assert spec.with_values({"training.epochs": 5}).training.monitor == monitor
    assert load_study(path, overrides=["training.monitor=valid_loss"]).training.monitor == "valid_loss"
    # What is stored is what was used, and is read back as it is.
    assert parse_study(spec.model_dump(mode="json")).training.monitor == monitor


def test_a_stored_spec_keeps_the_monitor_that_it_was_run_with(tmp_path):
    stored = load_study(written(tmp_path, "")).model_dump(mode="json")
    stored["search"]["objective"] = "valid_macro_f1"
    assert parse_study(stored).training.monitor == "valid_accuracy"
    now = load_study(written(tmp_path, ""), overrides=["search.objective=valid_macro_f1"])
    assert now.training.monitor == "valid_macro_f1"
    assert now.resumed_as(stored).training.monitor == "valid_accuracy"
    given = load_study(written(tmp_path, ""), overrides=["training.monitor=valid_loss"])
    assert given.resumed_as(stored).training.monitor == "valid_loss"


CONFLICTS: dict[str, tuple[str, str, str]] = {
    "one place inside another": (
        "    training.optimizer: {choice: [{name: sgd}, {name: adam}]}\n",
        f":{LINE - 1}: search.space.training.optimizer.lr",
        "lies inside training.optimizer, which is searched too",
    ),
    "two levels inside another": (
        "    training: {choice: [{epochs: 1}, {epochs: 2}]}\n",
        f":{LINE - 1}: search.space.training.optimizer.lr",
        "lies inside training, which is searched too",
    ),
    "a condition on a part of a searched place": (
        (
            "    training.schedule: {choice: [{name: step}, {name: cosine}]}\n"
            "    training.augment.zoom: {choice: [0.0, 0.1], when: {training.schedule.name: step}}\n"
        ),
        f":{LINE + 1}: search.space.training.augment.zoom.when.training.schedule.name",
        "Name training.schedule in `when`",
    ),
    "a condition on an option that is not there": (
        (
            "    training.optimizer.name: {choice: [sgd, adam]}\n"
            "    training.optimizer.momentum: {float: [0.0, 0.9], when: {training.optimizer.name: SGD}}\n"
        ),
        f":{LINE + 1}: search.space.training.optimizer.momentum.when.training.optimizer.name",
        "waits for 'SGD', but training.optimizer.name is searched in ['sgd', 'adam']",
    ),
    "a condition of which one value is never met": (
        (
            "    training.optimizer.name: {choice: [sgd, adam]}\n"
            "    training.optimizer.momentum: {float: [0.0, 0.9], when: {training.optimizer.name: [sgd, rmsprop]}}\n"
        ),
        f":{LINE + 1}: search.space",
        "waits for 'rmsprop'",
    ),
    "a condition on a fixed place": (
        "    training.optimizer.momentum: {float: [0.0, 0.9], when: {training.optimizer.name: sgd}}\n",
        f":{LINE}: search.space",
        "training.optimizer.name is 'adam'",
    ),
    "a condition beside the steps of a range": (
        "    model.hidden: {int: [8, 64], step: 8}\n    model.dropout: {float: [0.0, 0.5], when: {model.hidden: 12}}\n",
        f":{LINE + 1}: search.space",
        "waits for 12, but model.hidden is searched in [8, 64]",
    ),
    "a condition on a continuous range": (
        "    model.dropout: {float: [0.0, 0.5], when: {training.optimizer.lr: 0.01}}\n",
        f":{LINE}: search.space",
        "meets no value exactly",
    ),
    "conditions that contradict": (
        (
            "    model.batch_norm: {choice: [true, false]}\n"
            "    model.activation: {choice: [relu, tanh], when: {model.batch_norm: true}}\n"
            "    model.dropout: {float: [0.0, 0.5], when: {model.activation: tanh, model.batch_norm: false}}\n"
        ),
        f":{LINE + 2}: search.space.model.dropout.when",
        "model.batch_norm would have to be both",
    ),
    "a range with steps that do not fit": (
        "    training.epochs: {float: [1, 9]}\n",
        f":{LINE}: search.space.training.epochs",
        "the range holds",
    ),
    "momentum of an optimizer without": (
        "    training.optimizer.momentum: {float: [0.0, 0.9]}\n",
        f":{LINE}: search.space.training.optimizer.momentum",
        "changes nothing while training.optimizer.name is 'adam'. Set training.optimizer.name to sgd or rmsprop",
    ),
    "momentum where its condition picks another": (
        (
            "    training.optimizer.name: {choice: [sgd, adam]}\n"
            "    training.optimizer.momentum: {float: [0.0, 0.9], when: {training.optimizer.name: adam}}\n"
        ),
        f":{LINE + 1}: search.space",
        "changes nothing while training.optimizer.name is 'adam'",
    ),
    "a score that is not there": (
        "  constraints: [parameters <= 1000, valid_accurracy >= 0.9]\n",
        f":{LINE}: search.constraints.1",
        "there is no score 'valid_accurracy'",
    ),
    "a limit that no score reaches": (
        "  constraints: [valid_accuracy >= 95]\n",
        f":{LINE}: search.constraints.0",
        "valid_accuracy is 0 to 1",
    ),
    "limits that exclude each other": (
        "  constraints: [parameters <= 1000, parameters >= 2000]\n",
        f":{LINE}: search.constraints.1",
        "no trial can keep parameters >= 2000 and parameters <= 1000",
    ),
    "a limit without a number": ("  constraints: ['parameters <= 1e']\n", f":{LINE}: ", "has no number"),
    "one aim twice": (
        "  objectives: [valid_accuracy, parameters, valid_accuracy]\n",
        f":{LINE}: search.objectives.2",
        "listed twice",
    ),
    "an aim the wrong way": (
        "  objectives: [{score: valid_accuracy, direction: minimize}, parameters]\n",
        f":{LINE}: search.objectives.0",
        "would look for the worst valid_accuracy",
    ),
    "an objective beside objectives": (
        "  objective: valid_macro_f1\n  objectives: [valid_accuracy, parameters]\n",
        f":{LINE}: search.objective",
        "none of the objectives",
    ),
    "a first candidate outside of the space": (
        "  start: [{training.optimizer.lr: 0.5}]\n",
        f":{LINE}: search.start.0.training.optimizer.lr",
        "0.5 is not in the space",
    ),
    "a final setting inside a searched place": (
        "final: {set: {training.optimizer: {name: sgd}}}\n",
        f":{LINE}: final.set.training.optimizer",
        "training.optimizer.lr",
    ),
    "a race without validation images": (
        "final: {finalists: 2, split: {kind: none}}\n",
        f":{LINE}: final.split",
        "kind none leaves a race",
    ),
    "a teacher by name among the final settings": (
        "final: {set: {training.teacher: digits-cnn@champion}}\n",
        f":{LINE}: final.set.training.teacher",
        "Write final.teacher",
    ),
}


def test_another_model_to_start_from_is_refused_among_the_final_settings(tmp_path):
    study = STUDY.replace("{kind: mlp, hidden: 32}", "{kind: transfer, from_model: models:/digits-cnn/1}")
    message = refused(written(tmp_path, "final: {set: {model.from_model: models:/digits-cnn@champion}}\n", study=study))
    assert "model.from_model 'models:/digits-cnn@champion' is not looked up there" in message


def test_final_trainings_may_leave_the_teacher_of_the_search_out(tmp_path):
    load_study(written(tmp_path, "final: {set: {training.teacher: null}}\n"))


@pytest.mark.parametrize("case", CONFLICTS.values(), ids=CONFLICTS)
def test_settings_that_contradict_are_refused_with_their_line(tmp_path, case):
    more, place, says = case
    message = refused(written(tmp_path, more))
    assert place in message
    assert says in message


def test_an_even_kernel_inside_a_range_is_found_before_a_trial_meets_it(tmp_path):
    study = STUDY.replace("{kind: mlp, hidden: 32}", "{kind: resnet}")
    message = refused(written(tmp_path, "    model.kernel: {int: [3, 7]}\n", study=study))
    assert "the range holds 4, which does not fit" in message
    load_study(written(tmp_path, "    model.kernel: {int: [3, 7], step: 2}\n", study=study))


def test_conditions_that_can_hold_are_left_alone(tmp_path):
    more = """
    training.optimizer.name: {choice: [sgd, rmsprop, adam]}
    training.optimizer.momentum: {choice: [0.0, 0.9], when: {training.optimizer.name: [sgd, rmsprop]}}
    training.optimizer.nesterov: {choice: [true, false], when: {training.optimizer.momentum: 0.9,
      training.optimizer.name: sgd}}
    model.dropout: {choice: [0.0, 0.5], when: {training.epochs: 2}}
"""
    assert not conflicts(load_study(written(tmp_path, more)))


STAGES = """
data: {name: digits}
split: {kind: holdout}
model: {kind: mlp, hidden: 32}
search:
  stages:
    - {name: one, space: {training.optimizer.name: {choice: [sgd, rmsprop]}}}
    - {name: two, space: {%s}}
"""


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ("training.optimizer.momentum: {choice: [0.0, 0.9], when: {training.optimizer.name: rmsprop}}", ""),
        (
            "training.optimizer.momentum: {choice: [0.0, 0.9], when: {training.optimizer.name: lion}}",
            "waits for 'lion'",
        ),
        ("training.optimizer: {choice: [{name: sgd}, {name: adam}]}", "lies inside training.optimizer"),
        ("training.epochs: {int: [1, 200001]}", "its grid has 200,001 cells"),
    ],
)
def test_stages_are_held_against_those_before(tmp_path, space, says):
    path = written(tmp_path, "", study=STAGES % space)
    if says:
        assert says in refused(path)
        assert "mine.yaml:" in refused(path)
    else:
        load_study(path)


def test_all_faults_are_told_at_once_and_of_many_the_first_ten(tmp_path):
    text = STUDY.replace("epochs: 2", "epoch: 2, patience: none, batch_size: 0").replace("trials: 3", "trials: many")
    message = refused(written(tmp_path, "    model.hiden: {int: [1, 2]}\n", study=text))
    for place in (
        ":5: training.epoch: ",
        ":5: training.patience: ",
        ":5: training.batch_size: ",
        ":7: search.trials: ",
    ):
        assert place in message
    assert "For no value write null" in message
    many = "".join(f"x{number}: 1\n" for number in range(25))
    message = refused(written(tmp_path, many))
    assert message.count("unknown key") == 10
    assert "And 15 more faults." in message
    both = "    training.epochs: {float: [1, 9]}\n    training.optimizer.momentum: {float: [0.0, 0.9]}\n"
    message = refused(written(tmp_path, both))
    assert f":{LINE}: " in message
    assert f":{LINE + 1}: " in message


def test_faults_of_several_searched_places_are_told_at_once(tmp_path):
    more = "    model.hiden: {int: [1, 2]}\n    training.patience: {choice: [none, 3]}\n"
    message = refused(written(tmp_path, more))
    assert f":{LINE + 1}: search.space.training.patience: training.patience='none' does not fit" in message
    assert "For no value write null" in message
    assert "search.space.model.hiden: there is no 'hiden' there" in message


@pytest.mark.parametrize(
    ("more", "set_to", "null"),
    [
        ("    training.patience: {choice: ['off', 3]}\n", "", True),
        ("    training.clip_norm: {choice: [None, 3.0]}\n", "", True),
        ("    training.batch_size: {choice: [none, 3]}\n", "", False),
        ("", "training.patience=never", True),
        ("", "training.epochs=none", False),
        ("", "data.size=None", True),
    ],
)
def test_null_is_mentioned_only_where_it_is_a_value(tmp_path, more, set_to, null):
    message = refused(written(tmp_path, more), *[set_to] * bool(set_to))
    assert ("write null" in message) == null


def test_a_huge_grid_is_counted_without_building_it_and_refused(tmp_path):
    study = STUDY.replace("  trials: 3\n", "  trials: 3\n  sampler: grid\n").replace(
        "{float: [1e-4, 1e-1], log: true}", "{float: [0.0001, 0.1], step: 0.00001}"
    )
    more = """
    training.batch_size: {int: [1, 1000]}
    model.dropout: {choice: [0.0, 0.1, 0.2], when: {training.batch_size: [1, 7]}}
    training.optimizer.weight_decay: {float: [0.0, 1.0], step: 0.05}
"""
    started = time.process_time()
    message = refused(written(tmp_path, more, study=study))
    cells = 9991 * 21 * (998 + 2 * 3)
    assert f"its grid has {cells:,} cells" in message
    assert "sampler: random" in message
    assert time.process_time() - started < 2
    assert cells > MOST_CELLS
    load_study(written(tmp_path, more, study=study), overrides=["search.sampler=tpe"])


def leaves(tree: Any, stem: str = "") -> list[str]:
    found: list[str] = []
    for key, value in tree.items():
        found += leaves(value, f"{stem}{key}.") if isinstance(value, dict) and value else [f"{stem}{key}"]
    return found


def test_what_decides_which_images_are_judged_is_no_search_parameter(tmp_path):
    spec = load_study(written(tmp_path, ""))
    plain = spec.model_dump(mode="json")
    paths = [path for part in ("data", "split") for path in [part, *leaves(plain[part], f"{part}.")]]
    assert {"data.name", "data.size", "split.seed", "split.share", "split.test_share"} <= set(paths)
    for path in paths:
        value: Any = plain
        for key in path.split("."):
            value = value[key]
        message = refused(written(tmp_path, f"    {path}: {{choice: [{json.dumps(value)}]}}\n"))
        assert f":{LINE}: search.space.{path}: decides which images are trained on and judged" in message
        assert "kfold" in message


@pytest.mark.parametrize(
    "parameter",
    ["training.epochs: {int: [1, 900000000]}", "training.augment.zoom: {float: [0.0, 1.0], step: 1.0e-11}"],
)
def test_a_single_huge_range_is_counted_too(tmp_path, parameter):
    study = STUDY.replace("  trials: 3\n", "  trials: 3\n  sampler: grid\n").replace(
        "training.optimizer.lr: {float: [1e-4, 1e-1], log: true}", parameter
    )
    started = time.process_time()
    assert "cells, and at most 100,000" in refused(written(tmp_path, "", study=study))
    spec = load_study(written(tmp_path, "", study=study), overrides=["search.sampler=random"])
    ((_, found),) = spec.search.space.items()
    assert distribution(found).high == found.ends()[1]
    assert time.process_time() - started < 2
