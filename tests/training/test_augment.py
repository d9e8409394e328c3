"""Random changes of batches: what each does to the pixels, how often, and that its generator decides all of it."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from hpo.errors import TrainingError
from hpo.spec.training import AugmentSpec
from hpo.training.augment import (
    MIXES,
    OPTIONS,
    erase,
    mix_batch,
    recolour,
    warp,
)
from hpo.training.batches import augmenter
from hpo.training.preflight import preview

STEPS = [
    {"flip_horizontal": True},
    {"flip_vertical": True},
    {"rotate90": True},
    {"rotate": 20},
    {"shift": 0.2},
    {"crop": 3},
    {"zoom": 0.3},
    {"brightness": 0.4},
    {"contrast": 0.4},
    {"saturation": 0.5},
    {"hue": 0.2},
    {"randaugment": 2, "magnitude": 0.5},
    {"erase": 0.8},
]


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _images(count=32, height=12, width=12, channels=3):
    """Smooth pictures, different for each image: noise would hide what a resampling does."""
    coarse = torch.rand(count, channels, 4, 4, generator=_generator(7))
    smooth = functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    return (255 * smooth).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _planes(images):
    return images.permute(0, 3, 1, 2).float()


def _augmented(images, seed=0, **fields):
    return augmenter(AugmentSpec(**fields))(images, _generator(seed))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("fields", STEPS, ids=lambda fields: next(iter(fields)))
def test_every_change_keeps_shape_and_type_and_leaves_its_input_alone(fields, channels):
    images = _images(channels=channels)
    before = images.clone()
    changed = _augmented(images, **fields)
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(images, before)
    colourless = channels != 3 and fields.keys() <= {"saturation", "hue"}
    assert torch.equal(changed, images) is colourless


@pytest.mark.parametrize("fields", STEPS, ids=lambda fields: next(iter(fields)))
def test_the_generator_alone_decides(fields):
    images = _images()
    torch.manual_seed(1)
    first = _augmented(images, seed=3, **fields)
    torch.manual_seed(2)
    assert torch.equal(_augmented(images, seed=3, **fields), first)
    assert not torch.equal(_augmented(images, seed=4, **fields), first)


@pytest.mark.parametrize(
    "fields", [step for step in STEPS if "rotate90" not in step], ids=lambda step: next(iter(step))
)
def test_images_need_not_be_square(fields):
    images = _images(height=8, width=14)
    assert _augmented(images, **fields).shape == images.shape


def test_what_is_off_draws_nothing():
    assert augmenter(AugmentSpec()) is None
    assert augmenter(AugmentSpec(mixup=0.2, cutmix=1.0, magnitude=1.0, erase_area=0.5, fill="edge")) is None
    generator, untouched = _generator(), _generator()
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    mixed, first, second, share = mix_batch(images, labels, AugmentSpec(), generator)
    assert mixed is images
    assert first is labels
    assert second is labels
    assert share == 1
    assert torch.equal(generator.get_state(), untouched.get_state())


@pytest.mark.parametrize(("name", "axis"), [("flip_horizontal", 2), ("flip_vertical", 1)])
def test_flips_turn_half_of_the_images(name, axis):
    images = _images(2000, 4, 4)
    changed = _augmented(images, **{name: True})
    flipped = (changed == images.flip(axis)).flatten(1).all(1)
    kept = (changed == images).flatten(1).all(1)
    assert (flipped | kept).all()
    assert flipped.sum().item() == pytest.approx(1000, abs=5 * math.sqrt(500))


def test_right_angles_are_equally_likely():
    images = _images(2000, 4, 4)
    changed = _augmented(images, rotate90=True)
    counts = [(changed == images.rot90(turns, (1, 2))).flatten(1).all(1).sum().item() for turns in range(4)]
    assert sum(counts) == 2000
    assert counts == pytest.approx([500] * 4, abs=5 * math.sqrt(375))


def test_right_angles_of_oblong_images_are_refused():
    with pytest.raises(TrainingError, match="square images, got 8x14"):
        _augmented(_images(height=8, width=14), rotate90=True)


@pytest.mark.parametrize("turns", [-1, 1, 2])
def test_rotation_by_right_angles_is_rot90(turns):
    planes = _planes(_images())
    moved = warp(planes, {"rotate": torch.full((len(planes),), 90.0 * turns)})
    torch.testing.assert_close(moved, planes.rot90(turns, (2, 3)), atol=0.01, rtol=0)


def test_oblong_images_turn_without_distortion():
    planes = torch.zeros(1, 1, 21, 41)
    planes[:, :, 8:13, 18:23] = 255  # a square about the middle stays one
    moved = warp(planes, {"rotate": torch.tensor([90.0])}, fill="black")
    torch.testing.assert_close(moved, planes, atol=0.01, rtol=0)


def test_shift_is_roll_in_the_interior():
    planes = _planes(_images(height=10, width=20))
    amounts = {"shift_x": torch.full((len(planes),), 3 / 20), "shift_y": torch.full((len(planes),), -2 / 10)}
    rolled = planes.roll((3, -2), (3, 2))
    torch.testing.assert_close(warp(planes, amounts)[:, :, :-2, 3:], rolled[:, :, :-2, 3:], atol=0.01, rtol=0)


def test_zoom_by_two_shows_the_middle_half():
    planes = torch.zeros(1, 1, 8, 8)
    planes[:, :, 2:6, 2:6] = 255
    moved = warp(planes, {"zoom": torch.tensor([math.log(2)])}, fill="black")
    assert (moved[:, :, 1:7, 1:7] == 255).all()
    assert moved.sum() > 3.5 * planes.sum()


@pytest.mark.parametrize(("fill", "beyond"), [("black", [0, 0]), ("edge", [10, 10]), ("reflect", [20, 10])])
def test_fill_says_what_comes_in_from_beyond_the_edges(fill, beyond):
    row = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 1, 1, 4)
    moved = warp(row, {"shift_x": torch.tensor([0.5])}, fill=fill)
    assert moved.flatten().tolist() == pytest.approx([*beyond, 10, 20], abs=0.01)


def test_crops_are_all_shifts_by_whole_pixels_equally_often():
    images = _images(1000, 8, 8)
    changed = _augmented(images, crop=1)
    padded = functional.pad(_planes(images), (1, 1, 1, 1), mode="replicate").permute(0, 2, 3, 1).to(torch.uint8)
    # Half-sample reflection by one pixel repeats the edge.
    counts = [
        (changed == padded[:, top : top + 8, left : left + 8]).flatten(1).all(1).sum().item()
        for top in range(3)
        for left in range(3)
    ]
    assert sum(counts) == 1000
    assert counts == pytest.approx([1000 / 9] * 9, abs=5 * math.sqrt(99))


def test_amounts_are_uniform_up_to_the_limit_and_of_each_image_its_own():
    images = torch.full((4000, 2, 2, 1), 100, dtype=torch.uint8)
    means = _augmented(images, brightness=0.5).float().mean((1, 2, 3))
    assert means.min().item() == pytest.approx(50, abs=1)
    assert means.max().item() == pytest.approx(150, abs=1)
    quarters = torch.histc(means, 4, 49.5, 150.5) / len(means)
    assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.04)


def _whole(planes, **amounts):
    return recolour(planes, {name: torch.full((len(planes),), amount) for name, amount in amounts.items()})


def test_colours_are_those_of_torchvision():
    from torchvision.transforms.v2 import functional as vision

    # Middle tones, so that torchvision's clamping after each change does not count.
    planes = _planes(_images()) * 0.4 + 70
    unit = planes / 255
    for name, change in {
        "brightness": vision.adjust_brightness,
        "contrast": vision.adjust_contrast,
        "saturation": vision.adjust_saturation,
    }.items():
        expected = 255 * change(unit, 1.3)
        torch.testing.assert_close(_whole(planes, **{name: 0.3}), expected, atol=0.1, rtol=0)


def test_hue_turns_colours_and_keeps_greys_and_brightness():
    planes = _planes(_images())
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    turned = _whole(planes, hue=0.25)
    torch.testing.assert_close((turned * luma).sum(1), (planes * luma).sum(1), atol=0.01, rtol=0)
    assert (turned - planes).abs().mean() > 5
    torch.testing.assert_close(_whole(_whole(planes, hue=0.5), hue=0.5), planes, atol=0.01, rtol=0)
    grey = planes[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(_whole(grey, hue=0.3), grey, atol=0.01, rtol=0)


def test_no_saturation_is_grey():
    grey = _whole(_planes(_images()), saturation=-1.0)
    torch.testing.assert_close(grey[:, 0], grey[:, 2], atol=0.01, rtol=0)


def test_erased_share_and_area_are_as_asked():
    images = torch.zeros(3000, 20, 20, 1, dtype=torch.uint8)
    images[:, ::2] = 200  # stripes, whose mean is nowhere in them
    erased = erase(images, _generator(), probability=0.3, largest=0.5)
    areas = (erased == 100).flatten(1).float().mean(1)
    assert torch.equal(areas == 0, (erased == images).flatten(1).all(1))
    assert (areas > 0).float().mean().item() == pytest.approx(0.3, abs=0.05)
    assert areas.max() <= 0.55
    assert areas[areas > 0].mean().item() == pytest.approx(0.26, abs=0.03)


def test_erased_pixels_are_one_rectangle():
    images = torch.zeros(50, 16, 16, 1, dtype=torch.uint8)
    images[:, ::2] = 200
    for changed in erase(images, _generator(), probability=1.0, largest=0.4)[..., 0] == 100:
        rows, columns = changed.any(1), changed.any(0)
        assert changed.sum() == rows.sum() * columns.sum() > 0
        assert rows.nonzero().flatten().diff().eq(1).all()
        assert columns.nonzero().flatten().diff().eq(1).all()


def test_randaugment_makes_more_changes_of_more_strength_when_asked():
    images = _images(200)

    def distance(**fields):
        return (_augmented(images, **fields).float() - images.float()).abs().mean().item()

    assert distance(randaugment=1, magnitude=0.0) == 0
    assert distance(randaugment=1, magnitude=0.1) < distance(randaugment=1, magnitude=0.5)
    assert distance(randaugment=1, magnitude=0.2) < distance(randaugment=4, magnitude=0.2)
    # One in ten draws the change that is none.
    alone = (_augmented(images, randaugment=1, magnitude=0.5) == images).flatten(1).all(1).float().mean()
    assert 0.02 < alone.item() < 0.25


@pytest.mark.parametrize("fields", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_loss_is_the_loss_of_the_mixed_labels(fields):
    images, labels = torch.rand(16, 3, 8, 8), torch.arange(16) % 5
    generator = _generator()
    logits = torch.randn(16, 5, generator=_generator(1))
    shares = set()
    for _ in range(40):
        mixed, first, second, share = mix_batch(images, labels, AugmentSpec(**fields), generator)
        assert mixed.shape == images.shape
        assert 0 <= share <= 1
        assert torch.equal(first, labels)
        soft = share * functional.one_hot(first, 5) + (1 - share) * functional.one_hot(second, 5)
        loss = share * functional.cross_entropy(logits, first) + (1 - share) * functional.cross_entropy(logits, second)
        torch.testing.assert_close(loss, functional.cross_entropy(logits, soft))
        shares.add(share)
    assert len(shares) > 10


def test_mixup_blends_each_image_with_another_in_the_share_of_its_label():
    values = torch.arange(1.0, 9.0)
    images = values.view(8, 1, 1, 1).expand(8, 1, 4, 4)
    mixed, first, second, share = mix_batch(images, torch.arange(8), AugmentSpec(mixup=1.0), _generator())
    torch.testing.assert_close(mixed.mean((1, 2, 3)), share * values[first] + (1 - share) * values[second])


def test_cutmix_pastes_one_rectangle_in_the_share_of_its_label():
    values = torch.arange(1.0, 9.0)
    images = values.view(8, 1, 1, 1).expand(8, 1, 20, 20)
    generator = _generator()
    for _ in range(20):
        mixed, first, second, share = mix_batch(images, torch.arange(8), AugmentSpec(cutmix=1.0), generator)
        torch.testing.assert_close(mixed.mean((1, 2, 3)), share * values[first] + (1 - share) * values[second])
        assert ((mixed == values[first].view(8, 1, 1, 1)) | (mixed == values[second].view(8, 1, 1, 1))).all()


def test_small_alphas_mix_little():
    images, labels, generator = torch.rand(2, 1, 4, 4), torch.arange(2), _generator()

    def spread(alpha):
        draws = [mix_batch(images, labels, AugmentSpec(mixup=alpha), generator)[3] for _ in range(200)]
        return sum(min(share, 1 - share) for share in draws) / len(draws)

    assert spread(0.01) < 0.05 < spread(0.2) < spread(1.0) < spread(8.0)


def test_preview_shows_each_image_and_its_changed_copies():
    images = _images(3, 12, 12)
    spec = AugmentSpec(flip_horizontal=True, rotate=20, brightness=0.3, mixup=0.4)
    picture = preview(images, spec, generator=_generator(), copies=4)
    assert picture.shape == (3 * 14 - 2, 5 * 14 - 2, 3)
    assert picture.dtype == "uint8"
    assert (picture[:12, :12] == images[0].numpy()).all()
    assert (picture[14:26, :12] == images[1].numpy()).all()
    assert (picture[12:14] == 255).all()
    assert (picture[:12, 14:26] != images[0].numpy()).any()
    assert (picture == preview(images, spec, generator=_generator(), copies=4)).all()


def test_preview_without_changes_repeats_the_image():
    images = _images(2, 12, 12, 1)
    picture = preview(images, AugmentSpec(), generator=_generator(), copies=1)
    assert (picture[:, :12] == picture[:, 14:]).all()


@pytest.mark.parametrize(
    "fields", [{"rotate": -1}, {"shift": 1.0}, {"hue": 0.6}, {"fill": "mirror"}, {"erase": 1.1}, {"randaugment": 11}]
)
def test_amounts_out_of_range_are_refused(fields):
    with pytest.raises(ValidationError):
        AugmentSpec(**fields)


@pytest.mark.parametrize("name", [name for name in AugmentSpec.model_fields if name not in OPTIONS])
def test_every_field_of_the_spec_changes_a_batch_when_it_is_the_only_one(name):
    value = True if AugmentSpec.model_fields[name].annotation is bool else 1 if name in ("crop", "randaugment") else 0.5
    spec, images = AugmentSpec(**{name: value}), _images(20, 12, 12)
    if name in MIXES:
        mixed, *_ = mix_batch(_planes(images), torch.arange(20), spec, _generator())
        assert not torch.equal(mixed, _planes(images))
    else:
        assert not torch.equal(augmenter(spec)(images, _generator()), images)
