import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpo.data import prepare as room
from hpo.data import sources
from hpo.data.cache import md5_of
from hpo.data.prepare import open_trial, prepare
from hpo.data.split import split_card
from hpo.data.test_set import open_test
from hpo.errors import DataError
from hpo.home import cache_folder
from hpo.records import DataCard
from hpo.spec.study import DataSpec, SplitSpec

CPU = torch.device("cpu")
HOLDOUT = SplitSpec(kind="holdout")


def arrays(*, n=60, shape=(8, 8, 3), classes=3, seed=0, parts=("train", "val", "test")):
    """Random images; labels 0, 1, 2, 0, ... as a column, like MedMNIST's."""
    generator = np.random.default_rng(seed)
    made = {}
    for part in parts:
        made[f"{part}_images"] = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
        made[f"{part}_labels"] = (np.arange(n) % classes).astype(np.uint8)[:, None]
    return made


@pytest.fixture
def npz(tmp_path):
    def save(name="mine.npz", **changes):
        kept = {key: value for key, value in {**arrays(), **changes}.items() if value is not None}
        np.savez(tmp_path / name, **kept)
        return DataSpec(name="npz", path=str(tmp_path / name))

    return save


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def development(card):
    folder = Path(card.folder)
    return np.load(folder / "development_images.npy"), np.load(folder / "development_labels.npy")


# What is written


def test_npz_is_prepared_as_development_and_test(npz, cache):
    spec = npz(class_names=np.array(["a", "b", "c"]))
    card = prepare(spec, SplitSpec(), cache=cache)
    given = arrays()
    images, labels = development(card)
    np.testing.assert_array_equal(images, np.concatenate([given["train_images"], given["val_images"]]))
    np.testing.assert_array_equal(labels, np.concatenate([given["train_labels"], given["val_labels"]]).ravel())
    assert labels.dtype == np.int64
    assert (card.development_count, card.test_count, card.valid_start) == (120, 60, 60)
    assert (card.class_names, card.image_shape, card.official) == (("a", "b", "c"), (8, 8, 3), False)
    np.testing.assert_array_equal(np.load(Path(card.test_folder) / "test_images.npy"), given["test_images"])
    assert json.loads((Path(card.folder) / "card.json").read_text())["digest"] == card.digest
    assert not list(Path(card.folder).glob("*test*"))


def test_grey_images_get_a_channel_axis_and_flat_labels_do(npz, cache):
    plain = arrays(shape=(8, 8))
    spec = npz(**plain | {key: value[:, 0] for key, value in plain.items() if key.endswith("labels")})
    assert prepare(spec, SplitSpec(), cache=cache).image_shape == (8, 8, 1)


def test_npz_without_validation_or_test_has_no_valid_start_and_a_sealed_stratified_test(npz, cache):
    spec = npz(val_images=None, val_labels=None, test_images=None, test_labels=None)
    card = prepare(spec, SplitSpec(test_share=0.25), cache=cache)
    assert (card.development_count, card.test_count, card.valid_start) == (45, 15, None)
    assert np.bincount(np.load(Path(card.test_folder) / "test_labels.npy")).tolist() == [5, 5, 5]
    everything = np.concatenate([development(card)[0], np.load(Path(card.test_folder) / "test_images.npy")])
    assert {image.tobytes() for image in everything} == {image.tobytes() for image in arrays()["train_images"]}


def test_sealed_part_is_drawn_from_train_when_validation_is_official(npz, cache):
    card = prepare(npz(test_images=None, test_labels=None), SplitSpec(), cache=cache)
    assert (card.valid_start, card.test_count) == (48, 12)
    np.testing.assert_array_equal(development(card)[0][48:], arrays()["val_images"])


def test_seed_and_share_of_the_sealed_part_are_part_of_the_digest(cache):
    digests = {
        prepare(DataSpec(name="digits"), SplitSpec(test_share=share, seed=seed), cache=cache).digest
        for share, seed in ((0.2, 0), (0.2, 1), (0.3, 0), (0.2, 0))
    }
    assert len(digests) == 3


