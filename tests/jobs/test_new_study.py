"""A study is written for a folder, an npz or a table, fits its budget, and says why it is as it is."""

# ruff: noqa: F811 - fixtures that are imported

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpo.data.prepare import prepare
from hpo.data.survey import describe_source, sides_of, symmetries
from hpo.errors import DataError, HpoError, SpecError
from hpo.jobs import new_study as writing
from hpo.jobs.new_study import default_file, new_study, same_source, source_of, study_text
from hpo.jobs.shared.new_parts import in_folds, scratch_model, scratch_models
from hpo.jobs.shared.new_source import refuse_among_images
from hpo.jobs.shared.presets import PRESETS, fill_from_scratch, fill_frozen, usable
from hpo.records import DataCard
from hpo.spec.load import load_study
from hpo.spec.study import DataSpec, SplitSpec
from scans import as_folder, digits, folder  # noqa: F401
from small_nets import SQUEEZE, weights_file


def test_a_folder_becomes_a_study_that_can_be_read(folder: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    photos = as_folder(folder / "My photos", digits[0][:300], digits[1][:300])
    made = new_study(photos, preset="quick", minutes=1, weights=["none"], device="cpu", workers=2)
    assert made.file == Path("studies/my-photos.yaml")
    spec = load_study("my-photos")
    assert (spec.data.name, spec.split.kind, spec.model.kind) == ("folder", "holdout", "convnet")
    assert spec.search.trials == made.trials >= 2
    assert made.seconds <= 60
    assert same_source(made.file, photos)
    photos.rename(folder / "my-photos")
    assert source_of("my-photos") is None  # a study of that name, about images that are gone
    (folder / "my-photos").rename(photos)
    (folder / "my-photos").symlink_to(photos)
    assert source_of("my-photos") == Path("my-photos")
    text = made.file.read_text()
    for decision in made.decisions:
        assert decision.reason in text or decision.subject == "groups"
    with pytest.raises(HpoError, match="exists already"):
        new_study(photos)


def test_few_photographs_get_a_head_on_frozen_weights_and_folds(folder: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = (generator.integers(0, 100, (60, 48, 48, 3)) + 100 * labels[:, None, None, None]).astype(np.uint8)
    photos = as_folder(folder / "pets", images, labels, side=48)
    weights = f"{SQUEEZE['name']}={weights_file(SQUEEZE, folder)}"
    made = new_study(photos, preset="quick", minutes=2, weights=[weights], device="cpu", workers=2)
    spec = load_study(made.file)
    assert (spec.model.kind, spec.model.freeze, spec.split.kind) == ("torchvision", "all", "kfold")
    assert spec.final is not None
    assert spec.final.on == "all"
    assert any("frozen" in each.choice for each in made.decisions)


def test_few_groups_make_as_many_folds_and_a_holdout_stays_where_no_folds_can_be_trained(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(40) % 2

    def card(name: str, labels: np.ndarray, **more: np.ndarray) -> tuple[DataCard, dict[str, str]]:
        np.savez(folder / name, train_images=images, train_labels=labels, **more)
        split = {"kind": "holdout", **({"group": "groups"} if more else {})}
        return prepare(DataSpec(name="npz", path=str(folder / name)), SplitSpec(**split)), {**split, "share": 0.2}

    assert in_folds(*card("a.npz", labels))["folds"] == 5
    grouped = in_folds(*card("b.npz", labels, groups=np.arange(40) // 10))
    assert (grouped["kind"], grouped["folds"], grouped["group"]) == ("kfold", 3, "groups")
    assert "share" not in grouped
    several = np.stack([labels, 1 - labels, np.arange(40) // 20], axis=1)
    assert in_folds(*card("several.npz", several))["folds"] == 5
    single = labels.copy()
    single[0] = 2  # the fold that validates on it would train without it
    assert in_folds(*card("c.npz", single)) is None


def test_a_name_that_no_study_has_is_refused_before_the_images_are_looked_at(folder: Path) -> None:
    with pytest.raises(SpecError, match="is no name of a study"):
        new_study("absent", file=folder / "my photos.yaml")
    (folder / ("x" * 150)).mkdir()
    assert default_file(folder / ("x" * 150)).stem == "x" * 100


def test_a_file_that_is_written_meanwhile_is_kept_and_one_that_does_not_load_is_not(
    folder: Path, digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(folder / "d.npz", train_images=digits[0][:200], train_labels=digits[1][:200])
    file, text = folder / "d.yaml", writing.study_text

    def meanwhile(*arguments: Any) -> str:
        file.write_text("theirs")
        return text(*arguments)

    given: dict[str, Any] = {"file": file, "preset": "quick", "minutes": 1, "device": "cpu", "workers": 1}
    monkeypatch.setattr(writing, "study_text", meanwhile)
    with pytest.raises(HpoError, match="exists"):
        new_study("d.npz", **given)
    assert file.read_text() == "theirs"
    file.unlink()
    monkeypatch.setattr(writing, "study_text", lambda *arguments: "broken: [")
    with pytest.raises(HpoError):
        new_study("d.npz", **given)
    assert not file.exists()


def test_a_table_is_known_by_its_columns(folder: Path) -> None:
    place = folder / "ham"
    as_folder(place / "images", np.zeros((6, 8, 8), np.uint8), np.arange(6) % 2)
    table = place / "labels.csv"
    rows = [
        f"{number},lesion{number // 2},{['nv', 'mel'][number % 2]},{'train' if number else 'test'}"
        for number in range(6)
    ]
    table.write_text("\n".join(["image_id,lesion_id,dx,split", *rows]))
    data, group = describe_source(table)
    assert data == {"name": "table", "image": "image_id", "label": "dx", "group": "lesion_id", "part": "split"}
    assert group is None
    assert default_file(table) == Path("studies/ham.yaml")
    table.write_text("a,b\nu,v\n")
    with pytest.raises(DataError, match="names of images"):
        describe_source(table)


def test_groups_and_parts_of_a_hugging_face_folder_are_known_by_its_metadata(folder: Path) -> None:
    place = folder / "photos"
    as_folder(place / "images", np.random.default_rng(0).integers(0, 256, (6, 8, 8), np.uint8), np.arange(6) % 2)
    files = sorted(file.relative_to(place) for file in place.rglob("*.png"))
    rows = [f"{file},{'ab'[row % 2]},p{row // 2},{'train' if row > 1 else 'test'},x" for row, file in enumerate(files)]
    (place / "metadata.csv").write_text("\n".join(["file_name,label,Patient ID,split,note", *rows]))
    assert describe_source(place) == ({"name": "folder", "group": "Patient ID", "part": "split"}, None)
    assert describe_source(place, {"group": None})[0] == {"name": "folder", "part": "split"}
    card = prepare(DataSpec(path=str(place), **describe_source(place)[0]), SplitSpec(kind="holdout", share=0.4))
    assert (card.groups, card.test_count) == (3, 2)
    (place / "metadata.csv").write_text("file_name,note\n0.png,x")
    assert describe_source(place) == ({"name": "folder"}, None), "remarks are no classes"


def table_of(place: Path, head: str, cells: list[str]) -> Path:
    """A table of 12 images in two classes; cells are those of the columns after image and label."""
    as_folder(place / "images", np.random.default_rng(0).integers(0, 256, (12, 8, 8), np.uint8), np.arange(12) % 2)
    rows = [f"{number}.png,{'ab'[number % 2]},{cell}" for number, cell in enumerate(cells)]
    (place / "labels.csv").write_text("\n".join([f"image,dx,{head}", *rows]))
    return place / "labels.csv"


@pytest.mark.parametrize(
    "name",
    ["Patient ID", "patient id", "subject-id", "pid", "PatientID", "Subject", "participant_id", "MRN", "lesion.id"],
)
def test_a_group_is_known_however_its_column_is_written(folder: Path, name: str) -> None:
    table = table_of(folder / "t", f"lesion,{name}" if name != "lesion.id" else "x,lesion.id", ["1,2"] * 12)
    assert describe_source(table)[0]["group"] == name
    assert "group" not in describe_source(table, {"group": None})[0]


@pytest.mark.parametrize("odd", ["dev2", "", "unused"])
def test_parts_with_one_odd_value_are_refused_by_name_and_not_drawn_again(folder: Path, odd: str) -> None:
    parts = ["train"] * 6 + ["test"] * 5
    table = table_of(folder / "t", "fold", [*parts, odd])
    with pytest.raises(DataError, match=f"column fold has 1 values that are no part: '{odd}'") as told:
        new_study(table)
    assert "leave those rows out" in str(told.value.hint)
    assert not Path("studies").exists()
    assert describe_source(table_of(folder / "u", "fold", [*parts, "dev"]))[0]["part"] == "fold"
    classes = table_of(folder / "v", "label", [*parts, odd or "tram"])  # of vehicles and of stones, perhaps
    assert describe_source(classes)[0]["label"] == "label"


def test_a_study_that_would_be_a_class_is_refused_with_the_place_to_run_it_from(
    folder: Path, digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = as_folder(folder / "my photos", digits[0][:40], digits[1][:40])
    before = sorted(photos.rglob("*"))
    monkeypatch.chdir(photos)
    with pytest.raises(HpoError, match="the study file would be among the images") as told:
        new_study(".")
    assert told.value.hint == "Run it from outside: cd .. && hpo new 'my photos'"
    monkeypatch.chdir(photos / "class 0")
    with pytest.raises(HpoError, match="would be among") as told:
        new_study("..", file=Path("x.yaml"))
    assert "cd ../.. && " in str(told.value.hint)
    monkeypatch.chdir(folder)
    with pytest.raises(HpoError, match="would be among") as told:
        new_study(photos, file=photos / "x.yaml")
    assert "--out FILE" in str(told.value.hint)
    with pytest.raises(HpoError, match="hpo's records would be among") as told:
        refuse_among_images(photos, file=Path("studies/x.yaml"), home=photos / "mlruns", command="run")
    assert "--home DIR" in str(told.value.hint)
    assert sorted(photos.rglob("*")) == before


def test_settings_of_the_data_go_before_what_the_images_are(
    folder: Path, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    photos = folder / "flat"
    photos.mkdir()
    for number, (image, label) in enumerate(zip(digits[0][:300], digits[1][:300], strict=True)):
        Image.fromarray(image).resize((12, 12)).save(photos / f"c{label}_{number}.png")
    given: dict[str, Any] = {"preset": "quick", "minutes": 1, "weights": ["none"], "device": "cpu", "workers": 1}
    with pytest.raises(DataError, match="no class folders"):
        new_study(photos, **given)
    made = new_study(photos, settings=["data.label='c([0-9])_'", "data.size=8"], **given)
    data = load_study(made.file).data
    assert (data.label, data.size, len(made.data.class_names)) == ("c([0-9])_", 8, 10)


def test_a_few_images_of_another_size_are_noticed_before_they_are_read(folder: Path) -> None:
    for number in range(620):
        side = 12 if number == 303 else 8
        (folder / "p" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("L", (side, side), number % 256).save(folder / "p" / "ab"[number % 2] / f"{number:03}.png")
    assert set(sides_of(folder / "p")[0]) == {(8, 8), (12, 12)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.size=big"], "--set: data.size: input should be a valid integer"),
        (["data.sise=8"], "--set: data.sise: unknown key"),
        (["data.path=elsewhere"], r"--set data\.path=.*elsewhere: the images are those of"),
        (["data.name=npz"], "--set data.name=npz: the images are those of"),
        (["training.epochs=5"], "hpo new takes settings of data only"),
        (["data.size=16"], "--size 8 and data.size=16: differ"),
        (["size"], "not of the form place=value"),
    ],
)
def test_settings_that_cannot_be_are_refused(folder: Path, settings: list[str], message: str) -> None:
    (folder / "p").mkdir()
    with pytest.raises(SpecError, match=message):
        new_study(folder / "p", size=8, settings=settings)


@pytest.mark.parametrize("minutes", [0, -5, float("inf"), float("nan")])
def test_minutes_that_are_no_time_are_refused(folder: Path, minutes: float) -> None:
    with pytest.raises(HpoError, match=r"--minutes .*: is no number of minutes"):
        new_study("absent", minutes=minutes)


def test_groups_of_an_npz_stay_together(folder: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    groups = np.arange(400) // 4
    np.savez(folder / "d.npz", train_images=digits[0][:400], train_labels=digits[1][:400], groups=groups)
    made = new_study("d.npz", preset="quick", minutes=1, device="cpu", workers=1)
    assert load_study("d").split.group == "groups"
    assert made.data.groups == 100


def test_classes_of_very_different_sizes_count_equally(folder: Path, digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    rows = np.concatenate([np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:20]])
    np.savez(folder / "d.npz", train_images=images[rows], train_labels=labels[rows])
    new_study("d.npz", preset="quick", minutes=1, device="cpu", workers=1)
    assert load_study("d").search.objective == "valid_balanced_accuracy"


def test_symmetries_are_those_of_the_images(digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    plain, turned = symmetries(images[..., None], labels, np.arange(len(labels)), seed=0)
    assert plain > 0.95
    assert max(turned.values()) < 0.7
    balls = np.random.default_rng(0).integers(0, 60, (800, 12, 12, 1))
    codes = np.arange(800) % 2
    balls[codes == 1, 4:8, 4:8] += 150  # a bright spot in the middle, however it is turned
    plain, turned = symmetries(balls.astype(np.uint8), codes, np.arange(len(codes)), seed=0)
    assert min(turned.values()) > 0.95 * plain


def test_a_large_symmetric_class_does_not_hide_that_the_others_are_not(folder: Path) -> None:
    """90 % squares, 5 % arrows to the left, 5 % to the right: mirrored, an arrow is one of the other class."""
    generator, count = np.random.default_rng(0), 1000
    labels = np.repeat([0, 1, 2], [900, 50, 50])
    images = generator.integers(0, 30, (count, 12, 12, 1))
    images[labels == 0, 3:9, 3:9] += 180
    for offset in range(6):  # a triangle, whose point is at the left
        images[labels == 1, 6 - offset : 6 + offset, 3 + offset] += 180
    right = np.flatnonzero(labels == 2)
    for offset in range(6):
        images[right, 6 - offset : 6 + offset, 8 - offset] += 180
    order = generator.permutation(count)
    np.savez(folder / "arrows.npz", train_images=images[order].astype(np.uint8), train_labels=labels[order])
    plain, turned = symmetries(images[order].astype(np.uint8), labels[order], np.arange(count), seed=0)
    assert plain == 1.0
    assert turned["flip_horizontal"] == pytest.approx(1 / 3)  # the squares
    assert turned["flip_vertical"] == 1.0
    made = new_study("arrows.npz", preset="quick", minutes=1, weights=["none"], device="cpu", workers=1)
    (augmentation,) = [each for each in made.decisions if each.subject == "augmentation"]
    assert augmentation.choice == "flip_vertical"


def test_the_widest_network_that_trains_long_enough_is_taken_and_the_time_is_filled() -> None:
    preset = PRESETS["good"]
    for cost in (0.001, 0.01, 0.1, 0.5):
        fill = fill_from_scratch(preset, 10, 2, lambda width, cost=cost: cost * width, preset.widths)
        assert preset.epochs[0] <= (fill.last or fill.epochs) <= preset.epochs[1]
        assert fill.trials >= preset.trials
        assert 300 <= fill.seconds <= 600 or fill.trials == 100
    fast, slow = (fill_from_scratch(preset, 10, 2, lambda width, c=c: c * width, preset.widths) for c in (0.01, 1.0))
    assert fast.choice > slow.choice
    assert fast.trials > slow.trials


def test_many_images_in_little_time_train_longest_where_the_model_is_made() -> None:
    fill = fill_from_scratch(PRESETS["good"], 10, 1, lambda width: 2.0 * width, PRESETS["good"].widths)
    assert (fill.choice, fill.trials) == (16, 2)  # the first is taken even if it is too slow
    assert (fill.epochs, fill.last) == (4, 7)
    assert fill.seconds <= 600
    first, second = scratch_models(28, (16, 24))[:2]
    assert (first["filters"], first["pool_after"], second["pool_after"]) == (second["filters"], [1, 3], [2, 4])
    assert scratch_models(64, (16,)) == [scratch_model(64, 16)]


def test_backbones_and_views_fit_into_half_of_the_time() -> None:
    preset = PRESETS["good"]
    fill = fill_frozen(preset, 10, 2, [("a", 60.0), ("b", 60.0), ("c", 1.0)], 0.5, epochs=25, augmented=True)
    assert fill.choice == ("a", "b")
    assert 60 * (1 + fill.views) <= usable(10) / 2
    assert fill.seconds <= 600
    assert fill_frozen(preset, 10, 2, [("a", 60.0)], 0.5, epochs=25, augmented=False).views == 0
    assert fill_frozen(preset, 10, 2, [("a", 400.0), ("b", 60.0)], 0.5, epochs=25, augmented=True).choice == ("a",)


@pytest.mark.parametrize("side", [7, 8, 28, 32, 64, 224])
def test_networks_fit_images_of_every_size(side: int) -> None:
    import torch

    from hpo.models import build_model
    from hpo.spec.models import FAMILIES

    plain = scratch_model(side, 8)
    spec = FAMILIES[plain["kind"]].model_validate(plain)
    net = build_model(spec, image_shape=(side, side, 3), classes=4, seed=0)
    assert net.eval()(torch.zeros(2, 3, side, side)).shape == (2, 4)


def test_names_of_studies_are_no_folders_and_unknown_files_are_refused(folder: Path) -> None:
    (folder / "digits-mlp").mkdir()
    assert source_of("digits-mlp") is None
    assert source_of("nothing") is None
    (folder / "x.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(DataError, match="neither a folder"):
        new_study("x.gz")
    with pytest.raises(SpecError, match="--preset better"):
        new_study("x.gz", preset="better")


def test_a_text_of_every_tree_is_yaml_with_reasons_above_the_parts() -> None:
    tree = {"data": {"name": "npz", "path": "a b.npz"}, "search": {"trials": 2, "space": {"a.b": {"float": [1e-5, 1]}}}}
    assert study_text(tree, [], "t").splitlines()[2:] == [
        "data: {name: npz, path: a b.npz}",
        "search:",
        "  trials: 2",
        "  space:",
        "    a.b: {float: [1.0e-05, 1]}",
    ]
