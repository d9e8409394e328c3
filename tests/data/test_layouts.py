"""Layouts of image files that people have, what is used of them, and what is said of the rest."""

import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blobs import NAMES, as_set, blob, png, write_blobs
from hpo.data.prepare import prepare
from hpo.errors import DataError
from hpo.spec.study import DataSpec, SplitSpec

HOLDOUT = SplitSpec(kind="holdout")


def card_of(place, tmp_path, split=HOLDOUT, **rest):
    return prepare(DataSpec(**{"name": "folder", "path": str(place), **rest}), split, cache=tmp_path / "cache")


def count_files(folder):
    return sum(len(names) for _, _, names in os.walk(folder))


# What is used, and what is said of the rest


def test_every_file_is_used_or_counted_with_its_reason(tmp_path):
    photos = write_blobs(tmp_path / "photos", png, count=10)
    write_blobs(photos, lambda i, p: Image.fromarray(i).save(p, "JPEG"), count=10, ending=".jfif", first=10)
    write_blobs(photos, lambda i, p: Image.fromarray(i).save(p, "GIF"), count=10, ending=".GIF", first=20)
    write_blobs(photos, png, count=10, ending="", first=30)
    for label, name in enumerate(NAMES):
        (photos / name / "2024" / "May").mkdir(parents=True)
        for number in range(40, 50):
            png(blob(label, 1000 * label + number), photos / name / "2024" / "May" / f"{number}.PNG")
    for name in ("Thumbs.db", ".DS_Store", "long/._000.png", "__MACOSX/long/000.png", ".git/config"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(b"junk")
    (photos / "round" / "notes.txt").write_text("no image")
    (photos / "round" / "scan.dcm").write_bytes(bytes(128) + b"DICM")
    png(blob(0, 5), photos / "at the root.png")
    card = card_of(photos, tmp_path)
    assert card.files == {
        "seen": count_files(photos),
        "used": 100,
        "hidden or of the system": 5,
        "no image (.txt)": 1,
        "no image (.dcm)": 1,
        "in no class folder": 1,
    }
    assert card.accounting == (
        "108 seen, 100 used, 8 skipped: 5 hidden or of the system, 1 no image (.txt), 1 no image (.dcm), "
        "1 in no class folder"
    )
    assert card.development_count + card.test_count == 100


@pytest.mark.parametrize("name", ["_other", "test", "Train", "2024", "a.b", "ü"])
def test_a_class_folder_may_have_any_name_that_is_not_hidden(tmp_path, name):
    photos = write_blobs(tmp_path / "photos", png)
    (photos / "round").rename(photos / name)
    card = card_of(photos, tmp_path)
    assert card.class_names == tuple(sorted((name, "long")))
    assert card.files["used"] == 40


def test_a_linked_folder_is_read_and_a_change_behind_the_link_is_seen(tmp_path):
    photos = write_blobs(tmp_path / "photos", png)
    shutil.move(photos / "round", tmp_path / "elsewhere")
    (photos / "round").symlink_to(tmp_path / "elsewhere")
    (photos / "long" / "loop").symlink_to(photos)
    first = card_of(photos, tmp_path)
    assert first.files["used"] == 40
    png(blob(1, 77), tmp_path / "elsewhere" / "new.png")
    assert card_of(photos, tmp_path).files["used"] == 41


def test_a_program_in_postscript_is_never_opened(tmp_path):
    photos = write_blobs(tmp_path / "photos", png)
    Image.fromarray(blob(0, 1)).convert("RGB").save(photos / "long" / "x.eps")
    (photos / "long" / "x.eps").rename(photos / "long" / "program")
    assert card_of(photos, tmp_path).files == {"seen": 41, "used": 40, "no image (no ending)": 1}
    from hpo.predict import read_images

    with pytest.raises(DataError, match="program: not an image that can be read"):
        read_images([photos / "long" / "program"], (8, 8, 1))


def test_only_the_first_image_of_a_file_is_read_and_that_is_said(tmp_path):
    photos = write_blobs(tmp_path / "photos", png)
    pages = [Image.fromarray(blob(0, 100 + n)) for n in range(3)]
    pages[0].save(photos / "long" / "pages.tif", save_all=True, append_images=pages[1:])
    assert "1 files hold several images, such as long/pages.tif" in card_of(photos, tmp_path).warnings[0]


def test_all_broken_images_are_named_at_once_ten_at_most(tmp_path):
    photos = write_blobs(tmp_path / "photos", lambda i, p: Image.fromarray(i).save(p, "JPEG"), ending=".jpg")
    for number in range(3):
        file = photos / "long" / f"{number:03}.jpg"
        file.write_bytes(file.read_bytes()[: -60 if number else 100])  # inside the header, inside the pixels
    with pytest.raises(DataError, match=r"3 files cannot be read: .*000\.jpg.*001\.jpg.*002\.jpg"):
        card_of(photos, tmp_path)
    for file in (photos / "round").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"23 files cannot be read: .*; and 13 more\."):
        card_of(photos, tmp_path)


