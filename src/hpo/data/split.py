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


def rows_of(card: DataCard, split: SplitSpec, labels: NDArray[Any], *, fold: int = 0) -> tuple[Rows, Rows]:
    """As indices, for the development images of a prepared data set, whose groups stay whole."""
    file = Path(card.folder) / "development_groups.npy"
    groups = np.load(file, allow_pickle=False) if file.is_file() else None
    return indices(labels, split=split, valid_start=card.valid_start, fold=fold, groups=groups)


def indices(
    labels: NDArray[Any],
    *,
    split: SplitSpec,
    valid_start: int | None,
    fold: int = 0,
    groups: NDArray[np.int64] | None = None,
) -> tuple[Rows, Rows]:
    """Rows of the development images that train and that validate, each ascending; together they are all rows.

    labels (n,) int64 are those of the development images, or (n, labels) of 0 and 1 where an image has several: then
    stratified draws at random, by the same seed; valid_start is the first row of the official validation
    part (None: there is none). holdout and kfold draw from all rows, those of an official validation part included;
    kfold with a fraction leaves the other rows out. fold counts from 0. groups (n,) are the codes of what must not be
    divided: no group both trains and validates. Raises DataError when there is no official part to use or it shares
    groups, when a class would have no training image, and when fewer than two classes would validate.
    """
    every = np.arange(len(labels), dtype=np.int64)
    whole_labels, labels = labels, _drawn_by(labels)
    if split.kind == "none":
        return every, every[:0]
    if split.kind == "kfold":
        pool = every if split.fraction == 1 else draw(labels, groups, share=split.fraction, seed=split.seed)
        if groups is None:
            dealt = _DEALS[split.by](labels[pool], split.folds, split.seed)
        else:
            dealt = _deal_groups(labels[pool], groups[pool], split)
        valid = pool[dealt == fold]
        train = np.setdiff1d(pool, valid, assume_unique=True)
        _check(whole_labels, train, valid, split)
        return train, valid
    if split.kind == "official":
        if valid_start is None:
            raise DataError(
                "split.kind: official, but the data set comes without a validation part.",
                "Hold one out: --set split.kind=holdout",
            )
        valid = every[valid_start:]
        shared, images = groups_shared(groups[:valid_start], groups[valid_start:]) if groups is not None else (0, 0)
        if shared:
            raise DataError(
                f"split.kind: official, but {shared:,} groups are in both train and validation, {images:,} validation "
                "images among them.",
                "Have whole groups drawn: --set split.kind=holdout",
            )
    elif groups is None:
        valid = _DRAWS[split.by](labels, share=split.share, seed=split.seed)
    else:
        valid = draw(labels, groups, share=split.share, seed=split.seed, by=split.by)
    train = np.setdiff1d(every, valid, assume_unique=True)
    _check(whole_labels, train, valid, split)
    return train, valid


def _drawn_by(labels: NDArray[Any]) -> NDArray[Any]:
    """The classes by which rows are drawn; where an image has several labels all are of one, so a draw is random."""
    return labels if labels.ndim == 1 else np.zeros(len(labels), np.int64)


def groups_shared(first: NDArray[np.int64], second: NDArray[np.int64]) -> tuple[int, int]:
    """How many groups two parts share, and how many images of the second are of such groups."""
    shared = np.intersect1d(first, second)
    return len(shared), int(np.isin(second, shared).sum())


def draw(
    labels: NDArray[Any], groups: NDArray[np.int64] | None, *, share: float, seed: int, by: str = "stratified"
) -> Rows:
    """A share of the rows, ascending, by class shares unless `by` is random or order; no group is divided.

    Every class keeps a row that is not drawn, where its groups allow it.
    """
    labels = _drawn_by(labels)
    if groups is None:
        return _DRAWS[by](labels, share=share, seed=seed)
    classes = labels if by == "stratified" else np.zeros_like(labels)
    bins = _into_bins(classes, groups, np.array([1 - share, share]), seed=seed, shuffled=by != "order", keep=labels)
    return np.flatnonzero(bins == 1).astype(np.int64)


def _deal_groups(labels: NDArray[Any], groups: NDArray[np.int64], split: SplitSpec) -> Rows:
    """The fold of each row when whole groups are dealt, with equal class shares unless `by` says otherwise."""
    if len(np.unique(groups)) < split.folds:
        raise DataError(
            f"split.folds: {split.folds} folds of {len(np.unique(groups))} groups: a fold would be empty.",
            "Take fewer folds.",
        )
    classes = labels if split.by == "stratified" else np.zeros_like(labels)
    shares = np.full(split.folds, 1 / split.folds)
    return _into_bins(classes, groups, shares, seed=split.seed, shuffled=split.by != "order")


