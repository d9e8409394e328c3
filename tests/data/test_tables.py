"""Tables of labels: which row means which image, and what is refused."""

import csv
import shutil

import numpy as np
import pytest

import hpo.data.prepare as room
from blobs import NAMES, blob, png, write_blobs
from hpo.data.prepare import prepare
from hpo.errors import DataError
from hpo.spec.study import DataSpec, SplitSpec

HOLDOUT = SplitSpec(kind="holdout")


def card_of(place, tmp_path, split=HOLDOUT, **rest):
    return prepare(DataSpec(**{"name": "folder", "path": str(place), **rest}), split, cache=tmp_path / "cache")


def ham(place, *, ending=""):
    """Like HAM10000: two folders of images and one table; each lesion has two images."""
    rows = []
    for number in range(40):
        folder = place / f"images_part_{1 + number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        png(blob(number // 2 % 2, number), folder / f"ISIC_{number:04}.jpg")
        part = ("train", "val", "test")[(0, 0, 0, 1, 2)[number // 2 % 5]]
        rows.append((f"ISIC_{number:04}{ending}", ("nv", "mel")[number // 2 % 2], f"lesion {number // 2}", part))
    write_table(place / "labels.csv", rows)
    return place


def write_table(file, rows, *, head=("image_id", "dx", "lesion_id", "part"), delimiter=","):
    with file.open("w", newline="", encoding="utf-8-sig") as opened:
        csv.writer(opened, delimiter=delimiter).writerows([head, *rows])


def table(place, file="labels.csv", **rest):
    return {"name": "table", "path": str(place / file), "image": "image_id", "label": "dx", **rest}


def test_folders_that_are_pieces_of_a_data_set_are_refused_and_the_table_is_named(tmp_path):
    with pytest.raises(DataError, match="images_part_1, images_part_2 are pieces of a data set and no classes") as told:
        card_of(ham(tmp_path / "ham"), tmp_path)
    assert "name: table" in told.value.hint
    assert "image: image_id" in told.value.hint
    assert "dx" in told.value.hint


@pytest.mark.parametrize("ending", ["", ".jpg"])
@pytest.mark.parametrize("form", ["csv", "semicolons", "tabs", "parquet"])
def test_a_table_names_the_classes_of_images_below_its_folder(tmp_path, ending, form):
    place = ham(tmp_path / "ham", ending=ending)
    file = place / "labels.csv"
    if form != "csv":
        import pandas

        frame = pandas.read_csv(file)
        file.unlink()
        file = place / {"parquet": "labels.parquet", "tabs": "labels.tsv", "semicolons": "labels.csv"}[form]
        if form == "parquet":
            frame.to_parquet(file)
        else:
            frame.to_csv(file, sep={"tabs": "\t", "semicolons": ";"}[form], index=False)
    card = card_of(place, tmp_path, **table(place, file.name, part="part"), split=SplitSpec(kind="official"))
    assert card.class_names == ("mel", "nv")
    assert (card.valid_start, card.development_count, card.test_count) == (24, 32, 8)
    assert card.files == {"seen": 41, "used": 40, f"no image ({file.suffix})": 1}
    wanted = {blob(n // 2 % 2, n).tobytes(): ("nv", "mel")[n // 2 % 2] for n in range(40)}
    images = np.load(f"{card.folder}/development_images.npy")
    labels = np.load(f"{card.folder}/development_labels.npy")
    assert [wanted[image.tobytes()] for image in images] == [card.class_names[label] for label in labels]


def test_rows_that_cannot_be_right_are_named(tmp_path):
    place = ham(tmp_path / "ham")
    rows = [(f"ISIC_{n:04}", "nv", "", "") for n in range(30, 55)]
    write_table(place / "labels.csv", rows)
    with pytest.raises(DataError, match=r"names 15 files that are not there: ISIC_0040, .*ISIC_0049 and 5 more"):
        card_of(place, tmp_path, **table(place))
    write_table(place / "labels.csv", [*rows[:10], ("ISIC_0030", "mel", "", "")])
    with pytest.raises(DataError, match="1 images are in several rows that differ: ISIC_0030"):
        card_of(place, tmp_path, **table(place))
    shutil.copy(place / "images_part_1" / "ISIC_0030.jpg", place / "images_part_2" / "ISIC_0030.jpg")
    write_table(place / "labels.csv", rows[:10])
    with pytest.raises(DataError, match="1 names stand for several files: ISIC_0030"):
        card_of(place, tmp_path, **table(place))
    with pytest.raises(DataError, match=r"has no column 'diagnosis' \(it has: image_id, dx, lesion_id, part"):
        card_of(place, tmp_path, **{**table(place), "label": "diagnosis"})
    write_table(place / "labels.csv", [(f"ISIC_{n:04}", "nv", "", "fold 3") for n in range(10)])
    with pytest.raises(DataError, match=r"1 values that are no part: 'fold 3' \(10 rows\)"):
        card_of(place, tmp_path, **table(place, part="part"))


@pytest.mark.parametrize("above", ["", "pictures/", "/elsewhere/pictures/", "D:\\pictures\\"])
@pytest.mark.parametrize("below", ["", "images/"])
def test_no_file_of_another_folder_is_taken_for_a_missing_one(tmp_path, above, below):
    place = tmp_path / "scans"
    for number in range(20):
        folder = place / below / f"p{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        png(blob(number // 2 % 2, number), folder / f"{number // 2}.png")
    rows = [(f"{above}p{n % 2}/{n // 2}.png", ("nv", "mel")[n // 2 % 2], "", "") for n in range(20)]
    write_table(place / "labels.csv", rows)
    assert card_of(place, tmp_path, **table(place)).files["used"] == 20
    (place / below / "p1" / "0.png").unlink()
    with pytest.raises(DataError, match=r"names 1 files that are not there: .*p1/0\.png") as told:
        card_of(place, tmp_path, **table(place))
    assert "other folders" in told.value.hint


def test_names_whose_folders_are_all_other_ones_are_found_by_their_last_part_if_each_has_a_file(tmp_path):
    place = ham(tmp_path / "ham")
    rows = [(f"jpeg/{n % 2}/ISIC_{n:04}.jpg", ("nv", "mel")[n // 2 % 2], "", "") for n in range(40)]
    write_table(place / "labels.csv", rows)
    assert card_of(place, tmp_path, **table(place)).files["used"] == 40
    write_table(place / "labels.csv", [*rows, ("jpeg/left/ISIC_0000.jpg", "nv", "", "")])
    with pytest.raises(DataError, match=r"jpeg/0/ISIC_0000\.jpg and jpeg/left/ISIC_0000\.jpg \(images_part_1/"):
        card_of(place, tmp_path, **table(place))


def test_rows_without_a_class_and_files_without_a_row_are_counted(tmp_path):
    place = ham(tmp_path / "ham")
    write_table(place / "labels.csv", [(f"ISIC_{n:04}", ("nv", "mel", "")[n % 3], "", "") for n in range(36)])
    card = card_of(place, tmp_path, **table(place))
    assert card.files == {
        "seen": 41,
        "used": 24,
        "without a class in the table": 12,
        "not in the table": 4,
        "no image (.csv)": 1,
    }


def test_missing_cells_of_nullable_columns_are_missing_and_no_class_or_group(tmp_path):
    import pandas

    place = ham(tmp_path / "ham")
    number = list(range(40))
    frame = pandas.DataFrame(
        {
            "image_id": pandas.array([f"ISIC_{n:04}" for n in number], "string"),
            "dx": pandas.array([None if n >= 36 else n // 2 % 2 for n in number], "Int64"),
            "patient": pandas.array([n // 2 for n in number], "Int64"),
            "part": pandas.array([("train", "val")[n // 2 % 5 == 3] for n in number], "string"),
            "weight": pandas.array([None if n % 2 else n / 2 for n in number], "Float64"),
        }
    )
    frame.to_parquet(place / "labels.parquet")
    assert str(pandas.read_parquet(place / "labels.parquet")["dx"].dtype) == "Int64"
    asked = {**table(place, "labels.parquet"), "part": "part", "group": "patient"}
    card = card_of(place, tmp_path, **asked)
    assert card.class_names == ("0", "1")
    assert card.files["without a class in the table"] == 4
    assert card.groups == 18
    frame["part"] = pandas.array([None if n == 7 else "train" for n in number], "string")
    frame.to_parquet(place / "labels.parquet")
    with pytest.raises(DataError, match=r"values that are no part: '' \(1 rows\)"):
        card_of(place, tmp_path, **asked)
    frame["part"] = pandas.array(["train"] * 40, "string")
    frame["patient"] = pandas.array([None if n < 3 else n // 2 for n in number], "Int64")
    frame.to_parquet(place / "labels.parquet")
    with pytest.raises(DataError, match="3 images have no patient: ISIC_0000, ISIC_0001, ISIC_0002"):
        card_of(place, tmp_path, **asked)


def test_images_outside_the_folders_of_the_parts_are_named(tmp_path):
    place = tmp_path / "scans"
    write_blobs(place / "train", png)
    write_blobs(place / "test", png, count=5, first=100)
    (place / "extra").mkdir()
    for number in range(12):
        png(blob(0, 900 + number), place / "extra" / f"{number:02}.png")
    files = sorted(path for path in place.rglob("*.png"))
    rows = [(str(path.relative_to(place)), "round" if "round" in path.parts else "long", "", "") for path in files]
    write_table(place / "labels.csv", rows)
    with pytest.raises(
        DataError, match=r"12 images lie outside the folders .*: extra/00\.png, .* and 2 more\."
    ) as told:
        card_of(place, tmp_path, **table(place))
    assert "test, train: extra" in told.value.message
    assert "None" not in told.value.message
    write_table(place / "labels.csv", [row for row in rows if not row[0].startswith("extra")])
    assert card_of(place, tmp_path, **table(place)).test_count == 10


def test_labels_that_are_numbers_are_ordered_as_numbers(tmp_path):
    place = ham(tmp_path / "ham")
    write_table(place / "labels.csv", [(f"ISIC_{n:04}", str(n % 11), "", "") for n in range(40)])
    assert card_of(place, tmp_path, **table(place)).class_names == tuple(map(str, range(11)))


def test_a_hugging_face_image_folder_is_read_by_its_metadata(tmp_path):
    place = tmp_path / "hub"
    for part, count, first in (("train", 20, 0), ("test", 6, 100)):
        (place / part).mkdir(parents=True)
        rows = []
        for number in range(first, first + count):
            png(blob(number % 2, number), place / part / f"{number}.png")
            rows.append((f"{number}.png", NAMES[number % 2]))
        write_table(place / part / "metadata.csv", rows, head=("file_name", "label"))
    card = card_of(place, tmp_path)
    assert (card.class_names, card.development_count, card.test_count) == (NAMES, 20, 6)
    one = tmp_path / "one"
    one.mkdir()
    (place / "train").rename(one / "data")
    lines = [f'{{"file_name": "data/{n}.png", "label": {n % 2}}}' for n in range(20)]
    (one / "data" / "metadata.csv").unlink()
    (one / "metadata.jsonl").write_text("\n".join(lines))
    assert card_of(one, tmp_path).class_names == ("0", "1")


def test_remarks_beside_class_folders_do_not_become_classes(tmp_path):
    photos = write_blobs(tmp_path / "photos", png)
    names = sorted(path.relative_to(photos).as_posix() for path in photos.glob("*/*.png"))
    write_table(photos / "metadata.csv", [(n, f"text {n}") for n in names], head=("file_name", "text"))
    card = card_of(photos, tmp_path)
    assert (card.class_names, card.warnings) == (NAMES, ())
    write_table(photos / "who.csv", [(n, "ab"[i % 2]) for i, n in enumerate(names)], head=("file", "photographer"))
    assert "column file of who.csv names the images, too" in card_of(photos, tmp_path).warnings[0]


@pytest.mark.parametrize("files", [["optuna.db", "work/x.jpg"], ["artifacts/x.jpg", "work/x", "locks/x"]])
def test_stores_next_to_a_table_are_no_part_of_its_data(tmp_path, monkeypatch, files):
    place = ham(tmp_path / "ham")
    first = card_of(place, tmp_path, **table(place))
    for name in (*(f"mlruns/{file}" for file in files), "studies/ham.yaml"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("x")
    monkeypatch.delattr(room, "gather")  # nothing is read again
    assert card_of(place, tmp_path, **table(place)) == first


def test_a_file_that_vanishes_while_the_folder_is_listed_is_no_error(tmp_path, monkeypatch):
    place = ham(tmp_path / "ham")
    card = card_of(place, tmp_path, **table(place))
    listed = room.list_files

    def vanishing(folder):
        found = listed(folder)
        (place / "labels.csv-journal").unlink(missing_ok=True)
        return found

    (place / "labels.csv-journal").write_text("x")
    monkeypatch.setattr(room, "list_files", vanishing)
    assert card_of(place, tmp_path, **table(place)) == card


def test_stores_among_class_folders_are_no_class_and_a_folder_that_is_only_called_so_is_one(tmp_path):
    photos = write_blobs(tmp_path / "photos", png)
    (photos / "mlruns").mkdir()
    (photos / "mlruns" / "mlflow.db").write_text("x")
    assert card_of(photos, tmp_path).files == {"seen": 40, "used": 40}
    (photos / "mlruns" / "mlflow.db").rename(photos / "mlruns" / "notes.txt")
    with pytest.raises(DataError, match="mlruns: no image in this class folder"):
        card_of(photos, tmp_path)
