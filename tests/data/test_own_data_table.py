"""The table in docs/own-data.md: each of our cells is built, read and compared with what the cell says."""

import re
from pathlib import Path

import numpy as np
import pytest

from blobs import NAMES, blob, deep_png, png, tiff, write_blobs
from hpo.data.overview import near_duplicates
from hpo.data.prepare import prepare
from hpo.errors import DataError
from hpo.spec.study import DataSpec, SplitSpec

PAGE = Path(__file__).parents[2] / "docs" / "own-data.md"
HOLDOUT = SplitSpec(kind="holdout")


def table():
    """First cell -> second cell of each row."""
    text = PAGE.read_text(encoding="utf-8").partition("## Layouts and formats, side by side")[2]
    rows = [re.split(r" *\| *", line.strip("| \n")) for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in rows[1:]}


def read(place, tmp_path, split=HOLDOUT, **rest):
    return prepare(DataSpec(**{"name": "folder", "path": str(place), **rest}), split, cache=tmp_path / "cache")


def official(card):
    return "the official parts" if (card.class_names, card.test_count) == (NAMES, 8) else ""


def plain(place, tmp_path):
    card = read(write_blobs(place, png), tmp_path)
    return "read" if (card.class_names, card.files["used"]) == (NAMES, 40) else ""


def nested(place, tmp_path):
    write_blobs(tmp_path / "flat", png)
    for name in NAMES:
        (place / name).mkdir(parents=True)
        (tmp_path / "flat" / name).rename(place / name / "2024")
    card = read(place, tmp_path)
    return "read" if (card.class_names, card.files["used"]) == (NAMES, 40) else ""


def parts(place, tmp_path):
    for number, part in enumerate(("train", "val", "test")):
        write_blobs(place / part, png, count=20 if part == "train" else 4, first=100 * number)
    card = read(place, tmp_path)
    return official(card) if card.valid_start == 40 else ""


def parts_inside(place, tmp_path):
    for number, part in enumerate(("train", "test")):
        write_blobs(tmp_path / part, png, count=20 if part == "train" else 4, first=100 * number)
        for name in NAMES:
            (place / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / part / name).rename(place / name / part)
    return official(read(place, tmp_path))


def names(place, tmp_path):
    (place / "train").mkdir(parents=True)
    for number in range(40):
        png(blob(number % 2, number), place / "train" / f"{NAMES[number % 2]}.{number}.jpg")
    return "classes from the names" if read(place, tmp_path).class_names == NAMES else ""


def pieces(place, tmp_path):
    lines = ["image,label"]
    for number in range(40):
        folder = place / f"images_part_{1 + number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        png(blob(number // 2 % 2, number), folder / f"{number}.jpg")
        lines.append(f"{number},{NAMES[number // 2 % 2]}")
    (place / "labels.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match="pieces of a data set and no classes"):
        read(place, tmp_path)
    card = read(place / "labels.csv", tmp_path, name="table")
    return "table" if (card.class_names, card.files["used"]) == (NAMES, 40) else ""


def metadata(place, tmp_path):
    place.mkdir()
    lines = ["file_name,label"]
    for number in range(40):
        png(blob(number % 2, number), place / f"{number}.png")
        lines.append(f"{number}.png,{NAMES[number % 2]}")
    (place / "metadata.csv").write_text("\n".join(lines))
    return "read" if read(place, tmp_path).class_names == NAMES else ""


def endings(place, tmp_path):
    write_blobs(place, png, ending="")
    write_blobs(place, png, ending=".jfif")
    return "read by content" if read(place, tmp_path).files == {"seen": 80, "used": 80} else ""


def notes(place, tmp_path):
    (write_blobs(place, png) / "long" / "notes.txt").write_text("no image")
    return "skipped and counted" if read(place, tmp_path).files["no image (.txt)"] == 1 else ""


def broken(place, tmp_path):
    write_blobs(place, png)
    for name in NAMES:
        (place / name / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"long/000\.png.*round/000\.png"):
        read(place, tmp_path)
    return "refused, all named"


def limits(place, tmp_path, write, ending=".tif"):
    ((low, high),) = read(write_blobs(place, write, ending=ending), tmp_path).ranges.values()
    return f"range {low:g} to {high:g}"


def twelve(place, tmp_path):
    return limits(place, tmp_path, lambda i, p: deep_png(i / 255 * 4095, p), ".png")


def fractions(place, tmp_path):
    return limits(place, tmp_path, lambda i, p: tiff((i / 255).astype("f4"), p))


def signed(place, tmp_path):
    values = np.stack([blob(label, 1000 * label + n) for label in (0, 1) for n in range(20)]).astype(int) * 10 - 900
    found = limits(place, tmp_path, lambda i, p: tiff((i.astype(int) * 10 - 900).astype("i2"), p))
    return "range measured" if found == f"range {values.min()} to {values.max()}" else ""


def groups(place, tmp_path):
    write_blobs(place, png)
    card = read(place, tmp_path, SplitSpec(kind="holdout", group=r"/\d(\d\d)"))
    development = set(np.load(f"{card.folder}/development_groups.npy"))
    return "" if development & set(np.load(f"{card.test_folder}/test_groups.npy")) else "split.group"


def near(place, tmp_path):
    write_blobs(place / "train", png)
    write_blobs(place / "test", png, count=3)
    counted = sum(near_duplicates(read(place, tmp_path), HOLDOUT).values())
    together = SplitSpec(kind="holdout", near_duplicates="together")
    with pytest.raises(DataError, match="near-duplicates are in both"):
        read(place, tmp_path, together)
    whole = near_duplicates(read(place / "train", tmp_path, together), together)
    return "counted, or kept together" if counted == 6 and not sum(whole.values()) else ""


ROWS = {
    "one folder a class": plain,
    "folders inside a class folder": nested,
    "train, val and test folders with class folders": parts,
    "class folders with train and test folders inside": parts_inside,
    "train/cat.0.jpg": names,
    "folders of images and one CSV": pieces,
    "metadata.csv with file_name and label": metadata,
    "files without an ending, or .jfif": endings,
    "notes and other files that are no images": notes,
    "broken images": broken,
    "12 bits in a 16-bit PNG": twelve,
    "float TIFF in 0 to 1": fractions,
    "signed 16-bit TIFF": signed,
    "groups in one part each": groups,
    "near-duplicates across parts": near,
}


def test_the_table_has_exactly_the_rows_that_are_tried():
    assert list(table()) == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_our_cell_is_true(row, tmp_path):
    assert ROWS[row](tmp_path / "photos", tmp_path) == table()[row]
