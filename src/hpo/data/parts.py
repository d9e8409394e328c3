"""The parts of a data set before they are written: checked, grouped into other classes, sealed, identified."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.duplicates import Look, clusters
from hpo.data.folders import Parts
from hpo.data.pixels import Extent, Images, Ranges, extent_of, kind_of, plain, ranges_of
from hpo.data.sources import Gathered, Source
from hpo.data.split import draw, groups_shared
from hpo.errors import DataError
from hpo.spec.study import DataSpec, SplitSpec


@dataclass(frozen=True)
class Part:
    """The images of one part, their labels int64, and the code of each image's group, (n,) int64, where known.

    Labels are (n,), or (n, labels) of 0 and 1 where an image has several.
    """

    images: Images
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None = None

    def pick(self, rows: NDArray[np.int64]) -> Part:
        """Some of its images."""
        return Part(self.images.pick(rows), self.labels[rows], None if self.groups is None else self.groups[rows])


def checked(found: Gathered, source: Source, data: DataSpec) -> tuple[dict[str, Part], tuple[str, ...], Ranges]:
    """Each part as images and labels (n,) int64, a name for each class, and the range of each kind of pixel."""
    origin, given = found.origin, found.parts
    sides = (data.size,) if data.size else source.sizes
    for part, (images, labels) in given.pairs.items():
        _check_arrays(images, labels, f"{origin}: {part}")
    first = _shape(given.pairs["train"][0])
    for part, (images, _) in given.pairs.items():
        high, wide, channels = _shape(images)
        place = f"{origin}: {part}"
        if sides and (high, wide) not in ((side, side) for side in sides):
            raise DataError(
                f"{place} images are {wide}x{high} pixels, wanted: {' or '.join(f'{side}x{side}' for side in sides)}.",
                "Correct data.size, or name another file.",
            )
        if (high, wide, channels) != first:
            raise DataError(
                f"{place} images are {high}x{wide}x{channels}, train images {'x'.join(map(str, first))}.",
                "Save all parts at one size.",
            )
    class_names = _class_names(given, origin)
    ranges = given.ranges if given.ranges is not None else _ranges(given, data, origin)
    codes = _codes(given.groups)
    parts = {}
    for part, (images, labels) in given.pairs.items():
        whole = images if isinstance(images, Images) else Images(images, np.arange(len(images)), ranges)
        parts[part] = Part(whole, plain_labels(labels), codes.get(part))
    return parts, class_names, ranges


def _check_arrays(images: Any, labels: NDArray[Any], place: str) -> None:
    if not isinstance(images, Images) and images.dtype.kind not in "biuf":
        raise DataError(f"{place} images are {images.dtype}, not numbers.", "Save pixel values, as numpy.uint8 mostly.")
    if not isinstance(images, Images) and (
        images.ndim not in (3, 4) or 0 in images.shape or (images.ndim == 4 and images.shape[3] > 4)
    ):
        raise DataError(
            f"{place} images have shape {images.shape}.",
            "Save them as (n, height, width) or (n, height, width, channels) with 1 to 4 channels, none empty.",
        )
    several = labels.ndim == 2 and labels.shape[1] > 1 and bool(np.isin(labels, (0, 1)).all())
    if labels.shape not in ((len(images),), (len(images), 1)) and not (several and len(labels) == len(images)):
        raise DataError(
            f"{place} labels have shape {labels.shape} for {len(images)} images.",
            "Save one label for each image, or (n, labels) of 0 and 1 where an image has several.",
        )
    if labels.dtype.kind not in "iu":
        raise DataError(
            f"{place} labels are {labels.dtype}, not integers.", "Number the classes 0, 1, 2, ... as int64."
        )


def plain_labels(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Labels as found, (n,), (n, 1) or (n, labels) -> int64, (n,) or, where an image has several, (n, labels)."""
    several = labels.ndim == 2 and labels.shape[1] > 1
    return (labels if several else labels.reshape(-1)).astype(np.int64)


def class_codes(labels: NDArray[Any]) -> NDArray[np.int64]:
    """Labels (n,) or (n, labels) -> (n,): the same number for the same labels."""
    if labels.ndim == 1:
        return labels
    return np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _shape(images: Any) -> tuple[int, int, int]:
    """(height, width, channels) of an array of images, or of Images."""
    high, wide, *channels = images.shape[1:]
    return high, wide, channels[0] if channels else 1


