"""Study files and overrides: what is read, and what a mistake is answered with."""

from pathlib import Path

import pytest
import yaml

from hpo.errors import SpecError
from hpo.spec.files import find_study, study_files
from hpo.spec.load import load_study

STUDY = """
data: {name: digits}
split: {kind: holdout}
model: {kind: mlp, hidden: 32}
training:
  epochs: 2
search:
  space:
    training.optimizer.lr: {float: [1e-4, 1e-1], log: true}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY, encoding="utf-8")
    return path


def _error(path: Path | str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        load_study(path, overrides=overrides)
    assert caught.value.hint
    return str(caught.value)


def test_a_file_anywhere_is_a_study_named_after_it(study):
    spec = load_study(study)
    assert spec.name == "mine"
    assert spec.search.space["training.optimizer.lr"].float == (1e-4, 1e-1)


@pytest.mark.parametrize("name", sorted(study_files()))
def test_every_study_that_ships_is_valid_and_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_study(name).name == name


@pytest.mark.parametrize("before", [[], ["final={set: {training.epochs: 9}, seeds: 2}"], ["final=null"]], ids=str)
def test_an_override_reaches_a_setting_of_final_trainings(study, before):
    final = load_study(study, overrides=[*before, "final.set.training.epochs=60"]).final
    assert (final.set, final.seeds) == ({"training.epochs": 60}, 2 if "seeds" in str(before) else 1)


def test_overrides_reach_any_place_and_are_validated(study):
    spec = load_study(study, overrides=["training.epochs=5", "search.space.training.optimizer.lr.float=[0.01, 0.1]"])
    assert spec.training.epochs == 5
    assert spec.search.space["training.optimizer.lr"].float == (0.01, 0.1)
    assert load_study(study, overrides={"model.hidden": [8, 4]}).model.hidden == [8, 4]
    assert load_study(study, overrides=["model.hidden=[8, 4]", "model.hidden.1=5"]).model.hidden == [8, 5]
    with pytest.raises(SpecError, match="there are 2 in the list, not one named 2"):
        load_study(study, overrides=["model.hidden=[8, 4]", "model.hidden.2=5"])


def test_a_data_path_is_relative_to_the_file_and_in_an_override_to_the_working_directory(study, tmp_path, monkeypatch):
    study.write_text(STUDY.replace("name: digits", "name: npz, path: mine.npz"), encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_study(study).data.path == str(tmp_path / "mine.npz")
    assert load_study(study, overrides=["data.path=x.npz"]).data.path == str(tmp_path / "elsewhere" / "x.npz")


def test_numbers_with_exponents_are_numbers(study):
    study.write_text(STUDY.replace("epochs: 2", "optimizer: {lr: 1e-3}"), encoding="utf-8")
    assert load_study(study).training.optimizer.lr == 0.001


@pytest.mark.parametrize(
    ("before", "after", "place", "says"),
    [
        ("epochs: 2", "epoch: 2", ":6: training.epoch", "unknown key 'epoch'"),
        ("epochs: 2", "epochs: many", ":6: training.epochs", "'many'"),
        ("epochs: 2", "epochs: 0", ":6: training.epochs", "greater than or equal to 1, got 0"),
        ("[1e-4, 1e-1]", "[0.1, 0.01]", ":9: search.space.training.optimizer.lr", "low 0.1 exceeds high 0.01"),
        ("[1e-4, 1e-1]", "[-1.0, 1]", ":9: search.space.training.optimizer.lr", "not positive, and log is true"),
        ("[1e-4, 1e-1]", "[.nan, 1]", ":9: search.space.training.optimizer.lr", "not finite"),
        ("training.optimizer.lr", "training.optimizer.rate", "search.space.training.optimizer.rate", "no 'rate' there"),
        ("{float: [1e-4, 1e-1], log: true}", "{choice: []}", ":9: search.space", "no options"),
        ("{float: [1e-4, 1e-1], log: true}", "{flot: [0, 1]}", ":9: search.space", "a parameter is {float:"),
        ("{float: [1e-4, 1e-1], log: true}", "{float: [0.0, 1]}", ":9: search.space", "does not fit"),
        ("    training.optimizer.lr: {float: [1e-4, 1e-1], log: true}", "    {}", ":8: search", "space is empty"),
        ("model: {kind: mlp, hidden: 32}", "", "model", "is missing"),
        ("kind: mlp", "kind: mpl", ":4: model", "'mpl'"),
        ("data: {name: digits}", "data: [digits]", ":2: data", "got ['digits']"),
        ("search:\n", "search:\n  direction: minimize\n", ":8: search", "worst valid_accuracy"),
        ("search:\n", "search:\n  sampler: grid\n", ":8: search", "no finite grid"),
    ],
)
def test_a_mistake_is_answered_with_file_line_place_and_value(study, before, after, place, says):
    assert before in STUDY
    study.write_text(STUDY.replace(before, after), encoding="utf-8")
    message = _error(study)
    assert "mine.yaml" in message
    assert place in message
    assert says in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: {kind: mlp", "mine.yaml:"),
        ("- a list", "a study is a mapping"),
        ("", "a study is a mapping"),
        ("data: 1\ndata: 2", "'data' is given twice"),
        ("1: 2", "key 1 is not text"),
        ("data: !!python/object/apply:os.system ['true']", "mine.yaml:1"),
        ("\x00", "not readable as YAML"),
    ],
)
def test_what_is_not_a_study_is_refused_without_a_traceback(study, text, says):
    study.write_text(text, encoding="utf-8")
    assert says in _error(study)


def test_an_override_names_itself_as_the_place(study):
    assert _error(study, "training.epochs=many").startswith("--set: training.epochs:")
    assert _error(study, "trainin.epochs=3").startswith("--set: trainin: unknown key")
    assert "not of the form place=value" in _error(study, "training.epochs")
    assert "not readable as YAML" in _error(study, "training.epochs=[")


def test_an_unknown_study_is_answered_with_the_nearest_name():
    assert "Did you mean digits-mlp?" in _error("digits-mpl")
    assert "no such file" in _error("nowhere.yaml")


def test_conditions_must_not_wait_for_each_other(study):
    space = {
        "model.hidden": {"int": [1, 2], "when": {"model.dropout": 0.1}},
        "model.dropout": {"choice": [0.1, 0.2], "when": {"model.hidden": 1}},
    }
    tree = yaml.safe_load(STUDY)
    tree["search"]["space"] = space
    study.write_text(yaml.safe_dump(tree), encoding="utf-8")
    assert "wait for each other" in _error(study)


def test_find_study_takes_the_working_directory_first(tmp_path, monkeypatch):
    (tmp_path / "studies").mkdir()
    own = tmp_path / "studies" / "digits-mlp.yaml"
    own.write_text(STUDY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert find_study("digits-mlp") == own


def test_words_that_old_yaml_takes_for_truth_are_words(tmp_path):
    file = tmp_path / "words.yaml"
    file.write_text(
        "data: {name: digits, groups: {yes: ['0', '1'], no: ['2', '3']}}\nsplit: {kind: holdout}\n"
        "model: {kind: mlp, batch_norm: true}\n"
        "search: {trials: 2, space: {training.optimizer.lr: {float: [1e-4, 1e-2], log: true}}}\nfinal: {on: all}\n"
    )
    spec = load_study(str(file))
    assert spec.final.on == "all"
    assert list(spec.data.groups) == ["yes", "no"]
    assert spec.model.batch_norm is True