@pytest.mark.parametrize("name", ["what?", "a#b", "100%", "a b", "x=y&z", "%20"])
def test_a_path_may_hold_any_sign(tmp_path, name):
    write_blobs(tmp_path / name, png)
    assert card_of(tmp_path / name, tmp_path).files["used"] == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["cache", name])


# Official parts


@pytest.mark.parametrize("valid", ["val", "valid", "validation", "Val", None])
@pytest.mark.parametrize("test", ["test", "Testing", None])
def test_folders_train_valid_and_test_are_the_official_parts(tmp_path, valid, test):
    place = tmp_path / "photos"
    write_blobs(place / "train", png, count=20)
    if valid:
        write_blobs(place / valid, png, count=5, first=100)
    if test:
        write_blobs(place / test, png, count=8, first=200)
    card = card_of(place, tmp_path)
    assert card.class_names == NAMES
    assert card.test_count == (16 if test else 8)
    assert card.development_count == (40 if test else 32) + (10 if valid else 0)
    assert card.valid_start == ((40 if test else 32) if valid else None)
    held = as_set(np.load(f"{card.test_folder}/test_images.npy")[..., 0])
    if test:
        assert held == {blob(label, 1000 * label + n).tobytes() for label in (0, 1) for n in range(200, 208)}


def test_parts_inside_the_class_folders_are_the_official_parts_too(tmp_path):
    for part, first, count in (("train", 0, 20), ("test", 50, 5)):
        write_blobs(tmp_path / part, png, count=count, first=first)
        for name in NAMES:
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / part / name).rename(tmp_path / "photos" / name / part)
    card = card_of(tmp_path / "photos", tmp_path)
    assert (card.class_names, card.development_count, card.test_count) == (NAMES, 40, 10)


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    photos = write_blobs(tmp_path / "photos", png)
    (photos / "long").rename(photos / "train")
    (photos / "round").rename(photos / "bus")
    assert card_of(photos, tmp_path).class_names == ("bus", "train")


def test_two_folders_for_one_part_are_refused(tmp_path):
    for part in ("train", "val", "validation"):
        write_blobs(tmp_path / "photos" / part, png, count=3)
    with pytest.raises(DataError, match="val and validation are both the valid part"):
        card_of(tmp_path / "photos", tmp_path)


def kaggle(place):
    (place / "train").mkdir(parents=True)
    (place / "test").mkdir()
    for label, name in enumerate(("dog", "cat")):
        for number in range(20):
            png(blob(label, 1000 * label + number), place / "train" / f"{name}.{number}.jpg")
    for number in range(6):
        png(blob(0, 500 + number), place / "test" / f"{number}.jpg")
    return place


def test_classes_in_the_names_of_files_are_read_from_them(tmp_path):
    card = card_of(kaggle(tmp_path / "photos"), tmp_path)
    assert card.class_names == ("cat", "dog")
    assert card.files == {"seen": 46, "used": 40, "in no class folder (test)": 6}
    assert card.development_count + card.test_count == 40