def _into_bins(
    classes: NDArray[Any],
    groups: NDArray[np.int64],
    shares: NDArray[np.floating],
    *,
    seed: int,
    shuffled: bool,
    keep: NDArray[Any] | None = None,
) -> Rows:
    """The bin of each row: whole groups, largest first, each into the bin that is furthest below its share.

    As StratifiedGroupKFold does, but for bins of unequal shares. Unless shuffled, groups fill the bins in their order.
    keep (n,): of each of these labels, bin 0 gets a group before another gets its last.
    """
    _, first, codes = np.unique(groups, return_index=True, return_inverse=True)
    codes = codes.reshape(-1)
    count = len(first)
    table = np.zeros((count, int(classes.max()) + 1))
    np.add.at(table, (codes, classes), 1)
    sizes = table.sum(axis=1)
    bins = np.zeros(count, np.int64)
    if not shuffled:
        order = np.argsort(first, kind="stable")
        middle = np.cumsum(sizes[order]) - sizes[order] / 2
        bins[order] = np.searchsorted(np.cumsum(shares)[:-1] * sizes.sum(), middle, side="right")
        return bins[codes]
    order = np.random.default_rng(seed).permutation(count)
    order = order[np.argsort(-table[order].std(axis=1) - sizes[order] / sizes.sum(), kind="stable")]
    wanted = shares[:, None] * table.sum(axis=0)
    weight = 1 / np.maximum(table.sum(axis=0), 1)
    filled = np.zeros_like(wanted)
    left = _Waiting(codes, keep, count) if keep is not None else None
    for group in order:
        if left is not None and left.must_stay(group):
            chosen = 0
        else:
            # The sum over classes of the squared distance from what each bin should hold, with the group in it.
            gains = (((filled + table[group] - wanted) ** 2 - (filled - wanted) ** 2) * weight).sum(axis=1)
            chosen = int(np.argmin(gains))
        bins[group] = chosen
        filled[chosen] += table[group]
        if left is not None:
            left.assign(group, stays=chosen == 0)
    if (empty := np.setdiff1d(np.arange(len(shares)), bins)).size and count >= len(shares):
        _fill_empty(bins, sizes, empty)
    return bins[codes]


def _fill_empty(bins: Rows, sizes: NDArray[np.floating], empty: Rows) -> None:
    """Give each empty bin the smallest group of a bin that has more than one."""
    for lacking in empty:
        counts = np.bincount(bins, minlength=int(max(bins.max(), empty.max())) + 1)
        able = np.flatnonzero(counts[bins] > 1)
        bins[able[np.argmin(sizes[able])]] = lacking


class _Waiting:
    """Which labels bin 0 holds already, and how many groups of each are not dealt yet."""

    def __init__(self, codes: Rows, keep: NDArray[Any], count: int) -> None:
        self._has = np.zeros((count, int(keep.max()) + 1), np.bool_)
        self._has[codes, keep] = True
        self._waiting = self._has.sum(axis=0)
        self._held = np.zeros(self._has.shape[1], np.bool_)

    def must_stay(self, group: int) -> bool:
        """True where this is the last group of a label that bin 0 lacks."""
        return bool((self._has[group] & ~self._held & (self._waiting == 1)).any())

    def assign(self, group: int, *, stays: bool) -> None:
        """Count a group as dealt."""
        self._waiting -= self._has[group]
        if stays:
            self._held |= self._has[group]


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
    train, valid = rows_of(card, split, labels)
    classes = len(card.class_names)
    sizes = {"train": len(train), "valid": len(valid), "test": card.test_count}
    counts = {"train": class_counts(labels[train], classes), "valid": class_counts(labels[valid], classes)}
    counts["test"] = count_classes(card, class_counts)
    return SplitCard(
        counts=sizes, shares={name: tuple((part / max(sizes[name], 1)).tolist()) for name, part in counts.items()}
    )


def class_counts(labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """How many images have each class, (classes,); labels are (n,), or (n, classes) of 0 and 1."""
    return labels.sum(axis=0).astype(np.int64) if labels.ndim == 2 else np.bincount(labels, minlength=classes)


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
    images = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=len(card.class_names))
    counts = dict(zip(card.class_names, images.tolist(), strict=True))
    held = ", ".join(f"{name} {count}" for name, count in counts.items())
    if single := [name for name, count in counts.items() if count == 1]:
        raise DataError(
            f"split.folds: {split.folds} folds, but of {', '.join(single)} there is only one image (images to train "
            f"on: {held}). The fold that validates on it would train without it.",
            "Add images of it, leave the class out with data.groups, or write split.kind: holdout, which trains on it.",
        )
    for fold in range(split.folds):
        try:
            rows_of(card, split, labels, fold=fold)
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
    if labels.ndim == 2:
        lacking = np.flatnonzero(labels.any(axis=0) & ~labels[train].any(axis=0))
        if not (labels[valid].any(axis=0) & ~labels[valid].all(axis=0)).any():
            raise DataError(
                f"{place}: no label is on some of the {len(valid)} validation images and not on others, so no score "
                "can rank them.",
                "Change split.share or split.seed.",
            )
        hint = "Change split.share or split.seed."
    else:
        lacking = np.setdiff1d(labels, labels[train])
    if lacking.size:
        raise DataError(f"{place}: no training image is left of class {', '.join(map(str, lacking))}.", hint)
    if labels.ndim == 1 and len(np.unique(labels[valid])) < 2:
        raise DataError(
            f"{place}: the {len(valid)} validation images hold fewer than two classes, which no score can rank.", hint
        )
