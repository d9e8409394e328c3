"""hpo probe compares frozen backbones by folds of the development images, and its study runs on the same features."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.data import test_set
from hpo.errors import HpoError, SpecError
from hpo.jobs.probe import probe
from hpo.spec.load import load_study
from hpo.training import features
from hpo.training.trial import TrialPlan, train_trial


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two tiny networks of timm with weights in files."""
    folder = tmp_path_factory.mktemp("weights")
    named = []
    for name in ("test_resnet", "test_efficientnet"):
        torch.manual_seed(0)
        torch.save(timm.create_model(name).state_dict(), folder / f"{name}.pth")
        named.append(f"timm:{name}={folder / name}.pth")
    return named


@pytest.fixture
def place(digits_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(digits_cache, tmp_path / "cache")
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)

    def sealed(*_: object, **__: object) -> None:
        raise AssertionError("the test part was opened")

    monkeypatch.setattr(test_set, "open_test", sealed, raising=False)
    return tmp_path


def test_backbones_are_ranked_and_the_best_become_a_study_on_the_same_features(place, weights, monkeypatch):
    heard = []
    found = probe("digits", backbones=weights, sizes=[32], folds=3, report=heard.append)
    assert [(len(row.backbones), row.head) for row in heard] == [
        *((1, head) for _ in weights for head in ("linear", "small")),
        (2, "linear"),
        (2, "small"),
    ]
    assert sorted(found.rows, key=lambda row: -row.mean) == list(found.rows)
    assert all(len(row.folds) == 3 and 0.1 < row.mean <= 1 and row.spread >= 0 for row in found.rows)
    assert found.file == place / "digits-probe.yaml"
    spec = load_study(str(found.file))
    assert {each.name for each in spec.model.backbones} == {"test_resnet", "test_efficientnet"}
    assert all(each.input_size == 32 for each in spec.model.backbones)

    def recompute(*_: object, **__: object) -> None:
        raise AssertionError("features were computed again")

    monkeypatch.setattr(features, "_compute", recompute)
    again = load_study(str(found.file), overrides={"training.epochs": 1})
    plan = TrialPlan(again.setup, found.data.sealed, 0, 0, place / "work", "cpu")
    assert [epoch.number for epoch in train_trial(plan)] == [1]
    with pytest.raises(HpoError, match="is there already"):
        probe("digits", backbones=weights)


def test_the_command_prints_one_table_and_the_next_command(place, weights):
    asked = ["probe", "digits", "--backbone", weights[0], "--input-size", "32", "--folds", "2", "--fuse", "1"]
    said = CliRunner().invoke(app, [*asked, "--out", "one.yaml"])
    assert said.exit_code == 0, said.output
    assert "timm:test_resnet at 32 px" in said.stdout
    assert "hpo run" in said.stdout
    assert load_study(str(place / "one.yaml")).model.kind == "timm"
    said = CliRunner().invoke(app, [*asked, "--out", "two.yaml", "--json"])
    rows = json.loads(said.stdout)["rows"]
    assert {row["head"] for row in rows} == {"linear", "small"}


@pytest.mark.parametrize("out", ["missing/study.yaml", "file/study.yaml"])
def test_a_study_file_without_its_folder_is_refused_before_anything_is_measured(place, monkeypatch, out):
    (place / "file").touch()
    monkeypatch.setattr("hpo.jobs.probe._Bench.measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(HpoError, match="there is no such folder") as caught:
        probe("digits", backbones=["timm:test_resnet"], sizes=[32], out=out)
    assert "--out FILE" in caught.value.hint


@pytest.mark.parametrize("text", ["resnet18", "keras:resnet18", "timm:"])
def test_what_is_no_backbone_is_refused_with_an_example(place, text):
    with pytest.raises(SpecError, match="KIND:NAME"):
        probe("digits", backbones=[text])


def test_without_any_weights_the_error_says_how_to_name_some(place, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
    with pytest.raises(HpoError) as caught:
        probe("digits")
    assert "--backbone timm:" in caught.value.hint