def test_names_of_another_form_are_refused_and_a_pattern_reads_them(tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    for number in range(20):
        png(blob(number % 2, number), place / f"{('Persian', 'great_pug')[number % 2]}_{number}.png")
    with pytest.raises(DataError, match="20 images lie side by side") as caught:
        card_of(place, tmp_path)
    assert "data.label=" in caught.value.hint
    card = card_of(place, tmp_path, label=r"([A-Za-z_]+)_\d+")
    assert card.class_names == ("Persian", "great_pug")
    with pytest.raises(DataError, match=r"finds no class in 10 paths: great_pug_1\.png"):
        card_of(place, tmp_path, label=r"(Persian)")


def test_a_single_folder_around_the_classes_is_refused_with_the_place_to_name(tmp_path):
    write_blobs(tmp_path / "photos" / "images", png)
    with pytest.raises(DataError, match="holds one folder, images, which holds long, round") as caught:
        card_of(tmp_path / "photos", tmp_path)
    assert str(tmp_path / "photos" / "images") in caught.value.hint


def test_folders_that_all_hold_the_same_folders_are_warned_of(tmp_path):
    for fold in ("fold1", "fold2"):
        write_blobs(tmp_path / "photos" / fold, png, first=100 * int(fold[-1]))
    card = card_of(tmp_path / "photos", tmp_path)
    assert "fold1, fold2 all hold the folders long, round: are those the classes?" in card.warnings[0]


@pytest.mark.parametrize(
    ("training", "other", "named"),
    [("training_set", "test_set", "test_set"), ("train", "eval", "eval"), ("train2017", "val-2017", "val-2017"),
     ("Trainset", "images_test", "images_test"), ("train-data", "Evaluation data", "Evaluation data")],
)  # fmt: skip
def test_parts_with_names_that_are_not_known_are_refused_and_never_become_classes(tmp_path, training, other, named):
    write_blobs(tmp_path / "photos" / training, png)
    write_blobs(tmp_path / "photos" / other, png, count=5, first=100)
    with pytest.raises(DataError, match=f"{training}, {named} read like parts of a data set") as caught:
        card_of(tmp_path / "photos", tmp_path)
    assert "rename them train, val and test" in caught.value.hint
    # What the hint says, for classes that are called so:
    assert card_of(tmp_path / "photos", tmp_path, label="^([^/]+)/").class_names == tuple(sorted((training, other)))
    (tmp_path / "photos" / training).rename(tmp_path / "photos" / "train")
    (tmp_path / "photos" / other).rename(tmp_path / "photos" / "test")
    card = card_of(tmp_path / "photos", tmp_path)
    assert (card.class_names, card.test_count) == (NAMES, 10)


def test_a_test_folder_of_kaggle_with_a_number_is_refused(tmp_path):
    place = kaggle(tmp_path / "photos")
    (place / "test").rename(place / "test1")
    with pytest.raises(DataError, match="train, test1 read like parts of a data set"):
        card_of(place, tmp_path)


@pytest.mark.parametrize("other", ["unlabeled", "meta", "samples"])
def test_images_beside_a_training_folder_with_classes_do_not_become_a_class(tmp_path, other):
    write_blobs(tmp_path / "photos" / "train", png)
    (tmp_path / "photos" / other).mkdir()
    png(blob(0, 500), tmp_path / "photos" / other / "1.jpg")
    with pytest.raises(DataError, match=f"train holds folders of images, such as long, but {other} none"):
        card_of(tmp_path / "photos", tmp_path)
    shutil.rmtree(tmp_path / "photos" / other)
    assert card_of(tmp_path / "photos", tmp_path).class_names == NAMES


@pytest.mark.parametrize("name", ["training", "train", "Train 2", "test", "eval"])
def test_a_class_with_the_name_of_a_part_beside_others_is_a_class(tmp_path, name):
    photos = write_blobs(tmp_path / "photos", png)
    (photos / "round").rename(photos / name)
    (photos / name / "2024").mkdir()
    png(blob(1, 700), photos / name / "2024" / "1.png")
    assert card_of(photos, tmp_path).class_names == tuple(sorted((name, "long")))


def test_a_zip_archive_of_eurosat_keeps_the_account_of_its_files(tmp_path):
    for label, name in enumerate(("Forest", "River")):
        for number in range(10):
            (tmp_path / "2750" / name).mkdir(parents=True, exist_ok=True)
            large = np.kron(blob(label, 1000 * label + number), np.ones((2, 2), np.uint8))
            png(large, tmp_path / "2750" / name / f"{number}.jpg")
    with zipfile.ZipFile(tmp_path / "e.zip", "w") as archive:
        for file in (tmp_path / "2750").rglob("*.jpg"):
            archive.write(file, str(file.relative_to(tmp_path)))
        archive.writestr("2750/Forest/.DS_Store", b"junk")
    card = card_of(tmp_path / "e.zip", tmp_path, name="eurosat")
    assert card.files == {"seen": 21, "used": 20, "hidden or of the system": 1}


# Memory and time


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_folder_larger_than_the_memory_it_may_use_is_prepared(tmp_path):
    import subprocess
    import sys

    photos = write_blobs(tmp_path / "photos", png, count=100)
    # 200 images of 1024 x 1024 x 1: 200 MiB of levels, with 150 MiB left to allocate once all is imported.
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "import numpy, scipy.sparse.csgraph, PIL.Image, filelock\n"
        "from hpo.data.prepare import prepare\nfrom hpo.spec.study import DataSpec, SplitSpec\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (150 << 20), used + (150 << 20)))\n"
        "card = prepare(DataSpec(name='folder', path=sys.argv[1], size=1024), SplitSpec(), cache=Path(sys.argv[2]))\n"
        "print(card.development_count + card.test_count)"
    )
    command = [sys.executable, "-c", code, str(photos), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip() == "200", done.stderr


def test_a_preparation_that_is_interrupted_ends_at_once_and_leaves_nothing(tmp_path):
    photos = write_blobs(tmp_path / "photos", png, count=100)
    began = []

    def progress(text, done, _total):
        if text == "reading images" and done:
            began.append(time.monotonic())
            raise KeyboardInterrupt

    spec = DataSpec(name="folder", path=str(photos), size=1024)
    with pytest.raises(KeyboardInterrupt):
        prepare(spec, HOLDOUT, cache=tmp_path / "cache", progress=progress)
    assert time.monotonic() - began[0] < 2
    assert [path.name for path in (tmp_path / "cache" / "prepared").iterdir() if path.name.startswith(".r")] == []