def _ranges(given: Parts, data: DataSpec, origin: str) -> dict[str, tuple[float, float]]:
    """The range of each kind of pixel in arrays."""
    extents: dict[str, Extent] = {}
    for images, _ in given.pairs.values():
        kind = kind_of(images.dtype)
        extent = extents.get(kind, Extent())
        if kind == "uint8":
            extent = Extent(0.0, 255.0)
        else:
            for start in range(0, len(images), 64):
                extent += extent_of(images[start : start + 64])
        extents[kind] = extent
    return ranges_of(extents, data.range, origin)


def _class_names(given: Parts, origin: str) -> tuple[str, ...]:
    kinds = [plain_labels(labels) for _, labels in given.pairs.values()]
    if kinds[0].ndim == 2:
        return _label_names(given, kinds, origin)
    labels = np.concatenate([labels.reshape(-1) for labels in kinds])
    if not len(labels) or labels.max() >= max(len(labels), len(given.class_names)):
        raise DataError(
            f"{origin}: {len(labels)} labels, the highest {labels.max() if len(labels) else 'missing'}.",
            "Number the classes 0, 1, 2, ... without gaps.",
        )
    class_names = given.class_names or tuple(map(str, range(int(labels.max()) + 1)))
    if len(set(class_names)) < len(class_names):
        raise DataError(f"{origin}: two classes have one name: {', '.join(class_names)}.", "Name each differently.")
    if labels.min() < 0 or labels.max() >= len(class_names):
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise DataError(
            f"{origin}: label {wrong} is outside 0 to {len(class_names) - 1}.",
            f"Number the {len(class_names)} classes 0, 1, 2, ...",
        )
    return class_names


def _label_names(given: Parts, labels: Sequence[NDArray[np.int64]], origin: str) -> tuple[str, ...]:
    """The names of labels of which an image may have several."""
    shapes = {part.shape[1:] for part in labels}
    if len(shapes) > 1:
        raise DataError(f"{origin}: parts have different numbers of labels.", "Save one column for each label.")
    count = labels[0].shape[1]
    names = given.class_names or tuple(map(str, range(count)))
    if all((part.sum(1) == 1).all() for part in labels):
        raise DataError(
            f"{origin}: labels are (n, {count}), and each image has exactly one of them.",
            "Save the number of the class instead: labels.argmax(axis=1).",
        )
    if len(names) != count or len(set(names)) < count:
        raise DataError(
            f"{origin}: {count} labels, named {', '.join(names)}.", "Give each its own name, in class_names."
        )
    return names


def _codes(groups: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.int64]]:
    """Names of groups as numbers, the same in all parts."""
    if not groups:
        return {}
    _, codes = np.unique(np.concatenate(list(groups.values())), return_inverse=True)
    ends = np.cumsum([len(names) for names in groups.values()])[:-1]
    return dict(zip(groups, np.split(codes.reshape(-1).astype(np.int64), ends), strict=True))


def regrouped(
    parts: Mapping[str, Part], class_names: tuple[str, ...], groups: Mapping[str, Sequence[str]]
) -> tuple[dict[str, Part], tuple[str, ...]]:
    """The parts with the classes of each group as one new class, in the order of groups, and without other images."""
    if parts["train"].labels.ndim == 2:
        raise DataError("data.groups: images have several labels, which cannot be grouped.", "Leave data.groups out.")
    group_of = np.full(len(class_names), -1, dtype=np.int64)
    for label, members in enumerate(groups.values()):
        for name in members:
            if name not in class_names:
                raise DataError(
                    f"data.groups: there is no class {name!r} (known: {', '.join(class_names)}).", "Correct the name."
                )
            if group_of[class_names.index(name)] >= 0:
                raise DataError(f"data.groups: class {name!r} is in two groups.", "Leave it out of one.")
            group_of[class_names.index(name)] = label
    grouped: dict[str, Part] = {}
    for name, part in parts.items():
        kept = part.pick(np.flatnonzero(group_of[part.labels] >= 0))
        grouped[name] = replace(kept, labels=group_of[kept.labels])
    return grouped, tuple(groups)


