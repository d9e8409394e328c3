"""Everything that trains is on the device that it was told, and nothing waits for that between two steps.

There is no GPU: one is pretended.
"""

import pytest
import torch

from device_cases import CLASSES, CNN, FAMILIES, MLP, SIDE, TRAININGS, images, learn, setup
from hpo.events import EpochEnded
from hpo.execute.workers.task import Task, train_task
from hpo.models import build_model
from hpo.records import TrialState
from hpo.training.stack import Stack
from pretend_gpu import WrongDeviceError, pretend_gpu
from small_nets import TINY, weights_file

STACKED = [{}, {"augment": {"mixup": 0.4, "flip_horizontal": True, "rotate": 20.0}}, {"class_weights": "balanced"}]


@pytest.fixture(autouse=True)
def layout(monkeypatch):
    """The CPU computes in the layout of a GPU, and so to the same bits."""
    torch.set_num_threads(1)
    monkeypatch.setattr("hpo.training.device.layout", lambda *_: "channels_last")


def _same(there, here):
    for one, other in zip(there, here, strict=True):
        assert dict(one.scores) == pytest.approx(dict(other.scores), rel=1e-6)


@pytest.mark.parametrize("kind", FAMILIES)
def test_each_family_learns_on_a_gpu_what_it_learns_on_the_cpu(kind):
    model = {"kind": kind, **FAMILIES[kind]}
    _, here = learn(model, "cpu")
    with pretend_gpu():
        net, there = learn(model, "cuda:0")
        assert {tensor.device.type for tensor in net.state_dict().values()} == {"cuda"}
    _same(there, here)


@pytest.mark.parametrize("name", TRAININGS)
def test_each_way_to_train_works_on_a_gpu_as_on_the_cpu_and_no_step_waits(name):
    _, here = learn(CNN, "cpu", **TRAININGS[name])
    with pretend_gpu() as gpu:
        _, there = learn(CNN, "cuda:0", **TRAININGS[name])
    _same(there, here)
    with pretend_gpu() as longer:
        learn(CNN, "cuda:0", **{**TRAININGS[name], "batch_size": 10})
    assert longer.operations.total() > 1.1 * gpu.operations.total()
    assert longer.waits == gpu.waits


def _stack(models, device, **training):
    """Epochs of networks that share their computation."""
    data, stack, fits = images(device), Stack(precision="float32"), []
    for seed, model in enumerate(models):
        made = setup(model, **training, **({"clip_norm": 0.5, "ema": 0.9} if seed else {}))
        net = build_model(made.model, image_shape=(SIDE, SIDE, 3), classes=CLASSES, seed=seed)
        fits.append(stack.join(net, data, made.training, seed=seed))
    rounds = []
    for _ in range(made.training.epochs):
        assert [next(fit) for fit in fits] == [None] * len(fits)
        rounds.append([next(fit) for fit in fits])
    return [epoch for each in rounds for epoch in each]


@pytest.mark.parametrize("model", [MLP, CNN], ids=["mlp", "cnn"])
@pytest.mark.parametrize("training", STACKED, ids=str)
def test_stacks_work_on_a_gpu_as_on_the_cpu_and_no_step_waits(model, training):
    width = "hidden" if model is MLP else "filters"
    models = [model, {**model, width: model[width] + 1}, {**model, "dropout": 0.4}]
    here = _stack(models, "cpu", **training)
    with pretend_gpu() as gpu:
        there = _stack(models, "cuda:0", **training)
    _same(there, here)
    with pretend_gpu() as longer:
        _stack(models, "cuda:0", **{**training, "batch_size": 10})
    assert longer.operations.total() > 1.1 * gpu.operations.total()
    assert longer.waits == gpu.waits


@pytest.mark.parametrize(
    ("compute", "fault"),
    [
        (lambda there: there + torch.ones(3), "aten::add"),
        (lambda there: torch.cat([there, torch.ones(3)]), "aten::cat"),
        (lambda there: there.index_select(0, torch.tensor([0])), "aten::index_select"),
        (lambda there: torch.ones(3)[there.long()], "aten::index"),
        (lambda there: torch.rand(3, device=there.device, generator=torch.Generator()), "aten::rand"),
    ],
)
def test_the_pretended_gpu_refuses_what_a_gpu_refuses(compute, fault):
    with pretend_gpu():
        there = torch.zeros(3, device="cuda:0")
        with pytest.raises(WrongDeviceError, match=fault):
            compute(there)


def test_the_pretended_gpu_counts_what_waits():
    with pretend_gpu() as gpu:
        there = torch.arange(3.0).to("cuda:0", non_blocking=True)
        assert (there * 2).sum().item() == 6
        there.cpu(), there[torch.tensor([0])], there.nonzero(), torch.ones(3).to("cuda:0")
    assert gpu.waits == {
        "aten::_local_scalar_dense": 1,
        "copy to the CPU": 1,
        "copy to the GPU": 1,
        "aten::index by indices of the CPU": 1,
        "aten::nonzero": 1,
    }


def _trial(card, folder, model, device, **training):
    """A whole trial of the digits, and the messages of its worker."""
    made = setup(model, **training)
    folder.mkdir()
    training, epochs = train_task(Task(0, made, 7, card, str(folder / "left"), latency=True), device), []
    message = next(training)
    while isinstance(message, EpochEnded):
        epochs.append(message.epoch)
        message = training.send(True)
    assert message.result.state is TrialState.COMPLETE, message.result.traceback
    return epochs, message.result


@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "head"])
def test_a_trial_on_a_gpu_ends_as_on_the_cpu(card, tmp_path, monkeypatch, kind, precision):
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    weights = str(weights_file(TINY, tmp_path))  # of a backbone whose features are computed there, too
    head = {**TINY, "weights": weights, "freeze": "all", "input_size": 32}
    model = {"mlp": MLP, "cnn": CNN, "head": head}[kind]
    training = {"precision": precision, "epochs": 2}
    here, expected = _trial(card, tmp_path / "here", model, "cpu", **training)
    with pretend_gpu():
        _trial(card, tmp_path / "first", model, "cuda:0", **training)  # the next one finds what it left
        there, found = _trial(card, tmp_path / "there", model, "cuda:0", **training)
    _same(there, here)
    assert found.confusion == expected.confusion
    assert found.settings["device"] == "cuda:0"
    assert found.settings["layout"] == "channels_last"
    assert found.settings["graph"].startswith("eager: it has fewer")
    assert "latency_ms" in found.scores
