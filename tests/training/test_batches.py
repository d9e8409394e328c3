"""Images of a batch are the same, whether they were turned before or are turned now."""

import itertools

import pytest
import torch

from hpo.spec.training import AugmentSpec
from hpo.training import batches

FLAGS = ("flip_horizontal", "flip_vertical", "rotate90")
IMAGES = torch.randint(0, 256, (200, 6, 6, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def _taken(spec, monkeypatch, most):
    monkeypatch.setattr(batches, "_MOST_BYTES", most)
    generator = torch.Generator().manual_seed(2)
    taken = batches.Batches(IMAGES, spec)
    places = taken.rows(torch.randperm(200), 64, generator)
    return [taken.gather(some, generator) for some in places.split(64)], generator.get_state()


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=3)))
@pytest.mark.parametrize("more", [{}, {"brightness": 0.3}], ids=["alone", "recoloured"])
def test_kept_turns_are_those_made_batch_by_batch(flags, more, monkeypatch):
    spec = AugmentSpec(**dict(zip(FLAGS, flags, strict=True)), **more)
    torch.manual_seed(0)
    kept, after = _taken(spec, monkeypatch, 2**28)
    torch.manual_seed(0)
    made, then = _taken(spec, monkeypatch, 0)
    assert all(torch.equal(one, other) for one, other in zip(kept, made, strict=True))
    assert torch.equal(after, then)


def test_turns_draw_what_one_change_after_the_other_drew():
    """Seeds of earlier studies give the trainings that they gave."""
    spec, generator = AugmentSpec(**dict.fromkeys(FLAGS, True)), torch.Generator().manual_seed(3)
    taken = batches.Batches(IMAGES, spec)
    new = taken.gather(taken.rows(torch.arange(200), 200, generator), generator)
    chance = torch.Generator().manual_seed(3)
    old = IMAGES
    for change in (
        lambda some: some.flip(2),
        lambda some: some.flip(1),
        lambda some: some.rot90(2, (1, 2)),
        lambda some: some.rot90(1, (1, 2)),
    ):
        chosen = torch.rand(200, generator=chance) < 0.5
        old = torch.where(chosen.view(-1, 1, 1, 1), change(old), old)
    assert torch.equal(new, old)


def test_turned_images_of_a_data_set_are_made_once():
    spec = AugmentSpec(flip_horizontal=True)
    batches.Batches(IMAGES, spec)
    before = batches._all_flipped.cache_info().misses
    batches.Batches(IMAGES, spec)
    assert batches._all_flipped.cache_info().misses == before


def test_features_are_taken_as_they_are():
    features = torch.randn(200, 5)
    taken = batches.Batches(features, AugmentSpec(flip_horizontal=True))
    assert torch.equal(taken.gather(torch.tensor([3, 1]), torch.Generator()), features[[3, 1]])
