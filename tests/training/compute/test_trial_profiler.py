"""Where a trial's time goes, what it computes, and that the looking changes nothing."""

import time

import pytest
import torch
from torch import nn

from hpo.profile import NO_CLOCK, Clock, timed
from hpo.records import TrialResult
from hpo.spec.models import MlpSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, TrainingSpec
from hpo.training.compute.roofline import peaks, work_of
from hpo.training.trial import train_trial

PHASES = {"load", "profile", "batch", "augment", "forward", "backward", "optimizer", "evaluate", "wait", "save"}


def _train(card, folder, *, profile, **split):
    setup = Setup(
        data=DataSpec(name="digits"),
        split=SplitSpec(**{"kind": "holdout", **split}),
        model=MlpSpec(kind="mlp", hidden=32, dropout=0.2),
        training=TrainingSpec(epochs=3, precision="float32", augment=AugmentSpec(flip_horizontal=True)),
    )
    options = {"number": 0, "seed": 5, "folder": folder, "device_name": "cpu", "precisions": {}}
    training = train_trial(setup, card, **options, profile=profile)
    try:
        next(training)
        while True:
            training.send(True)
    except StopIteration as end:
        return end.value


def test_looking_changes_no_result_and_nothing_is_said_unasked(digits_card, tmp_path):
    looked, plain = (_train(digits_card, tmp_path, profile=profile) for profile in (True, False))
    assert plain.profile is None
    assert looked.scores == plain.scores
    assert looked.predicted == plain.predicted


def test_every_moment_of_a_trial_belongs_to_a_phase(digits_card, tmp_path):
    shares = []
    for turn in range(5):
        began = time.perf_counter()
        profile = _train(digits_card, tmp_path / str(turn), profile=True).profile
        wall = time.perf_counter() - began
        assert set(profile.seconds) == set(profile.cpu_seconds) == PHASES
        assert all(0 <= profile.cpu_seconds[phase] <= seconds + 0.05 for phase, seconds in profile.seconds.items())
        shares.append(sum(profile.seconds.values()) / wall)
    assert max(shares) > 0.95  # the others may have waited for other processes between two phases
    assert max(shares) <= 1


def test_flops_are_those_of_the_products(digits_card, digits, tmp_path):
    profile = _train(digits_card, tmp_path, profile=True).profile
    weights = 64 * 32 + 2 * 32 * 10  # the first layer's inputs need no gradient, the second's do
    forward, backward = 2 * (64 * 32 + 32 * 10), 2 * weights
    assert profile.flops == pytest.approx(3 * len(digits.train) * (forward + backward))
    assert profile.traffic > profile.flops / 64
    assert profile.peak_flops > 1e8
    assert profile.peak_traffic > 1e7


def test_folds_add_up(digits_card, tmp_path):
    profile = _train(digits_card, tmp_path, profile=True, kind="kfold", folds=2).profile
    images = 3 * digits_card.development_count  # each fold trains on half of them
    assert profile.flops == pytest.approx(images * (4 * 64 * 32 + 6 * 32 * 10), rel=0.01)


def test_counting_work_leaves_network_and_chance_as_they_were():
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    chance = torch.get_rng_state()
    flops, traffic = work_of(net, torch.randn(6, 4), torch.zeros(6, dtype=torch.long), precision="float32")
    assert flops == 6 * 2 * (2 * 4 * 8 + 3 * 8 * 3)
    assert traffic > 6 * 4 * (4 + 8 + 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(weight.grad is None for weight in net.parameters())
    assert not net.training
    assert not torch.equal(torch.get_rng_state(), chance)  # torch.randn above
    torch.set_rng_state(chance)
    work_of(net, torch.ones(6, 4), torch.zeros(6, dtype=torch.long), precision="float32")
    assert torch.equal(torch.get_rng_state(), chance)


@pytest.mark.parametrize("groups", [1, 4])
def test_each_gradient_of_a_convolution_takes_what_the_convolution_takes(groups):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=groups), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    flops, _ = work_of(net, torch.ones(2, 3, 10, 10), torch.zeros(2, dtype=torch.long), precision="float32")
    # The first has no image to hand a gradient to.
    assert flops == 2 * 2 * (2 * 100 * 8 * 3 + 3 * 64 * 16 * 8 // groups * 9)


def test_a_network_that_refuses_to_be_watched_trains_without_figures(digits_card, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("not under a dispatch mode")

    monkeypatch.setattr("hpo.training.compute.trial_profiler.work_of", refuse)
    result = _train(digits_card, tmp_path, profile=True)
    assert result.scores["valid_accuracy"] > 0.5
    assert result.profile.flops == 0
    assert result.profile.seconds["forward"] > 0


def test_peaks_are_measured_once_a_process():
    first = peaks("cpu", "float32", torch.get_num_threads())
    assert peaks("cpu", "float32", torch.get_num_threads()) is first


def test_a_clock_waits_for_the_device_before_it_reads():
    seen = []
    clock = Clock(sync=lambda: seen.append("sync"))
    clock.lap("forward")
    clock.lap("backward")
    assert seen == ["sync", "sync"]
    assert list(clock.seconds) == ["forward", "backward"]


def test_only_the_named_methods_of_a_timed_object_are_timed():
    clock = Clock()
    one = timed([3, 1, 2], clock, sort="order")
    one.sort()
    assert (one.count(1), one.index(3)) == (1, 2)
    assert list(clock.seconds) == ["order"]
    plain = [1]
    assert timed(plain, NO_CLOCK, sort="order") is plain


def test_profiles_are_stored_and_results_of_older_versions_load(digits_card, tmp_path):
    result = _train(digits_card, tmp_path, profile=True)
    assert TrialResult.from_json(result.to_json()) == result
    old = result.to_json()
    del old["profile"]
    assert TrialResult.from_json(old).profile is None
