"""A study that is resumed is the one that it was: by content, with its own monitor, and whoever wrote its record."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.search.lifecycle import open_study
from hpo.spec.load import parse_study
from hpo.storage.optuna_storage import open_storage
from hpo.storage.trial_attrs import STUDY

SPACE = {"training.optimizer.lr": {"float": [0.1, 1.0]}}


def spec_of(model, **search):
    return parse_study(
        {
            "name": "study",
            "data": {"name": "digits"},
            "split": {"kind": "holdout"},
            "model": model,
            "search": {"space": SPACE, **search},
        },
        trust=True,
    )


def enter(home, spec, names=("a", "b")):
    study = open_study(home, spec, data_digest="d", class_names=names)
    study.close()
    return study


def refusal(home, spec, names=("a", "b")) -> SpecError:
    with pytest.raises(SpecError) as caught:
        enter(home, spec, names)
    assert "--fresh" in caught.value.hint
    return caught.value


def record_of(home):
    storage = open_storage(home)
    try:
        return storage.studies()["study"]
    finally:
        storage.close()


def write_record(home, record):
    storage = open_storage(home)
    try:
        storage.database.set_study_user_attr(storage.studies()["study"][0], STUDY, record)
    finally:
        storage.close()


def test_weights_that_have_moved_are_taken_and_others_in_their_place_refused(home, tmp_path):
    one, two = tmp_path / "one.pth", tmp_path / "two.pth"
    one.write_bytes(b"weights")
    model = {"kind": "timm", "name": "resnet18", "weights": str(one)}
    enter(home, spec_of(model))
    one.rename(two)
    moved = {**model, "weights": str(two)}
    enter(home, spec_of(moved))
    two.write_bytes(b"others!")
    assert f"the content of {two}: " in str(refusal(home, spec_of(moved)))
    one.write_bytes(b"others!")
    assert "model.weights: " in str(refusal(home, spec_of(model)))


def test_weights_of_a_fusion_that_have_moved_are_taken(home, tmp_path):
    one, two = tmp_path / "one.pth", tmp_path / "two.pth"
    one.write_bytes(b"weights")
    backbone = {"kind": "timm", "name": "resnet18", "weights": str(one)}
    enter(home, spec_of({"kind": "fusion", "backbones": [backbone]}))
    one.rename(two)
    enter(home, spec_of({"kind": "fusion", "backbones": [{**backbone, "weights": str(two)}]}))


def test_a_function_that_was_edited_between_two_runs_is_noticed(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = Path("edited.py")
    code.write_text("def build(image_shape, classes):\n    return 1\n")
    enter(home, spec_of({"kind": "edited:build"}))
    enter(home, spec_of({"kind": "edited:build"}))
    code.write_text("def build(image_shape, classes):\n    return 2\n")
    assert "the code of edited:build: " in str(refusal(home, spec_of({"kind": "edited:build"})))


def test_corrected_class_names_are_noticed(home):
    enter(home, spec_of({"kind": "mlp"}))
    assert "class names: a, b -> b, a" in str(refusal(home, spec_of({"kind": "mlp"}), names=("b", "a")))


def test_a_study_of_before_is_resumed_and_compared_from_then_on(home):
    enter(home, spec_of({"kind": "mlp"}))
    _, record = record_of(home)
    write_record(home, {key: value for key, value in record.items() if key != "content"})
    enter(home, spec_of({"kind": "mlp"}), names=("b", "a"))
    refusal(home, spec_of({"kind": "mlp"}), names=("a", "b"))


def test_a_study_keeps_the_monitor_that_it_began_with(home):
    def file():
        return spec_of({"kind": "mlp"}, objective="valid_macro_f1")

    assert enter(home, file()).spec.training.monitor == "valid_macro_f1"
    _, record = record_of(home)
    for part in ("spec", "identity"):
        record[part]["training"]["monitor"] = "valid_accuracy"
    write_record(home, record)
    assert enter(home, file()).spec.training.monitor == "valid_accuracy"
    assert record_of(home)[1]["spec"]["training"]["monitor"] == "valid_accuracy"
    given = parse_study({**file().model_dump(mode="json"), "training": {"monitor": "valid_macro_f1"}})
    assert "training.monitor: valid_accuracy -> valid_macro_f1" in str(refusal(home, given))


def test_other_libraries_are_noted(home):
    enter(home, spec_of({"kind": "mlp"}))
    _, record = record_of(home)
    record["content"]["libraries"]["torch"] = "1.0"
    write_record(home, record)
    study = enter(home, spec_of({"kind": "mlp"}))
    assert "torch 1.0 -> " in study.notes[0]
