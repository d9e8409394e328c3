"""What is said of a data set is true, and nothing of the test part but numbers is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpo.data.duplicates import contradictions, copies, found_in, pixel_digests
from hpo.data.overview import channel_statistics, duplicates, open_development, sample_rows, to_png
from hpo.data.prepare import open_trial, prepare
from hpo.data.test_set import duplicates_of_test
from hpo.errors import DataError
from hpo.spec.study import DataSpec, SplitSpec


def noise(count: int, *, seed: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 6, channels), dtype=np.uint8)


@pytest.fixture
def repeating(tmp_path):
    """Train, validation and test of which some images are the same."""
    train, valid, test = noise(40, seed=1), noise(12, seed=2), noise(10, seed=3)
    labels = {part: np.arange(count) % 2 for part, count in (("train", 40), ("val", 12), ("test", 10))}
    train[7] = train[5]  # the same label
    train[8] = train[5]  # another label
    valid[0] = train[1]  # another part, another label
    test[:3] = train[20]
    test[3] = valid[4]
    images = {"train_images": train, "val_images": valid, "test_images": test}
    np.savez(tmp_path / "mine.npz", **images, **{f"{part}_labels": of for part, of in labels.items()})
    data = DataSpec(name="npz", path=str(tmp_path / "mine.npz"))
    return prepare(data, SplitSpec(), cache=tmp_path / "cache")


def test_duplicates_are_counted_within_and_across_parts(repeating) -> None:
    images, _, parts = open_development(repeating, SplitSpec())
    within, across = duplicates(repeating, pixel_digests(images), parts)
    assert within == {"train": 2, "valid": 0, "test": 2}
    assert across == {("train", "valid"): 1, ("train", "test"): 3, ("valid", "test"): 1}


def test_images_with_the_same_pixels_and_different_labels_are_found(repeating) -> None:
    images, labels, _ = open_development(repeating, SplitSpec())
    assert contradictions(pixel_digests(images), labels.tolist()) == [[1, 40], [5, 7, 8]]


def test_one_changed_pixel_makes_another_image() -> None:
    images = np.repeat(noise(1, seed=0), 3, axis=0)
    images[2, 5, 5, 2] ^= 1
    digests = pixel_digests(images)
    assert digests[0] == digests[1] != digests[2]
    assert (copies(digests), found_in(digests[2:], digests[:2]), copies([])) == (1, 0, 0)


def test_of_the_test_part_only_numbers_leave(repeating) -> None:
    answer = duplicates_of_test(repeating, {"train": []})
    assert answer == {"test": 2, "train": 0}
    assert all(type(number) is int for number in answer.values())
    images, labels, parts = open_development(repeating, SplitSpec())
    assert len(images) == len(labels) == sum(map(len, parts.values())) == 52


def test_a_data_set_without_validation_has_two_parts(digits_card) -> None:
    images, _, parts = open_development(digits_card, SplitSpec(kind="none"))
    assert list(parts) == ["train"]
    within, across = duplicates(digits_card, pixel_digests(images), parts)
    assert (list(within), list(across)) == (["train", "test"], [("train", "test")])


def test_channel_statistics_are_those_that_training_normalises_with(repeating) -> None:
    images, _, parts = open_development(repeating, SplitSpec())
    trial = open_trial(repeating, SplitSpec(), device=torch.device("cpu"))
    mean, std = channel_statistics(images, parts["train"])
    np.testing.assert_allclose(mean, trial.mean, rtol=1e-12)
    np.testing.assert_allclose(std, trial.std, rtol=1e-9)
    pixels = images[parts["train"]].reshape(-1, 3) / 255
    np.testing.assert_allclose((mean, std), (pixels.mean(0), pixels.std(0)), rtol=1e-9)


def test_samples_are_training_images_of_their_class_drawn_by_the_seed(digits_card) -> None:
    split = SplitSpec(kind="holdout")
    _, labels, parts = open_development(digits_card, split)
    rows = sample_rows(labels, parts["train"], classes=10, count=5, seed=1)
    for label, of in enumerate(rows):
        assert len(set(of)) == 5
        assert set(labels[of]) == {label}
        assert set(of) <= set(parts["train"].tolist())
    assert rows == sample_rows(labels, parts["train"], classes=10, count=5, seed=1)
    assert rows != sample_rows(labels, parts["train"], classes=10, count=5, seed=2)
    few = sample_rows(labels, parts["train"][:30], classes=10, count=50, seed=1)
    assert sorted(row for of in few for row in of) == parts["train"][:30].tolist()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_an_image_of_any_channels_becomes_a_png(channels: int) -> None:
    import io

    from PIL import Image

    image = noise(1, seed=0, channels=channels)[0]
    with Image.open(io.BytesIO(to_png(image))) as read:
        pixels = np.asarray(read)
    np.testing.assert_array_equal(pixels, image if channels > 2 else image[..., 0])


def test_prepared_files_that_are_gone_are_told(repeating) -> None:
    for folder, name in ((repeating.test_folder, "test"), (repeating.folder, "development")):
        Path(folder, f"{name}_images.npy").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        duplicates_of_test(repeating, {})
    with pytest.raises(DataError, match="cannot be read"):
        open_development(repeating, SplitSpec())
