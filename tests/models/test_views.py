"""Views are exact changes of images, only those of the training's augmentation, and used only where they help."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpo.models.views import PLAIN, View, Views, candidates, choose
from hpo.spec.training import AugmentSpec

IMAGES = torch.randint(256, (3, 6, 6, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirror", [False, True])
def test_a_view_mirrors_then_turns(mirror, turns):
    expected = IMAGES.numpy()[:, :, ::-1] if mirror else IMAGES.numpy()
    expected = np.rot90(expected, turns, axes=(1, 2))
    assert np.array_equal(View(mirror, turns)(IMAGES).numpy(), expected)


@pytest.mark.parametrize(("fill", "mode"), [("reflect", "symmetric"), ("edge", "edge"), ("black", "constant")])
@pytest.mark.parametrize(("right", "down"), [(2, 0), (-1, 0), (0, 1), (2, -2)])
def test_a_shift_fills_as_the_training_does(fill, mode, right, down):
    wide = np.pad(IMAGES.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode=mode)
    expected = wide[:, 2 - down : 8 - down, 2 - right : 8 - right]
    assert np.array_equal(View(right=right, down=down, fill=fill)(IMAGES).numpy(), expected)


def test_a_crop_is_enlarged_to_the_whole_image():
    images = torch.full((1, 8, 8, 3), 7, dtype=torch.uint8)
    images[:, :4, :4] = 200
    found = View(crop=(0, 0, 4, 4))(images)
    assert found.shape == images.shape
    assert (found == 200).all()


def test_what_the_augmentation_does_not_do_is_not_offered():
    assert candidates(AugmentSpec(), (28, 28, 3)) == []
    assert candidates(AugmentSpec(brightness=0.3, cutmix=1.0), (28, 28, 3)) == []
    assert candidates(AugmentSpec(flip_horizontal=True), (28, 28, 3)) == [(PLAIN, View(mirror=True))]
    upside = candidates(AugmentSpec(flip_vertical=True), (28, 28, 3))
    assert upside == [(PLAIN, View(mirror=True, turns=2))]
    assert np.array_equal(upside[0][1](IMAGES).numpy(), IMAGES.numpy()[:, ::-1])


def test_flips_and_turns_give_the_eight_symmetries_of_a_square_and_of_an_oblong_only_its_own():
    all_of = AugmentSpec(flip_horizontal=True, flip_vertical=True, rotate90=True)
    square = candidates(all_of, (28, 28, 1))[0]
    assert len({view(IMAGES).numpy().tobytes() for view in square}) == len(square) == 8
    assert len(candidates(all_of, (28, 30, 1))[0]) == 4


def test_shifts_are_offered_of_the_mirror_image_too():
    sets = candidates(AugmentSpec(flip_horizontal=True, crop=2), (28, 28, 1))
    assert [len(views) for views in sets] == [2, 5, 10]
    assert all(views[0] == PLAIN for views in sets)
    assert {view.right for view in sets[-1]} == {0, 1, -1}


def test_crops_follow_the_zoom():
    (views,) = candidates(AugmentSpec(zoom=0.5), (20, 20, 1))
    assert [view.crop for view in views] == [
        None,
        *((top, left, 16, 16) for top, left in ((2, 2), (0, 0), (0, 4), (4, 0), (4, 4))),
    ]


def test_a_record_of_a_view_gives_the_view_back():
    import json
    from dataclasses import asdict

    for view in candidates(AugmentSpec(flip_horizontal=True, crop=2, zoom=0.5), (28, 28, 1))[-1]:
        assert View.read(json.loads(json.dumps(asdict(view)))) == view


LABELS = torch.arange(2000) % 4
MIRROR = View(mirror=True)


def answers(noise: float, *, plain: float = 1.5):
    """Noisy answers, drawn anew for each view: an average of views is better."""

    def answer(view: View) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash(view) % 2**31)
        logits = 2.0 * torch.nn.functional.one_hot(LABELS, 4)
        logits = logits + (plain if view == PLAIN else noise) * torch.randn(len(LABELS), 4, generator=generator)
        return logits.softmax(1)

    return answer


def test_views_that_help_are_chosen_and_judged():
    found = choose(answers(1.5), LABELS, [(PLAIN, MIRROR)])
    assert found is not None
    choice, probabilities, judged = found
    assert choice.views == (PLAIN, MIRROR)
    assert choice.loss.high < 0 < choice.accuracy.value
    expected = (answers(1.5)(PLAIN) + answers(1.5)(MIRROR)) / 2
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(judged, expected)  # both halves choose this set


def test_views_that_mislead_are_refused():
    choice, probabilities, _ = choose(answers(9.0), LABELS, [(PLAIN, MIRROR)])
    assert choice.views == (PLAIN,)
    torch.testing.assert_close(probabilities, answers(9.0)(PLAIN))


def test_there_is_nothing_to_choose_without_views_or_on_few_images():
    assert choose(answers(1.5), LABELS, []) is None
    assert choose(lambda view: answers(1.5)(view)[:50], LABELS[:50], [(PLAIN, MIRROR)]) is None


def test_the_program_averages_over_its_views():
    class Mean(torch.nn.Module):
        def forward(self, images):
            return images.float().mean((1, 2))[:, :2] / 255

    left = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    program = Views(Mean(), [PLAIN, View(right=2, fill="black")])
    left[:, :, :2] = 255
    torch.testing.assert_close(program(left), torch.full((1, 2), 0.5))
    left[:] = 255
    torch.testing.assert_close(program(left), torch.full((1, 2), 0.75))
