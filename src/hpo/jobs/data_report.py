"""Facts of a data set, for `hpo data show`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from hpo.errors import DataError, HpoError
from hpo.report.page import DataFacts, data_page
from hpo.report.text import declares_groups, split_text
from hpo.spec.files import study_files
from hpo.spec.load import load_study
from hpo.spec.study import DataSpec, SplitSpec

AnyPath = str | Path


def explore(
    name: str,
    *,
    path: AnyPath | None = None,
    size: int | None = None,
    images: int = 8,
    seed: int = 0,
    trust: bool = False,
) -> tuple[DataFacts, Mapping[int, bytes]]:
    """Facts of a data set, or of a study's, and the images that a page of them shows: row -> PNG.

    name is a data set (bloodmnist, npz, folder, package.module:function), with the
    publisher's parts, or a study, by name or file, with its own. path and size replace data.path and data.size. images
    is the number of random training images of each class, drawn with seed. trust is as in load_study. Raises
    DataError, and SpecError for an invalid study.
    """
    return explore_data(*find_data(name, path=path, size=size, trust=trust), images=images, seed=seed)


def find_data(
    name: str, *, path: AnyPath | None = None, size: int | None = None, trust: bool = False
) -> tuple[DataSpec, SplitSpec | None]:
    """The data that explore's arguments name, and the split of a study; None for a data set's own parts."""
    from hpo.data.sources import DATASETS

    places = {"path": None if path is None else str(path), "size": size}
    given = {place: value for place, value in places.items() if value is not None}
    is_file = name.endswith((".yaml", ".yml"))
    if name in DATASETS or (":" in name and not is_file):
        return DataSpec.model_validate({"name": name, **given}), None
    studies = study_files()
    if not is_file and name not in studies:
        close = difflib.get_close_matches(name, [*DATASETS, *studies], n=1)
        hint = f"Did you mean {close[0]}?" if close else f"Data sets: {', '.join(DATASETS)}. Studies: hpo studies."
        raise DataError(f"there is neither a data set nor a study named {name!r}.", hint)
    spec = load_study(name, overrides={f"data.{place}": value for place, value in given.items()}, trust=trust)
    return spec.data, spec.split


def explore_data(
    data: DataSpec, split: SplitSpec | None = None, *, images: int = 8, seed: int = 0
) -> tuple[DataFacts, dict[int, bytes]]:
    """The same for a DataSpec; split None takes the parts of the data set."""
    from hpo.data.duplicates import contradictions, pixel_digests
    from hpo.data.overview import (
        channel_statistics,
        class_text,
        duplicates,
        near_words,
        open_development,
        sample_rows,
        to_pngs,
    )
    from hpo.data.parts import class_codes
    from hpo.data.prepare import prepare
    from hpo.data.split import split_card

    card = prepare(data, split or SplitSpec())
    split = split or SplitSpec(kind="none" if card.valid_start is None else "official")
    pixels, labels, parts = open_development(card, split)
    digests = pixel_digests(pixels)
    within, across = duplicates(card, digests, parts)
    shares = split_card(card, split)
    mean, std = channel_statistics(pixels, parts["train"])
    names = card.class_names
    samples = sample_rows(labels, parts["train"], classes=len(names), count=images, seed=seed)
    groups = contradictions(digests, class_codes(labels).tolist())
    facts = DataFacts(
        data=card,
        split=split_text(split),
        counts={part: _counts(shares.counts[part], shares.shares[part]) for part in (*parts, "test")},
        mean=mean,
        std=std,
        copies=within,
        shared={f"{first} and {second}": count for (first, second), count in across.items()},
        contradictions=tuple(tuple((row, class_text(labels[row], names)) for row in rows) for rows in groups),
        samples={name: tuple(rows) for name, rows in zip(names, samples, strict=True)},
        near_duplicates=near_words(card, split),
        groups_declared=declares_groups(data, split),
    )
    return facts, to_pngs(pixels, facts.pictured)


def write_page(facts: DataFacts, pictures: Mapping[int, bytes], file: Path) -> Path:
    """Write the page of the facts. Raises HpoError where the file cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(data_page(facts, pictures), encoding="utf-8")
    except OSError as error:
        raise HpoError(f"{file}: cannot be written: {error.strerror}.", "Choose another file: --out FILE") from None
    return file


def _counts(total: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(round(total * share) for share in shares)
