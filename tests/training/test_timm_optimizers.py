"""Optimizers of timm train, are resumed bit for bit, and say what they do not take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from digits_fixtures import digits, digits_card, few  # noqa: F401
from hpo.errors import SpecError
from hpo.execute.workers.job_process import _check_optimizers
from hpo.models import build_model
from hpo.spec.load import load_study
from hpo.spec.models import CnnSpec
from hpo.spec.training import OptimizerSpec, TrainingSpec
from hpo.training import step_graph
from hpo.training.loop import train
from hpo.training.optimizers import build_optimizer, check_optimizer
from hpo.training.stack_layers import unstackable_reason

NAMES = ("muon", "nadamuon", "lion", "lamb", "nadamw", "adan", "adopt", "kron", "laprop", "mars")


def net_of(seed: int = 0) -> nn.Module:
    return build_model(CnnSpec(kind="cnn", filters=4), image_shape=(8, 8, 1), classes=10, seed=seed)


def spec_of(name: str, **fields) -> TrainingSpec:
    return TrainingSpec(epochs=3, batch_size=64, checkpoint=1, optimizer=OptimizerSpec(name=f"timm/{name}", **fields))


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_training_is_the_uninterrupted_one(name, few, tmp_path):  # noqa: F811
    saved = {}
    spec, net = spec_of(name, weight_decay=0.01), net_of()

    def save(epoch, state):
        torch.save(state, tmp_path / f"{epoch.number}.pt")

    whole = [epoch.scores for epoch in train(net, few, spec, seed=1, precision="float32", save=save)]
    assert whole[-1]["train_loss"] < whole[0]["train_loss"]
    saved = torch.load(tmp_path / "1.pt", weights_only=True)
    again = net_of(seed=5)
    rest = [epoch.scores for epoch in train(again, few, spec, seed=1, precision="float32", resume=saved)]
    assert rest == whole[1:]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_each_stage_has_its_rate_with_timm_too(few):  # noqa: F811
    net = net_of()
    optimizer = build_optimizer(OptimizerSpec(name="timm/lion", lr=0.1, layer_decay=0.5), net)
    assert sorted({group["scale"] for group in optimizer.param_groups}) == [0.5, 1.0]


def test_muon_leaves_the_classifier_to_adamw():
    net = net_of()
    optimizer = build_optimizer(OptimizerSpec(name="timm/muon", options={"momentum": 0.9}), net)
    apart = [group["params"] for group in optimizer.param_groups if group.get("use_fallback")]
    assert [[weight.shape for weight in group] for group in apart] == [[net[-1].weight.shape]]
    assert {id(weight) for group in optimizer.param_groups for weight in group["params"]} == set(
        map(id, net.parameters())
    )
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("muonn", {}, "Did you mean muon"),
        ("adahessian", {}, "second derivatives"),
        ("lion", {"warp": 9}, "'warp'"),
        ("bnbadam", {}, "cannot be made"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(name, options, message):
    with pytest.raises(SpecError) as caught:
        check_optimizer(OptimizerSpec(name=f"timm/{name}", options=options))
    assert message in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"final.set": {"training.optimizer.name": "timm/nonsense"}}, "nonsense"),
        (
            {
                "training.optimizer": {"name": "timm/muon", "lr": 1e-3, "options": {"ns_steps": 4}},
                "search.space": {"training.optimizer.name": {"choice": ["timm/muon", "timm/lion"]}},
            },
            "'ns_steps'",
        ),
    ],
    ids=["of the final training", "with the options of another one"],
)
def test_a_run_ends_before_its_first_trial_where_an_optimizer_cannot_be_made(overrides, message):
    with pytest.raises(SpecError) as caught:
        _check_optimizers(load_study("digits-mlp", overrides=overrides))
    assert message in f"{caught.value} {caught.value.hint}"


def test_options_are_for_optimizers_of_timm():
    with pytest.raises(ValueError, match="options are for optimizers of timm"):
        OptimizerSpec(name="adam", options={"momentum": 0.9})


def test_an_optimizer_of_timm_is_neither_stacked_nor_captured(few, monkeypatch):  # noqa: F811
    assert unstackable_reason(net_of(), few, spec_of("lion").model_copy(update={"checkpoint": None})) == (
        "its optimizer is of timm"
    )
    monkeypatch.setattr(step_graph, "_ON", "cpu")
    monkeypatch.setattr(step_graph, "_FEWEST", 1)
    spec = spec_of("lion").model_copy(update={"epochs": 30})
    assert step_graph.why_not(net_of(), few, spec, own=False) == "its optimizer is of timm"
    plain = spec.model_copy(update={"optimizer": OptimizerSpec(name="adam")})
    assert step_graph.why_not(net_of(), few, plain, own=False) == ""
