import gzip
import io
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpo.data import sources
from hpo.data.cache import md5_of
from hpo.data.prepare import prepare
from hpo.errors import DataError, SpecError
from hpo.predict import read_images
from hpo.spec.study import DataSpec, SplitSpec

HOLDOUT = SplitSpec(kind="holdout")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def development(card):
    folder = Path(card.folder)
    return np.load(folder / "development_images.npy"), np.load(folder / "development_labels.npy")


# Folders of images


def picture(path, *, mode="RGB", size=(16, 12), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    for number in range(10):
        picture(tmp_path / "images" / "dog" / f"{number}.png", seed=number)
        picture(tmp_path / "images" / "cat" / f"{number}.png", seed=100 + number)
    (tmp_path / "images" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "images" / ".hidden").mkdir()
    return tmp_path / "images"


def of(folder, **rest):
    return DataSpec(name="folder", path=str(folder), **rest)


def test_folder_has_a_class_per_folder_and_seals_a_test_part(folder, cache):
    card = prepare(of(folder), SplitSpec(), cache=cache)
    assert (card.class_names, card.image_shape) == (("cat", "dog"), (12, 16, 3))
    assert (card.development_count, card.test_count, card.valid_start) == (16, 4, None)
    held = [np.load(Path(card.test_folder) / f"test_{kind}.npy") for kind in ("images", "labels")]
    images, labels = (np.concatenate(both) for both in zip(development(card), held, strict=True))
    for label, name in enumerate(card.class_names):
        wanted = {np.asarray(Image.open(file)).tobytes() for file in (folder / name).glob("*.png")}
        assert {image.tobytes() for image in images[labels == label]} == wanted


def test_folder_images_are_resized_on_request_only(folder, cache):
    assert prepare(of(folder, size=8), SplitSpec(), cache=cache).image_shape == (8, 8, 3)
    picture(folder / "dog" / "zz.png", size=(20, 12))
    with pytest.raises(DataError, match=r"zz\.png: 20x12 pixels, but the first image is 16x12") as caught:
        prepare(of(folder), SplitSpec(), cache=cache)
    assert "data.size" in caught.value.hint


def test_folder_is_grey_only_if_every_image_is(folder, cache):
    for number, file in enumerate(folder.glob("*/*.png")):
        picture(file, mode="L", seed=number)
    assert prepare(of(folder), SplitSpec(), cache=cache).image_shape == (12, 16, 1)
    picture(folder / "cat" / "0.png", mode="P")
    assert prepare(of(folder), SplitSpec(), cache=cache).image_shape == (12, 16, 3)


def test_corrupt_image_is_named(folder, cache):
    file = folder / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"dog/3\.png: not an image that can be read"):
        prepare(of(folder), SplitSpec(), cache=cache)


def test_images_are_read_for_training_as_they_are_for_prediction(folder, cache):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    wide = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
    Image.fromarray(wide).save(folder / "dog" / "3.png", exif=exif)
    Image.fromarray(np.full((12, 16), 65535, np.uint16)).save(folder / "dog" / "4.png")
    card = prepare(of(folder), SplitSpec(), cache=cache)
    images = np.concatenate([development(card)[0], np.load(Path(card.test_folder) / "test_images.npy")])
    for name in ("3.png", "4.png"):
        (expected,) = read_images([folder / "dog" / name], card.image_shape, card.ranges)
        assert (images == expected).all(axis=(1, 2, 3)).any()


def test_folder_without_classes_or_images_is_refused(folder, cache, tmp_path):
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no image in this class folder"):
        prepare(of(folder), SplitSpec(), cache=cache)
    with pytest.raises(DataError, match="holds no class folders"):
        prepare(of(folder / "dog"), SplitSpec(), cache=cache)
    with pytest.raises(DataError, match="not a folder"):
        prepare(of(folder / "dog" / "1.png"), SplitSpec(), cache=cache)


# Published formats, from the user's own copies


def test_eurosat_reads_its_zip_its_folder_and_the_class_folders_alike(cache, tmp_path):
    for label, name in enumerate(("Forest", "River")):
        for number in range(5):
            file = tmp_path / "e" / "2750" / name / f"{name}_{number}.jpg"
            picture(file, size=(64, 64), seed=10 * label + number)
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        for file in (tmp_path / "e").rglob("*.jpg"):
            archive.write(file, str(file.relative_to(tmp_path / "e")))
    digests = {
        prepare(DataSpec(name="eurosat", path=str(tmp_path / place)), SplitSpec(), cache=cache).digest
        for place in ("e", "e/2750", "e.zip")
    }
    assert len(digests) == 1


