"""Split the development images into train and validation, and say what each part holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.errors import DataError
from hpo.records import DataCard, SplitCard
from hpo.spec.study import SplitSpec

Rows = NDArray[np.int64]


def indices(labels: NDArray[Any], *, split: SplitSpec, valid_start: int | None, fold: int = 0) -> tuple[Rows, Rows]:
    """Rows of the development images that train and that validate, each ascending; together they are all rows.

    labels (n,) int64 are those of the development images; valid_start is the first row of the official validation
    part (None: there is none). holdout and kfold draw from all rows, those of an official validation part included;
    kfold with a fraction leaves the other rows out. fold counts from 0. Raises DataError when there is no official part
    to use, when a class would have no training image, and when fewer than two classes would validate.
    """
    every = np.arange(len(labels), dtype=np.int64)
    if split.kind == "none":
        return every, every[:0]
    if split.kind == "kfold":
        pool = every if split.fraction == 1 else stratified(labels, share=split.fraction, seed=split.seed)
        valid = pool[_DEALS[split.by](labels[pool], split.folds, split.seed) == fold]
        train = np.setdiff1d(pool, valid, assume_unique=True)
        _check(labels, train, valid, split)
        return train, valid
    if split.kind == "official":
        if valid_start is None:
            raise DataError(
                "split.kind: official, but the data set comes without a validation part.",
                "Hold one out: --set split.kind=holdout",
            )
        valid = every[valid_start:]
    else:
        valid = _DRAWS[split.by](labels, share=split.share, seed=split.seed)
    train = np.setdiff1d(every, valid, assume_unique=True)
    _check(labels, train, valid, split)
    return train, valid


def stratified(labels: NDArray[Any], *, share: float, seed: int) -> Rows:
    """A random share of the rows, ascending, with the class shares of labels (n,).

    The parts of the classes add up to round(share * n) by largest remainders, except that every class keeps a row.
    """
    counts = np.bincount(labels)
    wanted = counts * share
    taken = np.floor(wanted).astype(np.int64)
    missing = round(len(labels) * share) - int(taken.sum())
    taken[np.argsort(taken - wanted, kind="stable")[:missing]] += 1
    taken = np.minimum(taken, np.maximum(counts - 1, 0))
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.cumsum(counts) - counts
    rows = [by_class[start : start + count] for start, count in zip(starts, taken, strict=True)]
    return np.sort(np.concatenate(rows)).astype(np.int64)


def split_card(card: DataCard, split: SplitSpec) -> SplitCard:
    """How many images, and which share of each class, train, validate and test; of folds, those of the first.

    Raises DataError as indices does, for any of the folds.
    """
    from hpo.data.test_set import count_classes  # here, because trials import this module and never that one

    labels = np.load(Path(card.folder) / "development_labels.npy")
    _check_folds(labels, split, card)
    train, valid = indices(labels, split=split, valid_start=card.valid_start)
    classes = len(card.class_names)
    counts = {name: np.bincount(labels[rows], minlength=classes) for name, rows in (("train", train), ("valid", valid))}
    counts["test"] = count_classes(card)
    return SplitCard(
        counts={name: int(part.sum()) for name, part in counts.items()},
        shares={name: tuple((part / max(part.sum(), 1)).tolist()) for name, part in counts.items()},
    )


def _random(labels: NDArray[Any], *, share: float, seed: int) -> Rows:
    order = np.random.default_rng(seed).permutation(len(labels))
    return np.sort(order[: round(len(labels) * share)]).astype(np.int64)


def _last(labels: NDArray[Any], *, share: float, seed: int) -> Rows:  # noqa: ARG001 - the order of the file is no draw
    return np.arange(len(labels) - round(len(labels) * share), len(labels), dtype=np.int64)


def _deal(order: Rows, folds: int) -> Rows:
    """The fold of each row when rows in this order are dealt out like cards."""
    dealt = np.empty(len(order), dtype=np.int64)
    dealt[order] = np.arange(len(order)) % folds
    return dealt


def _deal_stratified(labels: NDArray[Any], folds: int, seed: int) -> Rows:
    order = np.random.default_rng(seed).permutation(len(labels))
    # Class after class in one deal: every fold gets its share of each class, and of the remainders.
    return _deal(order[np.argsort(labels[order], kind="stable")], folds)


def _deal_random(labels: NDArray[Any], folds: int, seed: int) -> Rows:
    return _deal(np.random.default_rng(seed).permutation(len(labels)), folds)


def _deal_blocks(labels: NDArray[Any], folds: int, seed: int) -> Rows:  # noqa: ARG001 - the order of the file is no draw
    return np.arange(len(labels), dtype=np.int64) * folds // len(labels)


def _check_folds(labels: NDArray[Any], split: SplitSpec, card: DataCard) -> None:
    """Refuse folds of which one could not be trained. Raises DataError with the classes and their counts."""
    if split.kind != "kfold":
        return
    counts = dict(zip(card.class_names, np.bincount(labels, minlength=len(card.class_names)).tolist(), strict=True))
    held = ", ".join(f"{name} {count}" for name, count in counts.items())
    if single := [name for name, count in counts.items() if count == 1]:
        raise DataError(
            f"split.folds: {split.folds} folds, but of {', '.join(single)} there is only one image (images to train "
            f"on: {held}). The fold that validates on it would train without it.",
            "Add images of it, leave the class out with data.groups, or write split.kind: holdout, which trains on it.",
        )
    for fold in range(split.folds):
        try:
            indices(labels, split=split, valid_start=card.valid_start, fold=fold)
        except DataError as error:
            fewest = min(counts.values())
            most = f"Take at most {fewest} folds" if 2 <= fewest < split.folds else "Take fewer folds"
            raise DataError(
                f"fold {fold + 1} of {split.folds}: {error.message.rstrip('.')} (images to train on: {held}).",
                f"{most}, write split.by: stratified, or add images.",
            ) from None


_DEALS = {"stratified": _deal_stratified, "random": _deal_random, "order": _deal_blocks}
_DRAWS = {"stratified": stratified, "random": _random, "order": _last}


def _check(labels: NDArray[Any], train: Rows, valid: Rows, split: SplitSpec) -> None:
    place = f"split ({split.kind}" + (f", share {split.share:g}, by {split.by})" if split.kind == "holdout" else ")")
    hint = "Hold out by class: --set split.kind=holdout --set split.by=stratified; or change split.share"
    lacking = np.setdiff1d(labels, labels[train])
    if lacking.size:
        raise DataError(f"{place}: no training image is left of class {', '.join(map(str, lacking))}.", hint)
    if len(np.unique(labels[valid])) < 2:
        raise DataError(
            f"{place}: the {len(valid)} validation images hold fewer than two classes, which no score can rank.", hint
        )
