"""No patient, slide or video in two parts: grouped hold-out and folds, the sealed test part, near-duplicates."""

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from blobs import as_set, blob, png, write_blobs
from hpo.data.duplicates import candidates, clusters, hashes
from hpo.data.overview import near_duplicates, near_words, open_development
from hpo.data.prepare import prepare
from hpo.data.split import draw, indices, rows_of
from hpo.errors import DataError
from hpo.spec.study import DataSpec, SplitSpec

HOLDOUT = SplitSpec(kind="holdout")


@st.composite
def patients(drawn):
    """Labels (n,) and groups (n,): each class has several patients, of one or of many images."""
    classes = drawn(st.integers(2, 4))
    count = drawn(st.integers(3 * classes, 40))
    generator = np.random.default_rng(drawn(st.integers(0, 2**31)))
    sizes = generator.integers(1, drawn(st.integers(2, 9)), count)
    main = np.arange(count) % classes
    groups = np.repeat(np.arange(count) * 7 + 3, sizes)
    labels = np.repeat(main, sizes)
    if drawn(st.booleans()):  # a patient may have images of several classes
        mixed = generator.random(len(labels)) < 0.2
        labels = np.where(mixed, generator.integers(0, classes, len(labels)), labels)
    order = generator.permutation(len(labels))
    return labels[order].astype(np.int64), groups[order].astype(np.int64)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    given=patients(),
    kind=st.sampled_from(["holdout", "kfold"]),
    by=st.sampled_from(["stratified", "random", "order"]),
    share=st.sampled_from([0.1, 0.2, 0.5]),
    seed=st.integers(0, 99),
)
def test_no_group_is_in_two_parts(given, kind, by, share, seed):
    labels, groups = given
    split = SplitSpec(kind=kind, by=by, share=share, folds=3, seed=seed)
    held = draw(labels, groups, share=0.2, seed=seed)
    rest = np.setdiff1d(np.arange(len(labels)), held)
    assert not set(groups[held]) & set(groups[rest])
    assert set(labels[rest]) == set(labels)
    dealt = []
    for fold in range(3 if kind == "kfold" else 1):
        try:
            train, valid = indices(labels[rest], split=split, valid_start=None, fold=fold, groups=groups[rest])
        except DataError:
            return  # too few groups of a class, which is refused in words
        assert not set(groups[rest][train]) & set(groups[rest][valid])
        assert sorted([*train, *valid]) == list(range(len(rest)))
        again = indices(labels[rest], split=split, valid_start=None, fold=fold, groups=groups[rest])
        assert all((one == other).all() for one, other in zip((train, valid), again, strict=True))
        dealt += valid.tolist()
    if kind == "kfold":
        assert sorted(dealt) == list(range(len(rest)))


def test_grouped_parts_keep_class_shares_and_sizes():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), generator.integers(1, 8, 200))
    labels = (groups % 5 == 0).astype(np.int64)
    held = draw(labels, groups, share=0.25, seed=1)
    assert abs(len(held) / len(labels) - 0.25) < 0.01
    assert abs(labels[held].mean() - labels.mean()) < 0.02
    for fold in range(4):
        split = SplitSpec(kind="kfold", folds=4)
        _, valid = indices(labels, split=split, valid_start=None, fold=fold, groups=groups)
        assert abs(len(valid) / len(labels) - 0.25) < 0.02
        assert abs(labels[valid].mean() - labels.mean()) < 0.03
    assert not np.array_equal(held, draw(labels, groups, share=0.25, seed=2))


def test_a_class_with_one_group_stays_with_training():
    labels, groups = np.array([0] * 6 + [1] * 6 + [2] * 3), np.array([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6])
    for seed in range(20):
        assert 6 not in groups[draw(labels, groups, share=0.4, seed=seed)]