def idx(values):
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.mark.parametrize("zipped", [True, False])
def test_fashionmnist_reads_idx_files_from_a_folder(cache, tmp_path, zipped):
    images = np.random.default_rng(0).integers(0, 256, (100, 28, 28), dtype=np.uint8)
    labels = (np.arange(100) % 10).astype(np.uint8)
    for prefix in ("train", "t10k"):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            raw, name = idx(values), f"{prefix}-{kind}-ubyte"
            if zipped:
                (tmp_path / f"{name}.gz").write_bytes(gzip.compress(raw))
            else:
                (tmp_path / name).write_bytes(raw)
    spec = DataSpec(name="fashionmnist", path=str(tmp_path))
    card = prepare(spec, HOLDOUT, cache=cache)
    np.testing.assert_array_equal(development(card)[0][..., 0], images)
    assert (card.class_names[9], card.valid_start, card.official) == ("Ankle boot", None, False)
    broken = next(tmp_path.glob("train-labels*"))
    broken.write_bytes(broken.read_bytes()[:20])
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.*damaged"):
        prepare(spec, HOLDOUT, cache=cache)


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """An archive in CIFAR-10's format with few images, whose checksums torchvision is told."""
    from torchvision.datasets import CIFAR10

    files = {"batches.meta": {"label_names": sources.DATASETS["cifar10"].class_names()}}
    for number, name in enumerate([*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]):
        images = np.random.default_rng(number).integers(0, 256, (20, 3072), dtype=np.uint8)
        files[name] = {"data": images, "labels": list(range(10)) * 2}
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    sums = {name: md5_of(folder / name) for name in files}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5] for name, md5 in sums.items() if "data" in name])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    return tmp_path


def test_cifar10_reads_its_archive_its_folder_and_an_npz(cifar, cache):
    places = ("cifar.tar.gz", "cifar-10-batches-py", ".")
    cards = [prepare(DataSpec(name="cifar10", path=str(cifar / place)), HOLDOUT, cache=cache) for place in places]
    assert {card.digest for card in cards} == {cards[0].digest}
    assert (cards[0].development_count, cards[0].test_count, cards[0].official) == (100, 20, True)
    images, labels = development(cards[0])
    np.savez(cifar / "part.npz", train_images=images, train_labels=labels)
    own = prepare(DataSpec(name="cifar10", path=str(cifar / "part.npz")), HOLDOUT, cache=cache)
    assert (own.class_names, own.official, own.test_count) == (cards[0].class_names, False, 20)


def test_cifar10_pickles_that_are_not_official_are_not_opened(cifar, cache, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not the official one"):
        prepare(DataSpec(name="cifar10", path=str(cifar / "cifar-10-batches-py")), HOLDOUT, cache=cache)
    assert not (tmp_path / "exploded").exists()


def test_archive_that_would_escape_is_refused(cache, tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("../escaped")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="damaged"):
        prepare(DataSpec(name="cifar10", path=str(tmp_path / "x.tar.gz")), HOLDOUT, cache=cache)


# A function of the user's own

OWN = """
import numpy as np
seed = 0
def images(*, size):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (60, size, size), dtype=np.uint8)
    return {"train_images": pixels, "train_labels": np.arange(60) % 3, "class_names": ["a", "b", "c"]}
def broken(*, size):
    return {"train_images": 1 / 0}
"""


def test_a_function_of_the_users_own_is_a_data_set(tmp_path, cache, monkeypatch):
    (tmp_path / "own_images.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    data = DataSpec(name="own_images:images", size=12)
    card = prepare(data, HOLDOUT, cache=cache)
    assert (card.class_names, card.image_shape, card.test_count) == (("a", "b", "c"), (12, 12, 1), 12)
    assert prepare(data, HOLDOUT, cache=cache).digest == card.digest
    sys.modules["own_images"].seed = 1
    assert prepare(data, HOLDOUT, cache=cache).digest != card.digest
    with pytest.raises(DataError, match="the function fails: ZeroDivisionError"):
        prepare(DataSpec(name="own_images:broken", size=12), HOLDOUT, cache=cache)
    with pytest.raises(SpecError, match="no function 'nothing'"):
        prepare(DataSpec(name="own_images:nothing"), HOLDOUT, cache=cache)
    sys.modules.pop("own_images")