def test_digits_are_scikit_learns(cache):
    from sklearn.datasets import load_digits

    card = prepare(DataSpec(name="digits"), SplitSpec(), cache=cache)
    images = np.concatenate([development(card)[0], np.load(Path(card.test_folder) / "test_images.npy")])
    wanted = np.rint(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(image.tobytes() for image in images) == sorted(image.tobytes() for image in wanted)
    assert (card.image_shape, card.class_names) == ((8, 8, 1), tuple("0123456789"))


def test_medmnist_by_path_takes_medmnists_class_names_and_any_of_its_sizes(npz, cache, tmp_path):
    npz(**arrays(n=80, shape=(64, 64, 3), classes=8))
    card = prepare(DataSpec(name="bloodmnist", path=str(tmp_path / "mine.npz")), SplitSpec(), cache=cache)
    assert card.class_names[0] == "basophil"
    assert (card.licence, card.official) == ("CC BY 4.0", False)
    with pytest.raises(DataError, match="64x64 pixels, wanted: 28x28"):
        prepare(DataSpec(name="bloodmnist", size=28, path=str(tmp_path / "mine.npz")), SplitSpec(), cache=cache)


# When it is written


def test_unchanged_source_is_not_read_again(npz, cache, monkeypatch):
    spec = npz()
    card = prepare(spec, SplitSpec(), cache=cache)
    monkeypatch.delattr(room, "gather")
    assert prepare(spec, SplitSpec(), cache=cache) == card


def test_changed_source_is_another_data_set(npz, cache):
    before = prepare(npz(), SplitSpec(), cache=cache)
    after = prepare(npz(**arrays(seed=1)), SplitSpec(), cache=cache)
    assert before.digest != after.digest


def test_same_content_elsewhere_is_not_written_twice(npz, cache):
    cards = [prepare(npz(name), SplitSpec(), cache=cache) for name in ("a.npz", "b.npz")]
    assert cards[0].folder == cards[1].folder
    assert cards[0].source != cards[1].source


@pytest.mark.parametrize("name", ["development/development_images.npy", "test/test_labels.npy", "files.json"])
@pytest.mark.parametrize("harm", ["cut", "overwrite", "remove"])
def test_damaged_preparation_is_made_again(npz, cache, name, harm):
    spec = npz()
    card = prepare(spec, SplitSpec(), cache=cache)
    wanted = development(card)[0]
    path = Path(card.folder).parent / name
    if harm == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif harm == "overwrite":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        path.unlink()
    assert prepare(spec, SplitSpec(), cache=cache) == card
    np.testing.assert_array_equal(development(card)[0], wanted)
    assert len(np.load(Path(card.test_folder) / "test_labels.npy")) == 60


def test_two_processes_prepare_at_once(npz, cache):
    spec = npz()
    code = (
        "import sys; from pathlib import Path; from hpo.data.prepare import prepare;"
        "from hpo.spec.study import DataSpec, SplitSpec;"
        "print(prepare(DataSpec(name='npz', path=sys.argv[1]), SplitSpec(), cache=Path(sys.argv[2])).digest)"
    )
    command = [sys.executable, "-c", code, spec.path, str(cache)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said == [prepare(spec, SplitSpec(), cache=cache).digest] * 2
    assert not list((cache / "prepared").glob(".making-*"))


def test_what_a_killed_preparation_left_is_swept_away(npz, cache):
    left = cache / "prepared" / ".making-dead"
    left.mkdir(parents=True)
    prepare(npz(), SplitSpec(), cache=cache)
    assert not left.exists()


def test_cache_folder_is_hpo_data_then_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("HPO_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "hpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "hpo"


def test_cache_that_cannot_be_written_is_an_error(npz, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be read or written") as caught:
        prepare(npz(), SplitSpec(), cache=tmp_path / "file")
    assert "HPO_DATA" in caught.value.hint


# What is refused

GIVEN = arrays()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": GIVEN["train_images"].astype(str)}, "train images are <U3, not numbers"),
        (
            {"train_images": np.full((60, 8, 8, 3), np.nan)},
            "11,520 pixel values are NaN or infinite, in 1 images or arr",
        ),
        ({"train_images": GIVEN["train_images"].reshape(60, -1)}, r"shape \(60, 192\)"),
        ({"train_images": GIVEN["train_images"].transpose(0, 2, 3, 1)}, r"shape \(60, 8, 3, 8\)"),
        ({"test_images": GIVEN["test_images"][:0], "test_labels": GIVEN["test_labels"][:0]}, "none empty"),
        ({"val_images": GIVEN["val_images"][:, :4]}, "valid images are 4x8x3, train images 8x8x3"),
        ({"train_labels": GIVEN["train_labels"][:-1]}, "for 60 images"),
        ({"train_labels": np.zeros((60, 14), np.uint8)}, "parts have different numbers of labels"),
        ({"train_labels": np.full(60, np.nan)}, "train labels are float64, not integers"),
        ({"train_labels": GIVEN["train_labels"].astype(int) - 1}, "label -1 is outside 0 to 2"),
        ({"class_names": np.array(["a", "b"])}, "label 2 is outside 0 to 1"),
        ({"train_labels": np.zeros(60, int)}, "one-class data: every training image is of class '0'"),
        ({"test_labels": np.full(60, 3)}, "no image to train on is of class '3'"),
        ({"train_labels": None}, "train_images and train_labels are not both there"),
        ({"test_labels": None}, "test_images and test_labels are not both there"),
        ({"train_images": None, "train_labels": None}, "train_images and train_labels are not both there"),
        ({"train_labels": np.array([None] * 60)}, "holds pickled Python objects"),
        ({"class_names": np.array(["a", "b", "c"], dtype=object)}, "holds pickled Python objects"),
    ],
)
def test_npz_that_is_no_image_classification_is_refused(npz, cache, changes, message):
    spec = npz(**changes)
    with pytest.raises(DataError, match=message) as caught:
        prepare(spec, SplitSpec(), cache=cache)
    assert spec.path in caught.value.message
    assert caught.value.hint


def test_missing_file_is_refused(cache, tmp_path):
    with pytest.raises(DataError, match=r"gone\.npz: no such file"):
        prepare(DataSpec(name="npz", path=str(tmp_path / "gone.npz")), SplitSpec(), cache=cache)


def test_corrupt_npz_is_refused(npz, cache):
    path = Path(npz().path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    for broken in (b"", b"not a zip", whole[:middle], whole[:middle] + bytes(64) + whole[middle + 64 :]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="damaged"):
            prepare(DataSpec(name="npz", path=str(path)), SplitSpec(), cache=cache)


def test_pickle_named_npz_is_not_opened(cache, tmp_path):
    (tmp_path / "x.npz").write_bytes(pickle.dumps({"train_images": 1}))
    with pytest.raises(DataError, match="not an npz file"):
        prepare(DataSpec(name="npz", path=str(tmp_path / "x.npz")), SplitSpec(), cache=cache)


# Official files of the cache


@pytest.fixture
def official(npz, cache, monkeypatch):
    """A file that is BloodMNIST's official one, as far as the installed medmnist says."""
    path = Path(npz(**arrays(n=80, shape=(28, 28, 3), classes=8)).path)
    info = {**sources.medmnist_info()["bloodmnist"], "MD5": md5_of(path)}
    monkeypatch.setattr(sources, "medmnist_info", lambda: {"bloodmnist": info})
    return path


def test_official_file_in_the_cache_is_used_and_said_to_be_official(official, cache):
    (cache / "downloads").mkdir(parents=True)
    official.rename(cache / "downloads" / "bloodmnist.npz")
    card = prepare(DataSpec(name="bloodmnist"), SplitSpec(), cache=cache)
    assert card.official
    assert card.source.startswith("https://")


def test_official_file_by_path_is_said_to_be_official(official, cache):
    card = prepare(DataSpec(name="bloodmnist", path=str(official)), SplitSpec(), cache=cache)
    assert card.official
    assert card.source == str(official)


def test_other_file_in_the_cache_is_refused_unless_named_by_path(npz, cache):
    (cache / "downloads").mkdir(parents=True)
    mine = Path(npz(**arrays(n=80, shape=(28, 28, 3), classes=8)).path)
    cached = mine.rename(cache / "downloads" / "bloodmnist.npz")
    with pytest.raises(DataError, match="not the official file") as caught:
        prepare(DataSpec(name="bloodmnist"), SplitSpec(), cache=cache)
    assert f"--set data.path={cached}" in caught.value.hint
    assert not prepare(DataSpec(name="bloodmnist", path=str(cached)), SplitSpec(), cache=cache).official


# What a trial sees


@pytest.fixture
def digits(cache):
    return prepare(DataSpec(name="digits"), HOLDOUT, cache=cache)


@pytest.mark.filterwarnings("error")
def test_trial_opens_without_the_test_part(digits):
    for file in Path(digits.test_folder).iterdir():
        file.unlink()
    Path(digits.test_folder).rmdir()
    trial = open_trial(digits, HOLDOUT, device=CPU)
    assert trial.images.shape == (1438, 8, 8, 1)
    assert (trial.images.dtype, trial.labels.dtype, trial.train.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert len(trial.train) + len(trial.valid) == 1438
    assert digits.test_folder not in repr(trial)
    assert not any(isinstance(value, DataCard | Path | str) for value in vars(trial).values())


def test_mean_and_std_are_those_of_the_training_rows(digits):
    trial = open_trial(digits, HOLDOUT, device=CPU)
    pixels = trial.images[trial.train].numpy() / 255
    np.testing.assert_allclose(trial.mean, [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(trial.std, [pixels.std()], rtol=1e-12)


def test_mean_and_std_are_per_channel_and_std_has_a_floor(npz, cache):
    images = arrays()["train_images"]
    images[..., 1] = 51
    trial = open_trial(prepare(npz(train_images=images), SplitSpec(), cache=cache), SplitSpec(), device=CPU)
    np.testing.assert_allclose(trial.mean, images.mean((0, 1, 2)) / 255, rtol=1e-12)
    np.testing.assert_allclose(trial.std, np.maximum(images.std((0, 1, 2)) / 255, 1e-6), rtol=1e-9)


def test_writing_to_a_trials_images_never_reaches_the_disk(digits):
    before = development(digits)[0]
    open_trial(digits, HOLDOUT, device=CPU).images.zero_()
    np.testing.assert_array_equal(development(digits)[0], before)


def test_trial_on_data_that_is_gone_is_an_error(digits):
    (Path(digits.folder) / "development_images.npy").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_trial(digits, HOLDOUT, device=CPU)


def test_test_part_opens_apart(digits):
    seen = open_test(digits, lambda images: np.full((len(images), 10), 0.1))
    images, labels = seen.images, seen.labels
    assert images.shape == (359, 8, 8, 1)
    assert labels.shape == (359,)


def test_split_card_counts_what_the_trial_and_the_test_hold(digits):
    card = split_card(digits, HOLDOUT)
    trial = open_trial(digits, HOLDOUT, device=CPU)
    assert card.counts == {"train": len(trial.train), "valid": len(trial.valid), "test": 359}
    wanted = torch.bincount(trial.labels[trial.train]) / len(trial.train)
    np.testing.assert_allclose(card.shares["train"], wanted, rtol=1e-6)
    assert all(sum(shares) == pytest.approx(1) for shares in card.shares.values())
