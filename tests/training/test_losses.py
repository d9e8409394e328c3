"""Losses and the sampling of classes: held against torch's own, their definitions, and through a training."""

import pytest
import torch
from torch.nn import functional

from hpo.data.prepare import TrialData
from hpo.errors import HpoError
from hpo.models.basic import build_mlp
from hpo.spec.models import MlpSpec
from hpo.spec.training import TrainingSpec
from hpo.training.loop import train
from hpo.training.optimizers import Loss, balanced_order
from hpo.training.stack_layers import unstackable_reason


def _data(labels, classes=3):
    images = torch.randint(0, 256, (len(labels), 4, 4, 1), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    rows = torch.arange(len(labels))
    return TrialData(images, labels, rows, rows[:8], tuple("abc"[:classes]), (0.5,), (0.3,))


LABELS = torch.tensor([0, 1, 2, 0, 0, 1, 0, 0, 0, 1, 2, 0])
SEVERAL = torch.stack([LABELS == 0, LABELS > 0, LABELS == 2], 1).long()
LOGITS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def _loss(labels, **places):
    return Loss(TrainingSpec(**places), _data(labels))(LOGITS, labels)


def test_cross_entropy_is_that_of_torch():
    expected = functional.cross_entropy(LOGITS, LABELS, label_smoothing=0.1)
    assert torch.equal(_loss(LABELS, label_smoothing=0.1), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_weighs_each_image_by_what_it_lacks(gamma):
    chosen = LOGITS.softmax(1)[range(12), LABELS]
    assert _loss(LABELS, loss="focal", focal_gamma=gamma).item() == pytest.approx(
        (-((1 - chosen) ** gamma) * chosen.log()).mean().item(), rel=1e-5
    )


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("labels", [LABELS, SEVERAL], ids=["one label", "several"])
def test_focal_loss_without_gamma_is_cross_entropy(labels, weights):
    focal = _loss(labels, loss="focal", focal_gamma=0.0, class_weights=weights)
    assert focal.item() == pytest.approx(_loss(labels, class_weights=weights).item(), rel=1e-6)


def test_several_labels_have_binary_cross_entropy():
    expected = functional.binary_cross_entropy_with_logits(LOGITS, SEVERAL.float())
    assert torch.equal(_loss(SEVERAL), expected)
    positive = torch.tensor([5 / 7, 7 / 5, 10 / 2])
    weighted = functional.binary_cross_entropy_with_logits(LOGITS, SEVERAL.float(), pos_weight=positive)
    assert torch.allclose(_loss(SEVERAL, class_weights="balanced"), weighted)


@pytest.mark.parametrize("weights", ["none", "balanced"])
@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
@pytest.mark.parametrize("labels", [LABELS, SEVERAL], ids=["one label", "several"])
def test_pieces_of_a_batch_add_up_to_its_loss(labels, loss, weights):
    whole = Loss(TrainingSpec(loss=loss, class_weights=weights), _data(labels))
    pieces = zip(LOGITS.tensor_split(3), labels.tensor_split(3), strict=True)
    total = sum(whole(logits, part) * whole.share(part, labels) for logits, part in pieces)
    assert float(total) == pytest.approx(whole(LOGITS, labels).item(), rel=1e-5)


def test_balanced_sampling_draws_all_classes_equally_often():
    labels = torch.cat([torch.zeros(900), torch.ones(90), torch.full((10,), 2)]).long()
    places = balanced_order(labels, 30_000, torch.Generator().manual_seed(0))
    assert labels[places].bincount().div(30_000).tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
    assert len(places[labels[places] == 2].unique()) == 10


def test_balanced_sampling_of_several_labels_is_refused():
    with pytest.raises(HpoError, match="have several labels"):
        balanced_order(SEVERAL, 12, torch.Generator())


@pytest.mark.parametrize(
    ("places", "reason"),
    [({"loss": "focal"}, "its loss is not cross-entropy"), ({"sampling": "balanced"}, "its images are drawn by class")],
)
def test_trainings_with_them_share_their_computation_with_no_other_and_differ(places, reason):
    data, nets = _data(LABELS), []
    for spec in (TrainingSpec(epochs=2, batch_size=4), TrainingSpec(epochs=2, batch_size=4, **places)):
        torch.manual_seed(0)
        nets.append(build_mlp(MlpSpec(kind="mlp", hidden=4), (4, 4, 1), 3))
        assert len(list(train(nets[-1], data, spec, seed=0, precision="float32"))) == 2
    assert unstackable_reason(nets[1], data, spec) == reason
    assert not torch.equal(*(next(net.parameters()) for net in nets))


def test_a_loss_of_ones_own_trains(tmp_path, monkeypatch):
    (tmp_path / "their_losses.py").write_text(
        "from torch.nn import functional\n"
        "def same(logits, labels):\n"
        "    return functional.cross_entropy(logits, labels)\n"
        "def each(logits, labels):\n"
        "    return functional.cross_entropy(logits, labels, reduction='none')\n"
        "def broken(logits, labels):\n"
        "    return labels.what\n"
    )
    monkeypatch.chdir(tmp_path)
    grown = LOGITS.clone().requires_grad_()
    data = _data(LABELS)
    assert torch.equal(
        Loss(TrainingSpec(loss="their_losses:same"), data)(grown, LABELS), functional.cross_entropy(grown, LABELS)
    )
    for name, message in (("each", r"a tensor of shape \(12,\), not a scalar"), ("broken", "the function fails")):
        with pytest.raises(HpoError, match=message):
            Loss(TrainingSpec(loss=f"their_losses:{name}"), data)(grown, LABELS)
    with pytest.raises(HpoError, match="there is no module"):
        Loss(TrainingSpec(loss="their_lost:same"), data)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"loss": "focal", "label_smoothing": 0.1}, "label_smoothing belongs to cross_entropy"),
        ({"loss": "my.losses:dice", "class_weights": "balanced"}, "class_weights do not reach my.losses:dice"),
        ({"loss": "hinge"}, "String should match"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(places, message):
    with pytest.raises(ValueError, match=message):
        TrainingSpec(**places)