def near_clusters(parts: Mapping[str, Part], looks: Mapping[str, Look]) -> dict[str, NDArray[np.int64]]:
    """For each part the cluster of each image, (n,): images of one cluster look nearly alike, in whichever part."""
    ends = np.cumsum([len(part.labels) for part in parts.values()])
    starts = dict(zip(parts, ends - [len(part.labels) for part in parts.values()], strict=True))

    def pixels(rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        pieces = [
            part.images.levels(rows[(rows >= starts[name]) & (rows < starts[name] + len(part.labels))] - starts[name])
            for name, part in parts.items()
        ]
        return np.concatenate(pieces)

    codes, digests = (np.concatenate([getattr(look, name) for look in looks.values()]) for name in ("codes", "digests"))
    return dict(zip(parts, np.split(clusters(codes, digests, pixels), ends[:-1]), strict=True))


def joined(parts: Mapping[str, Part], near: Mapping[str, NDArray[np.int64]]) -> dict[str, Part]:
    """The parts with groups that hold each cluster of near-duplicates whole, and each group that there was."""
    clustered = np.concatenate(list(near.values()))
    count = len(clustered)
    links = [(np.arange(count), clustered)]
    if all(part.groups is not None for part in parts.values()):
        groups = np.concatenate([part.groups for part in parts.values() if part.groups is not None])
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        links.append((np.arange(count), first[inverse.reshape(-1)]))
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    one, other = (np.concatenate(ends) for ends in zip(*links, strict=True))
    graph = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(count, count))
    _, codes = connected_components(graph, directed=False)
    ends = np.cumsum([len(part.labels) for part in parts.values()])[:-1]
    pieces = np.split(codes.astype(np.int64), ends)
    return {name: replace(part, groups=codes) for (name, part), codes in zip(parts.items(), pieces, strict=True)}


def sealed(
    parts: Mapping[str, Part], near: Mapping[str, NDArray[np.int64]], split: SplitSpec
) -> tuple[dict[str, Part], dict[str, NDArray[np.int64]]]:
    """The parts with a test part drawn from train, no group divided; an official validation part stays whole."""
    train = parts["train"]
    test = draw(train.labels, train.groups, share=split.test_share, seed=split.seed)
    kept = np.setdiff1d(np.arange(len(train.labels)), test, assume_unique=True)
    return (
        {**parts, "train": train.pick(kept), "test": train.pick(test)},
        {**near, "train": near["train"][kept], "test": near["train"][test]},
    )


def check_groups(parts: Mapping[str, Part], origin: str, split: SplitSpec) -> None:
    """Refuse official parts that share a group. Raises DataError."""
    official = [("train", "test"), ("valid", "test")]
    if split.kind == "official":
        official.insert(0, ("train", "valid"))
    for one, other in official:
        first, second = (parts[name].groups if name in parts else None for name in (one, other))
        shared, images = groups_shared(first, second) if first is not None and second is not None else (0, 0)
        if shared:
            what = "groups" if split.near_duplicates == "count" else "groups or near-duplicates"
            raise DataError(
                f"{origin}: {shared:,} {what} are in both {one} and {other}, {images:,} images of {other} among them.",
                "These are the parts that the data came with. Move images so that no two parts share a group, or put "
                "all into train: split.kind holdout and split.test_share draw whole groups.",
            )


def check_classes(parts: Mapping[str, Part], class_names: Sequence[str], origin: str) -> None:
    """Refuse data of one class, classes without an image to train on, and an empty test part. Raises DataError."""
    several = parts["train"].labels.ndim == 2
    present = np.unique(parts["train"].labels)
    if len(present) < 2 and not several:
        raise DataError(
            f"{origin}: one-class data: every training image is of class {class_names[int(present[0])]!r}.",
            "Add images of at least one more class.",
        )
    development = np.concatenate([part.labels for name, part in parts.items() if name != "test"])
    there = np.flatnonzero(development.any(axis=0)) if several else np.unique(development)
    lacking = [name for label, name in enumerate(class_names) if label not in there]
    if lacking:
        shown = ", ".join(map(repr, lacking[:5])) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
        raise DataError(
            f"{origin}: no image to train on is of class {shown}.",
            "Number the classes without gaps and give each an image.",
        )
    if not len(parts["test"].labels):
        raise DataError(f"{origin}: too few images to seal a test part away.", "Add images, or raise split.test_share.")


def digest_of(parts: Mapping[str, Part], ranges: Ranges) -> str:
    """SHA-256 over name, shape, pixels and labels of every part, as hexadecimal digits.

    Groups and ranges count where there are any, and other than those that each kind of pixel has always had.
    """
    digest = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        digest.update(f"{name} {part.images.shape}".encode())
        for chunk in part.images.chunks():
            digest.update(chunk.data)
        if part.labels.ndim == 2:
            digest.update(f"labels {part.labels.shape}".encode())
        digest.update(np.ascontiguousarray(part.labels, "<i8").data)
        if part.groups is not None:
            digest.update(b"groups")
            digest.update(part.groups.astype("<i8").data)
    if not plain(ranges):
        digest.update(json.dumps(sorted(ranges.items())).encode())
    return digest.hexdigest()
