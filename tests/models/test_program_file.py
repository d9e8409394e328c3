"""Programs of one architecture share a graph; what they answer is their own network's."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from hpo.models import CONFIG, PROGRAM, build_model, export_program, load_trained, save_trained, whole_program
from hpo.models.safe_loader import Program, read_config
from hpo.models.views import View
from hpo.spec.models import CnnSpec, ConvnetSpec, MlpSpec, ResnetSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import TrainingSpec

MLP = MlpSpec(kind="mlp", hidden=16, batch_norm=True, dropout=0.5)
FAMILIES = [
    MLP,
    CnnSpec(kind="cnn", filters=4, dropout=0.5),
    ConvnetSpec(kind="convnet", filters=[4, 6], whiten=2, head="global", dense_dropout=0.2),
    ResnetSpec(kind="resnet", dropout=0.5),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "programs"


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made, export = [], torch.export.export

    def count(*arguments, **options):
        made.append(1)
        return export(*arguments, **options)

    monkeypatch.setattr(torch.export, "export", count)
    return made


def _trained(model, digits, folder, *, seed, **config):
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=model, training=TrainingSpec())
    save_trained(build_model(model, image_shape=(8, 8, 1), classes=10, seed=seed), setup, digits, folder)
    (folder / CONFIG).write_text(json.dumps(read_config(folder / CONFIG) | config))
    return folder


def _check(folder, digits):
    images = digits.images[digits.valid[:70]]
    net, config = load_trained(folder)
    with torch.inference_mode():
        expected = whole_program(net, config)(images)
    np.testing.assert_allclose(Program(folder / PROGRAM).predict(images.numpy()), expected, atol=1e-6)
    plain = torch.export.load(folder / PROGRAM).module()
    np.testing.assert_allclose(plain(images).detach(), expected, atol=1e-6)
    np.testing.assert_allclose(plain(images[:1]).detach(), expected[:1], atol=1e-6)


@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model.kind)
def test_a_second_network_of_an_architecture_is_not_traced_again(model, digits, tmp_path, traces):
    for seed, rate in ((1, 0.5), (2, 0.1)):
        name = "dense_dropout" if model.kind == "convnet" else "dropout"
        other = model.model_copy(update={name: rate})
        folder = _trained(other, digits, tmp_path / str(seed), seed=seed, temperature=1.0 + seed, mean=[0.1 * seed])
        export_program(folder)
        _check(folder, digits)
    assert traces == [1]


@pytest.mark.parametrize(
    "change",
    [
        {"model": MLP.model_copy(update={"hidden": 17})},
        {"model": MLP.model_copy(update={"activation": "gelu"})},
        {"model": MLP.model_copy(update={"dropout": 0.0})},
        {"views": [asdict(View()), asdict(View(mirror=True))]},
        {"temperature": 2.0},
    ],
    ids=str,
)
def test_what_the_graph_depends_on_is_traced_anew(change, digits, tmp_path, traces):
    export_program(_trained(MLP, digits, tmp_path / "one", seed=1))
    folder = _trained(change.pop("model", MLP), digits, tmp_path / "other", seed=1, **change)
    export_program(folder)
    _check(folder, digits)
    assert traces == [1, 1]


@pytest.mark.parametrize("damage", ["cut", "graph"])
def test_a_damaged_program_in_the_cache_is_replaced(damage, digits, tmp_path, traces, cache):
    export_program(_trained(MLP, digits, tmp_path / "one", seed=1))
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    kept.write_bytes(content[:900] if damage == "cut" else content.replace(b"aten.relu.default", b"aten.tanh.default"))
    assert kept.read_bytes() != content
    for number in (2, 3):
        folder = _trained(MLP, digits, tmp_path / str(number), seed=number)
        export_program(folder)
        _check(folder, digits)
    assert traces == [1, 1]
    assert kept.read_bytes() == content


def test_no_place_of_this_machine_is_in_a_program(digits, tmp_path):
    file = export_program(_trained(MLP, digits, tmp_path / "one", seed=1))
    assert b".py" not in file.read_bytes()


@pytest.mark.slow
def test_a_program_of_a_known_architecture_needs_no_compiler(digits, tmp_path):
    export_program(_trained(MLP, digits, tmp_path / "one", seed=1))
    other = _trained(MLP, digits, tmp_path / "other", seed=2)
    code = (
        "import sys; from pathlib import Path; from hpo.models import export_program; "
        f"export_program(Path({str(other)!r})); print({{'sympy', 'torch._dynamo'}} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
    _check(other, digits)
