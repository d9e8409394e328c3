"""Features of a frozen backbone: computed once, by all workers together, and never used when they are not whole."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import hpo.training.features as features_module
from hpo.models import build_model
from hpo.models.transfer import transfer_of
from hpo.spec.models import CnnSpec, TimmSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, TrainingSpec
from hpo.training.batches import pick_view
from hpo.training.features import cached_views, features_of, forward
from hpo.training.loop import train
from hpo.training.trial import TrialPlan, build
from small_nets import TINY, weights_file

FLIPS = AugmentSpec(flip_horizontal=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(weights_file(TINY, tmp_path_factory.mktemp("weights")))


def _setup(file, training=None, **model):
    spec = TimmSpec(**TINY, weights=file, input_size=32, **{"freeze": "all", **model})
    split = SplitSpec(kind="holdout")
    return Setup(data=DataSpec(name="digits"), split=split, model=spec, training=training or TrainingSpec(epochs=2))


def _net(setup):
    return transfer_of(build_model(setup.model, image_shape=(8, 8, 1), classes=10, seed=0))


def _features(setup, data, cache, digest="sha256:1"):
    return features_of(_net(setup), setup, data, digest=digest, cache=cache).images


def _no_forward(*_):
    raise AssertionError("images went through the backbone again")


def test_a_head_learns_from_the_cache_what_it_learns_from_the_images(file, digits_card, tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_DATA", str(tmp_path))
    setup = _setup(file, TrainingSpec(epochs=2, precision="float32"))
    made = build(TrialPlan(setup, digits_card, 0, 3, tmp_path, "cpu"))
    assert made.data.images.dtype == torch.float32
    cached = list(train(made.net, made.data, setup.training, seed=1, precision="float32"))
    again = build(TrialPlan(setup, digits_card, 0, 3, tmp_path, "cpu"))
    whole = list(train(again.full_net, again.pixels, setup.training, seed=1, precision="float32"))
    for ours, theirs in zip(cached, whole, strict=True):
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)


def test_images_go_through_a_frozen_backbone_once(file, digits, tmp_path, monkeypatch):
    first = _features(_setup(file), digits, tmp_path)
    monkeypatch.setattr(features_module, "forward", _no_forward)
    assert torch.equal(_features(_setup(file), digits, tmp_path), first)
    head_only = _setup(file, TrainingSpec(label_smoothing=0.1), dense=[8], dropout=0.2)
    assert torch.equal(_features(head_only, digits, tmp_path), first)


@pytest.mark.parametrize("what", ["weights", "data", "size"])
def test_other_weights_data_or_size_are_other_features(what, file, digits, tmp_path):
    first = _features(_setup(file), digits, tmp_path)
    other = _setup(str(weights_file(TINY, tmp_path, seed=5)) if what == "weights" else file)
    if what == "size":
        other = _setup(file).model_copy(update={"model": _setup(file).model.model_copy(update={"input_size": 40})})
    data = replace(digits, images=digits.images.flip(1)) if what == "data" else digits
    second = _features(other, data, tmp_path, digest="sha256:2" if what == "data" else "sha256:1")
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_cache_is_made_again(damage, file, digits, tmp_path):
    expected = _features(_setup(file), digits, tmp_path).clone()
    (stored,) = tmp_path.glob("features/*/features.npy")
    whole = stored.read_bytes()
    if damage == "gone":
        stored.unlink()
    else:
        stored.write_bytes(whole[: len(whole) // 2] if damage == "cut" else whole[:-4] + b"\0\0\1\1")
        os.utime(stored, ns=(0, 0))
    assert torch.equal(_features(_setup(file), digits, tmp_path), expected)


def test_chunks_that_a_killed_worker_left_are_used_if_whole_and_made_again_if_not(file, digits, tmp_path, monkeypatch):
    expected = _features(_setup(file), digits, tmp_path / "a").clone()
    (folder,) = [path for path in (tmp_path / "a" / "features").iterdir() if path.is_dir()]
    scratch = tmp_path / "b" / "features" / f"{folder.name}.parts"
    scratch.mkdir(parents=True)
    np.save(scratch / f"{0:09}.npy", expected[:256].numpy())
    (scratch / f"{256:09}.npy").write_bytes(b"\x93NUMPY cut short")
    np.save(scratch / f"{512:09}.npy", expected[:100].numpy())
    computed = []
    monkeypatch.setattr(
        features_module, "forward", lambda body, images: computed.append(len(images)) or forward(body, images)
    )
    assert torch.equal(_features(_setup(file), digits, tmp_path / "b"), expected)
    assert sum(computed) == len(digits.images) - 256
    assert not scratch.exists()


def _worker(file: str, card, cache: str, count) -> None:
    from hpo.data.prepare import open_trial

    torch.set_num_threads(1)
    setup = _setup(file)
    data = open_trial(card, setup.split, device=torch.device("cpu"))
    seen = features_module.forward

    def counted(body, images):
        with count.get_lock():
            count.value += len(images)
        return seen(body, images)

    features_module.forward = counted
    images = _features(setup, data, Path(cache))
    np.save(Path(cache) / f"{os.getpid()}.npy", images.numpy())


@pytest.mark.slow
def test_workers_that_begin_together_share_the_images_and_get_all_features(
    file, digits_card, digits, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where the processes find this module
    context = multiprocessing.get_context("spawn")
    count = context.Value("i", 0)
    workers = [context.Process(target=_worker, args=(file, digits_card, str(tmp_path), count)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert count.value == len(digits.images)
    expected = forward(_net(_setup(file)).bodies[0], digits.images).numpy()
    for stored in tmp_path.glob("*.npy"):
        np.testing.assert_allclose(np.load(stored), expected, atol=1e-5)


def test_augmented_views_are_drawn_once_and_one_is_picked_in_each_epoch(file, digits, tmp_path):
    setup = _setup(file, TrainingSpec(augment=FLIPS), views=3)
    stored = _features(setup, digits, tmp_path)
    plain = forward(_net(setup).bodies[0], digits.images)
    flipped = forward(_net(setup).bodies[0], digits.images.flip(2))
    assert stored.shape == (len(digits.images), 4, plain.shape[1])
    torch.testing.assert_close(stored[:, 0], plain, atol=1e-4, rtol=1e-4)
    turned = torch.isclose(stored[:, 1:], flipped[:, None], atol=1e-3).all(-1).float().mean()
    assert 0.4 < turned < 0.65  # half of the views are mirrored; a few digits are their own mirror image
    picked = pick_view(stored[:200], torch.Generator().manual_seed(0))
    assert all((row == views).all(-1).any() for row, views in zip(picked, stored[:200, 1:], strict=True))


@pytest.mark.parametrize(
    ("model", "augment", "views"),
    [
        ({}, AugmentSpec(), 0),
        ({"views": 4}, AugmentSpec(), 0),
        ({"views": 4}, FLIPS, 4),
        ({}, FLIPS, None),
        ({}, AugmentSpec(mixup=0.2), None),
        ({"freeze": 2}, AugmentSpec(), None),
        ({"freeze": "none"}, AugmentSpec(), None),
        ({"unfreeze_epoch": 2}, AugmentSpec(), None),
    ],
)
def test_the_cache_serves_exactly_the_trainings_that_see_the_same_features_in_every_epoch(model, augment, views, file):
    assert cached_views(_setup(file, TrainingSpec(augment=augment), **model)) == views


def test_a_network_of_our_own_has_no_cache(file):
    setup = _setup(file).model_copy(update={"model": CnnSpec(kind="cnn")})
    assert cached_views(setup) is None
