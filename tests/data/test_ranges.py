"""The range of pixel values: measured or declared, and applied alike wherever images are read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blobs import SIDE, as_set, blob, deep_png, png, prepared_images, tiff, write_blobs
from hpo.data.image_files import read_sides
from hpo.data.pixels import nominal, to_levels
from hpo.data.prepare import prepare
from hpo.errors import DataError
from hpo.predict import read_images
from hpo.spec.study import DataSpec, SplitSpec

HOLDOUT = SplitSpec(kind="holdout")
BLOBS = [blob(label, 1000 * label + number) for label in (0, 1) for number in range(20)]


def card_of(folder, tmp_path, **rest):
    return prepare(DataSpec(name="folder", path=str(folder), **rest), HOLDOUT, cache=tmp_path / "cache")


# How people write images -> the levels that are right: those of the 8-bit images that they were made of.
WAYS = {
    "float32 TIFF in 0 to 1": (lambda i, p: Image.fromarray((i / 255).astype("f4")).save(p), ".tif"),
    "float64 TIFF in 0 to 1": (lambda i, p: tiff(i / 255, p), ".tif"),
    "float16 TIFF in 0 to 1": (lambda i, p: tiff((i / 255).astype("f2"), p), ".tif"),
    "float32 TIFF in -1 to 1": (lambda i, p: tiff((i / 127.5 - 1).astype("f4"), p), ".tif"),
    "float32 TIFF in 0 to 255": (lambda i, p: tiff(i.astype("f4"), p), ".tif"),
    "10 bits in a PNG": (lambda i, p: deep_png(i / 255 * 1023, p), ".png"),
    "12 bits in a PNG": (lambda i, p: deep_png(i / 255 * 4095, p), ".png"),
    "14 bits in a TIFF": (lambda i, p: tiff((i / 255 * 16383).astype("u2"), p), ".tif"),
    "16 bits in a PNG": (lambda i, p: deep_png(i.astype(int) * 257, p), ".png"),
    "8 bits in a 16-bit PNG": (lambda i, p: deep_png(i, p), ".png"),
    "12 bits, 3 channels": (lambda i, p: deep_png(np.stack([i / 255 * 4095] * 3, 2), p), ".png"),
    "12 bits with opacity": (lambda i, p: deep_png(np.stack([i / 255 * 4095, 0 * i + 65535.0], 2), p), ".png"),
    "float32 TIFF of 3 bands": (lambda i, p: tiff(np.stack([i / 255] * 3, 2).astype("f4"), p), ".tif"),
    "8 bits": (png, ".png"),
}


@pytest.mark.parametrize("way", WAYS)
def test_pixels_of_any_kind_keep_all_their_grey_levels(tmp_path, way):
    write, ending = WAYS[way]
    folder = write_blobs(tmp_path / "images", write, ending=ending)
    card = card_of(folder, tmp_path)
    found = prepared_images(card).astype(int)
    wanted = np.stack(BLOBS).astype(int)
    # Writing rounds down, so a level may be lost to it; the grey levels, hundreds of them, are there.
    order = [np.abs(found[..., 0].reshape(len(found), -1) - image.reshape(-1)).max(1).argmin() for image in wanted]
    assert sorted(order) == list(range(len(wanted)))
    assert np.abs(found[order][..., 0] - wanted).max() <= (1 if "float16" in way or "10 bits" in way else 0)
    files = sorted(folder.glob(f"*/*{ending}"))
    assert as_set(read_images(files, card.image_shape, card.ranges)) == as_set(found.astype(np.uint8))


def test_a_tiff_that_unpacks_to_too_many_values_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    import tifffile

    tiff(np.zeros((30, 30), "f2"), tmp_path / "bomb.tif")  # which Pillow does not read
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 450)
    assert read_sides(tmp_path / "bomb.tif") == (30, 30)  # as many as are allowed
    tiff(np.zeros((60, 31), "f2"), tmp_path / "bomb.tif")
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda page: pytest.fail("it is decoded"))
    with pytest.raises(DataError, match="1,860 values, more than 900"):
        read_sides(tmp_path / "bomb.tif")


def test_signed_values_are_measured_over_the_whole_set_not_image_by_image(tmp_path):
    # Like computed tomography: -1024 is air, 3071 metal; one image has neither.
    scans = [np.random.default_rng(n).integers(-1024, 3072, (8, 8)).astype("i2") for n in range(19)]
    scans += [np.random.default_rng(99).integers(0, 100, (8, 8)).astype("i2")]
    scans[0][0, :2] = -1024, 3071
    for number, scan in enumerate(scans):
        (tmp_path / "ct" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        tiff(scan, tmp_path / "ct" / "ab"[number % 2] / f"{number}.tif")
    card = card_of(tmp_path / "ct", tmp_path)
    assert card.ranges == {"int32": (-1024.0, 3071.0)}  # as Pillow reads them
    wanted = [np.rint((scan + 1024.0) * (255 / 4095)).astype(np.uint8) for scan in scans]
    assert as_set(prepared_images(card)) == as_set(wanted)


def test_a_declared_range_is_used_and_what_is_beyond_is_cut(tmp_path):
    folder = write_blobs(tmp_path / "images", lambda i, p: tiff(i.astype("i2") * 10 - 500, p), ending=".tif")
    card = card_of(folder, tmp_path, range=(-400, 600))
    assert card.ranges == {"int32": (-400.0, 600.0)}
    wanted = [np.rint(((i * 10.0 - 500 + 400) * 0.255).clip(0, 255)).astype(np.uint8) for i in BLOBS]
    assert as_set(prepared_images(card)) == as_set(wanted)


def test_a_mask_of_zeros_and_ones_is_warned_of_and_a_declared_range_mends_it(tmp_path):
    folder = write_blobs(tmp_path / "images", lambda i, p: png((i > 127).astype(np.uint8), p))
    card = card_of(folder, tmp_path)
    assert any("data.range" in warning and "levels 0 and 1 " in warning for warning in card.warnings)
    mended = card_of(folder, tmp_path, range=(0, 1))
    assert as_set(prepared_images(mended)) == as_set([255 * (i > 127).astype(np.uint8) for i in BLOBS])
    assert mended.warnings == ()
    assert mended.digest != card.digest


def npz(tmp_path, images, name="mine.npz", **more):
    labels = np.arange(len(images)) % 2
    np.savez(tmp_path / name, train_images=images, train_labels=labels, **more)
    return DataSpec(name="npz", path=str(tmp_path / name))


GIVEN = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
GIVEN[0, 0, :2] = 0, 255
ARRAYS = {
    "float64 in 0 to 1": (GIVEN / 255, GIVEN, (0, 1)),
    "float32 in 0 to 1": ((GIVEN / 255).astype("f4"), GIVEN, (0, 1)),
    "float16 in 0 to 1": ((GIVEN / 255).astype("f2"), np.rint((GIVEN / 255).astype("f2") * 255.0), (0, 1)),
    "float64 in -1 to 1": (GIVEN / 127.5 - 1, GIVEN, (-1, 1)),
    "float64 in 0 to 255": (GIVEN.astype(float), GIVEN, (0, 255)),
    "int64": (GIVEN.astype(np.int64), GIVEN, (0, 255)),
    "big-endian uint16 of 12 bits": ((GIVEN.astype(int) * 4095 // 255).astype(">u2"), GIVEN, (0, 4095)),
    "int16, negative": (GIVEN.astype("i2") * 16 - 1024, GIVEN, (-1024, 3056)),
    "bool": (GIVEN > 127, 255 * (GIVEN > 127), (0, 1)),
    "uint8": (GIVEN, GIVEN, (0, 255)),
    "uint8 of 3 channels, float": (np.stack([GIVEN / 255] * 3, 3), np.stack([GIVEN] * 3, 3), (0, 1)),
    "2 channels, 10 bits": (np.stack([GIVEN * 4] * 2, 3).astype("u2"), None, (0, 255)),
}


@pytest.mark.parametrize("way", ARRAYS)
def test_arrays_of_any_dtype_are_scaled_by_their_range(tmp_path, way):
    images, wanted, limits = ARRAYS[way]
    card = prepare(npz(tmp_path, images), HOLDOUT, cache=tmp_path / "cache")
    if wanted is not None:
        assert as_set(prepared_images(card)) == as_set(np.asarray(wanted).astype(np.uint8))
    assert list(card.ranges.values()) == [limits]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_with_their_number(tmp_path, value):
    images = GIVEN / 255
    images[3, :2, 0] = value
    images[7, 0, 0] = value
    with pytest.raises(DataError, match="3 pixel values are NaN or infinite"):
        prepare(npz(tmp_path, images), HOLDOUT, cache=tmp_path / "cache")
    folder = write_blobs(tmp_path / "images", lambda i, p: tiff((i / 255).astype("f4"), p), ending=".tif")
    tiff(np.full((SIDE, SIDE), value, "f4"), folder / "long" / "bad.tif")
    with pytest.raises(DataError, match=r"1,024 pixel values are NaN or infinite, in 1 images"):
        card_of(folder, tmp_path)


def test_eight_bits_are_bit_for_bit_as_they_always_were(tmp_path):
    # The digest that the version before measured ranges gave to these images.
    card = prepare(npz(tmp_path, GIVEN), HOLDOUT, cache=tmp_path / "cache")
    assert card.digest == EIGHT_BIT_DIGEST
    deep = np.random.default_rng(1).integers(0, 65536, (40, 8, 8)).astype(np.uint16)
    for number, image in enumerate(deep):
        (tmp_path / "deep" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        deep_png(image, tmp_path / "deep" / "ab"[number % 2] / f"{number:02}.png")
    assert card_of(tmp_path / "deep", tmp_path).digest == SIXTEEN_BIT_DIGEST


EIGHT_BIT_DIGEST = "sha256:f24d5bb603925f855d0f868cc096a9256b6f78fbd6674d5fb982af8f1792c8e5"
SIXTEEN_BIT_DIGEST = "sha256:ed91a50a0cc1aed6b6cb951ad5934e263e71b58b68b5b2734d5e81180777c559"


def test_images_that_cannot_be_right_are_refused_with_the_numbers(tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="all 40 images are equal, with levels from 7 to 7"):
        prepare(npz(tmp_path, np.full((40, 8, 8), 7, np.uint8)), HOLDOUT, cache=cache)
    steps = np.repeat(np.arange(40, dtype=np.uint8), 64).reshape(40, 8, 8)
    with pytest.raises(DataError, match="all 40 images are constant"):
        prepare(npz(tmp_path, steps), HOLDOUT, cache=cache)
    with pytest.raises(DataError, match="every float64 pixel is 0"):
        prepare(npz(tmp_path, np.zeros((40, 8, 8))), HOLDOUT, cache=cache)
    twice = np.repeat(GIVEN[:20], 2, axis=0)  # each with both labels
    with pytest.raises(DataError, match="40 of 40 images have the same pixels as an image of another class"):
        prepare(npz(tmp_path, twice), HOLDOUT, cache=cache)
    data = npz(tmp_path, GIVEN.astype(np.uint16) * 16).model_copy(update={"range": (5000, 6000)})
    with pytest.raises(DataError, match=r"uint16 pixels are 0 to 4080, all outside the range 5000 to 6000"):
        prepare(data, HOLDOUT, cache=cache)
    with pytest.raises(DataError, match="is not a range of 8-bit pixels"):
        prepare(npz(tmp_path, GIVEN).model_copy(update={"range": (0, 4095)}), HOLDOUT, cache=cache)


def test_what_is_hardly_meant_is_warned_of_with_the_numbers(tmp_path):
    images = GIVEN.copy()
    images[:3] = 9
    images[4] = images[5]
    card = prepare(npz(tmp_path, images), HOLDOUT, cache=tmp_path / "cache")
    assert card.warnings[0].startswith("3 of 40 images are constant")
    assert card.warnings[1].startswith("5 of 40 images have the same pixels as an image of another class")
    # Half of the images in 0 to 1, half in 0 to 255: the range of all leaves the first half dark.
    scales = np.concatenate([GIVEN[:20] / 255, GIVEN[20:].astype(float)])
    card = prepare(npz(tmp_path, scales), HOLDOUT, cache=tmp_path / "cache")
    assert any("20 of 40 images have no pixel above the lowest sixteenth" in words for words in card.warnings)
    # 8 bits of information at the lower end of 16.
    card = prepare(npz(tmp_path, GIVEN.astype(np.uint16) + 256), HOLDOUT, cache=tmp_path / "cache")
    assert card.ranges == {"uint16": (0.0, 1023.0)}


def test_a_file_of_a_kind_whose_range_is_not_known_is_refused(tmp_path):
    tiff((blob(0, 1) / 255).astype("f4"), tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: float32 pixels from 0\.\d+ to .*known only of uint8"):
        read_images([tmp_path / "a.tif"], (8, 8, 1), {"uint8": (0, 255)})
    deep_png(blob(0, 1) * 16.0, tmp_path / "b.png")
    with pytest.raises(DataError, match=r"b\.png: uint16 pixels"):
        read_images([tmp_path / "b.png"], (8, 8, 1), {"uint8": (0, 255)})
    png(blob(0, 1), tmp_path / "c.png")
    assert read_images([tmp_path / "c.png"], (SIDE, SIDE, 1), {"uint16": (0, 4095)}).max() == blob(0, 1).max()


def test_a_model_without_ranges_reads_files_as_ever(tmp_path):
    deep_png(np.full((4, 4), 25700), tmp_path / "a.png")
    assert set(read_images([tmp_path / "a.png"], (4, 4, 1)).ravel()) == {100}


@pytest.mark.parametrize(
    ("low", "high", "kind", "limits"),
    [
        (0, 200, "uint16", (0, 255)),
        (3, 1000, "uint16", (0, 1023)),
        (0, 4095, "int32", (0, 4095)),
        (0, 70000, "int32", (0, 70000)),
        (-5, 300, "int16", (-5, 300)),
        (0.0, 0.9, "float32", (0, 1)),
        (0.0, 0.1, "float32", (0.0, 0.1)),
        (-0.9, 0.9, "float64", (-1, 1)),
        (-0.9, 3.0, "float64", (-0.9, 3.0)),
        (0.0, 254.5, "float32", (0, 255)),
        (100.0, 2000.0, "float32", (100.0, 2000.0)),
    ],
)
def test_measured_values_give_the_range_they_most_likely_use(low, high, kind, limits):
    assert nominal(low, high, kind) == limits


def test_the_script_of_a_logged_model_scales_as_the_data_were_scaled():
    from hpo.tracking import logged_model_script as script

    generator = np.random.default_rng(0)
    for dtype, low, high in (("f4", -1, 1), ("f8", 0, 0.3), ("u2", 0, 65535), ("i2", -1024, 3071), ("u1", 0, 1)):
        values = generator.uniform(low - 1, high + 1, 1000).clip(0 if dtype[0] == "u" else None, None).astype(dtype)
        np.testing.assert_array_equal(script.to_levels(values, low, high), to_levels(values, (low, high)))


def test_ranges_are_in_the_card_and_survive_the_index(tmp_path):
    data = npz(tmp_path, GIVEN / 255)
    first, again = (prepare(data, HOLDOUT, cache=tmp_path / "cache") for _ in range(2))
    assert first == again
    assert json.loads((Path(first.folder) / "card.json").read_text())["ranges"] == {"float64": [0, 1]}