def npz(tmp_path, *, per=4, count=20, parts=("train",), shared=False, key="groups"):
    arrays = {}
    for number, part in enumerate(parts):
        first = 0 if shared else 1000 * number
        names = [f"patient {first + n // per}" for n in range(count * per)]
        arrays[f"{part}_images"] = np.stack([blob(n // per % 2, 7000 * number + n) for n in range(count * per)])
        arrays[f"{part}_labels"] = np.arange(count * per) // per % 2
        arrays[f"{part}_{key}"] = np.array(names)
    np.savez(tmp_path / "mine.npz", **arrays)
    return DataSpec(name="npz", path=str(tmp_path / "mine.npz"))


def parts_of(card, split):
    """Part -> the groups of its images."""
    development = np.load(f"{card.folder}/development_groups.npy")
    _, _, rows = open_development(card, split)
    return {name: set(development[of]) for name, of in rows.items()} | {
        "test": set(np.load(f"{card.test_folder}/test_groups.npy"))
    }


def check_apart(card, split):
    found = list(parts_of(card, split).values())
    assert all(found)
    assert sum(map(len, found)) == len(set().union(*found)) == card.groups


def test_groups_of_an_npz_stay_whole_in_every_part(tmp_path):
    split = SplitSpec(kind="holdout", group="groups")
    data = npz(tmp_path)
    card = prepare(data, split, cache=tmp_path / "cache")
    check_apart(card, split)
    assert card.groups == 20
    folds = SplitSpec(kind="kfold", folds=4, group="groups")
    check_apart(prepare(data, folds, cache=tmp_path / "cache"), folds)


def test_groups_that_nothing_uses_are_told(tmp_path):
    card = prepare(npz(tmp_path), HOLDOUT, cache=tmp_path / "cache")
    assert "train_groups, which nothing uses" in card.warnings[0]


def test_groups_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"split\.group: .*mine\.npz has no train_patients"):
        prepare(npz(tmp_path), SplitSpec(kind="holdout", group="patients"), cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"split\.group: digits knows no groups"):
        prepare(DataSpec(name="digits"), SplitSpec(kind="holdout", group="x"), cache=tmp_path / "cache")


@pytest.mark.parametrize(("other", "count"), [("val", 16), ("test", 20)])  # four are sealed away in the first case
def test_official_parts_that_share_a_group_are_refused_with_the_numbers(tmp_path, other, count):
    split = SplitSpec(group="groups")
    data = npz(tmp_path, parts=("train", other), shared=True)
    name = "valid" if other == "val" else other
    with pytest.raises(
        DataError, match=f"{count} groups are in both train and {name}, {4 * count} images of {name} am"
    ):
        prepare(data, split, cache=tmp_path / "cache")
    check_apart(prepare(npz(tmp_path, parts=("train", "val")), split, cache=tmp_path / "cache"), split)


def test_folders_name_their_groups_by_a_pattern(tmp_path):
    photos = tmp_path / "photos"
    for number in range(80):
        place = photos / ("long", "round")[number // 4 % 2] / f"p{number // 4:02}"
        place.mkdir(parents=True, exist_ok=True)
        png(blob(number // 4 % 2, number), place / f"{number % 4}.png")
    data = DataSpec(name="folder", path=str(photos))
    split = SplitSpec(kind="holdout", group=r"/(p\d+)/")
    card = prepare(data, split, cache=tmp_path / "cache")
    assert card.groups == 20
    check_apart(card, split)
    with pytest.raises(DataError, match=r"finds nothing in 76 of 80 paths: long/p02/0\.png"):
        prepare(data, SplitSpec(kind="holdout", group="p00"), cache=tmp_path / "cache")
    with pytest.raises(DataError, match="is no regular expression"):
        prepare(data, SplitSpec(kind="holdout", group="("), cache=tmp_path / "cache")


def test_tables_name_their_groups_by_a_column(tmp_path):
    rows = ["file,label,patient"]
    for number in range(80):
        png(blob(number // 4 % 2, number), tmp_path / f"{number}.png")
        rows.append(f"{number},{('nv', 'mel')[number // 4 % 2]},{number // 4}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    path = str(tmp_path / "labels.csv")
    by_data = prepare(DataSpec(name="table", path=path, group="patient"), HOLDOUT, cache=tmp_path / "cache")
    split = SplitSpec(kind="holdout", group="patient")
    by_split = prepare(DataSpec(name="table", path=path), split, cache=tmp_path / "cache")
    assert by_data.digest == by_split.digest
    check_apart(by_split, split)
    (tmp_path / "labels.csv").write_text("\n".join([*rows[:-1], "79,mel,"]))
    with pytest.raises(DataError, match="1 images have no patient: 79"):
        prepare(DataSpec(name="table", path=path, group="patient"), HOLDOUT, cache=tmp_path / "cache")


def test_a_training_sees_the_same_groups_as_the_split_card(tmp_path):
    import torch

    from hpo.data.prepare import open_trial

    split = SplitSpec(kind="holdout", group="groups")
    card = prepare(npz(tmp_path), split, cache=tmp_path / "cache")
    trial = open_trial(card, split, device=torch.device("cpu"))
    train, valid = rows_of(card, split, np.load(f"{card.folder}/development_labels.npy"))
    assert (trial.train.tolist(), trial.valid.tolist()) == (train.tolist(), valid.tolist())


# Near-duplicates


def changed(image, way, path):
    """The same photo again, in another file."""
    picture = Image.fromarray(image)
    if way == "jpeg":
        picture.save(path, "JPEG", quality=70)
    elif way == "brighter":
        ImageEnhance.Brightness(picture).enhance(1.1).save(path, "PNG")
    elif way == "scaled":
        picture.resize((48, 48), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC).save(path, "PNG")
    elif way == "spot":
        picture.putpixel((3, 3), 255)
        picture.save(path, "PNG")


@pytest.mark.parametrize("way", ["jpeg", "brighter", "scaled", "spot"])
def test_a_photo_that_was_saved_again_is_found_in_the_other_part(tmp_path, way):
    photos = tmp_path / "photos"
    write_blobs(photos / "train", png, count=30)
    write_blobs(photos / "test", png, count=10, first=500)
    for number in range(5):
        changed(blob(0, number), way, photos / "test" / "long" / f"again {number}.png")
    spec = SplitSpec(kind="holdout")
    card = prepare(DataSpec(name="folder", path=str(photos)), spec, cache=tmp_path / "cache")
    across = near_duplicates(card, spec)
    assert across[("train", "test")] + across[("valid", "test")] == 5
    assert f"{across[('train', 'test')]} of test in train" in near_words(card, spec)


def test_different_images_are_no_near_duplicates(tmp_path):
    card = prepare(
        DataSpec(name="folder", path=str(write_blobs(tmp_path / "photos", png, count=100))),
        HOLDOUT,
        cache=tmp_path / "cache",
    )
    assert set(near_duplicates(card, HOLDOUT).values()) == {0}


def test_near_duplicates_stay_together_on_request(tmp_path):
    photos = write_blobs(tmp_path / "photos", png, count=30)
    for number in range(30):
        changed(blob(0, number), "jpeg", photos / "long" / f"again {number}.png")
    data = DataSpec(name="folder", path=str(photos))
    apart = prepare(data, HOLDOUT, cache=tmp_path / "cache")
    assert sum(near_duplicates(apart, HOLDOUT).values()) > 0
    split = SplitSpec(kind="holdout", near_duplicates="together")
    card = prepare(data, split, cache=tmp_path / "cache")
    assert set(near_duplicates(card, split).values()) == {0}
    assert card.groups == 60
    folds = SplitSpec(kind="kfold", folds=3, near_duplicates="together")
    assert set(near_duplicates(prepare(data, folds, cache=tmp_path / "cache"), folds).values()) == {0}


def test_groups_and_near_duplicates_are_kept_together_at_once(tmp_path):
    photos = tmp_path / "photos"
    for number in range(60):
        place = photos / ("long", "round")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        png(blob(number % 2, number), place / f"p{number // 4:02}-{number}.png")
    # A photo of patient 0 once more, as one of patient 14.
    changed(blob(0, 0), "jpeg", photos / "long" / "p14-again.png")
    split = SplitSpec(kind="holdout", group=r"(p\d+)-", near_duplicates="together")
    card = prepare(DataSpec(name="folder", path=str(photos)), split, cache=tmp_path / "cache")
    assert card.groups == 14  # fifteen patients, two of them joined
    check_apart(card, split)


def test_official_parts_with_near_duplicates_are_refused_where_they_shall_be_together(tmp_path):
    photos = tmp_path / "photos"
    write_blobs(photos / "train", png, count=20)
    write_blobs(photos / "test", png, count=5, first=500)
    changed(blob(0, 3), "jpeg", photos / "test" / "long" / "again.png")
    split = SplitSpec(kind="holdout", near_duplicates="together")
    with pytest.raises(DataError, match="1 groups or near-duplicates are in both train and test, 1 images"):
        prepare(DataSpec(name="folder", path=str(photos)), split, cache=tmp_path / "cache")


def test_like_hashes_are_found_without_a_look_at_all_pairs():
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 2**64, 17_000, dtype=np.uint64)
    codes[-100:] = codes[:100] ^ np.uint64(0b1010001)  # three bits
    seen = []
    looked = 0
    for left, right in candidates(codes):
        seen += list(zip(left.tolist(), right.tolist(), strict=True))
        looked += len(left)
    assert {frozenset(pair) for pair in seen} >= {frozenset((n, 16_900 + n)) for n in range(100)}
    assert looked < 100_000  # of 144 million pairs


def test_many_equal_images_cost_no_more_than_one():
    images = np.repeat(np.stack([blob(0, 1), blob(1, 2)])[..., None], 3000, axis=0)
    digests = np.repeat([b"a", b"b"], 3000)
    began = time.process_time()
    found = clusters(hashes(images), digests, lambda rows: images[rows])
    assert set(found.tolist()) == {0, 3000}
    assert time.process_time() - began < 10


def test_hashes_do_not_depend_on_the_pieces_they_are_computed_in():
    images = np.stack([blob(n % 2, n) for n in range(20)])[..., None]
    np.testing.assert_array_equal(hashes(images), np.concatenate([hashes(images[:7]), hashes(images[7:])]))
    assert len(as_set(images)) == len(set(hashes(images).tolist())) == 20
