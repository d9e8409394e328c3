"""A data set as a page: its parts, classes, sample images, channels and duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpo.records import DataCard
from hpo.report.page import Html, escape, page, picture, table
from hpo.report.text import counted, listed

_SHOWN_CONTRADICTIONS = 12


@dataclass(frozen=True)
class DataFacts:
    """A data set as a study or its publisher divides it. Of the test part, only image counts are included.

    counts maps train, valid (where there is one) and test to images of each class, in the order of data.class_names.
    mean and std have one value a channel over the training part, in [0, 1] as pixel / 255. copies maps a part to the
    number of its images that repeat an earlier one pixel by pixel. shared maps "train and valid" and so on to the
    number of images of the second part that are also in the first. contradictions are groups of development images
    with the same pixels and different labels, as (row, class name). samples maps a class to rows of random training
    images. split describes how train and validation were divided, near_duplicates how many images of a later part look
    nearly like one of an earlier part.
    """

    data: DataCard
    split: str
    counts: Mapping[str, tuple[int, ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    copies: Mapping[str, int]
    shared: Mapping[str, int]
    contradictions: tuple[tuple[tuple[int, str], ...], ...]
    samples: Mapping[str, tuple[int, ...]]
    near_duplicates: str = ""

    @property
    def totals(self) -> dict[str, int]:
        """Images of each part."""
        return {part: sum(counts) for part, counts in self.counts.items()}

    @property
    def pictured(self) -> tuple[int, ...]:
        """Rows of the development images that a page of these facts shows."""
        groups = self.contradictions[:_SHOWN_CONTRADICTIONS]
        return (*(row for rows in self.samples.values() for row in rows), *(group[0][0] for group in groups))


def data_page(facts: DataFacts, pictures: Mapping[int, bytes]) -> str:
    """The facts as one HTML file; pictures maps each row of facts.pictured to a PNG."""
    channels = f"{channel_table(facts.mean, facts.std)}<p>Over all pixels of the training part.</p>"
    sections = [
        ("Overview", _overview(facts)),
        ("Classes", _classes(facts)),
        ("Training images", _samples(facts, pictures)),
        ("Channels", channels),
        ("Duplicates", _duplicates(facts, pictures)),
    ]
    return page(f"Data set {facts.data.name}", sections)


def origin_rows(card: DataCard, near_duplicates: str) -> list[tuple[str, object]]:
    """Labels and values of a data set's images, files, source, licence and digest, and what is doubtful about them."""
    height, width, channels = card.image_shape
    return [
        ("size", f"{width} x {height} pixels, {counted(channels, 'channel')}"),
        *([("files", card.accounting)] if card.accounting else []),
        *([("pixels", card.pixel_ranges)] if card.pixel_ranges else []),
        *([("groups", f"{card.groups:,}, each in one part")] if card.groups else []),
        *([("near-duplicates", near_duplicates)] if near_duplicates else []),
        *(("warning", warning) for warning in card.warnings),
        ("source", f"{card.source} ({'the' if card.official else 'not the'} publisher's file)"),
        ("licence", card.licence or "not stated"),
        ("citation", card.citation or "not stated"),
        ("digest", Html(f"<code>{escape(card.digest)}</code>")),
    ]


def channel_table(mean: Sequence[float], std: Sequence[float]) -> Html:
    """Mean and standard deviation of each channel, both in [0, 1]."""
    named = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}
    names = named.get(len(mean), tuple(map(str, range(len(mean)))))
    rows = [
        (name, f"{m:.4f}", f"{s:.4f}", f"{255 * m:.1f}", f"{255 * s:.1f}")
        for name, m, s in zip(names, mean, std, strict=True)
    ]
    return table(("channel", ">mean", ">deviation", ">mean of 255", ">deviation of 255"), rows)


def _overview(facts: DataFacts) -> str:
    rows: list[tuple[str, object]] = [
        ("images", listed(f"{part} {count:,}" for part, count in facts.totals.items())),
        ("split", facts.split),
        ("classes", len(facts.data.class_names)),
    ]
    return table((), [*rows, *origin_rows(facts.data, facts.near_duplicates)])


def _classes(facts: DataFacts) -> str:
    totals = facts.totals
    shares = {part: [count / totals[part] for count in counts] for part, counts in facts.counts.items()}
    largest = max(shares["train"])
    head = ["class", *(f">{part}" for part in shares), "share of train"]
    rows = [
        [
            name,
            *(f"{counts[label]:,} ({shares[part][label]:.1%})" for part, counts in facts.counts.items()),
            Html(f'<span class="bar" style="width:{9 * shares["train"][label] / largest:.2f}rem"></span>'),
        ]
        for label, name in enumerate(facts.data.class_names)
    ]
    counts = facts.counts["train"]
    words = f"The largest class has {max(counts) / max(min(counts), 1):.1f} times the training images of the smallest."
    if len(shares) > 1:
        drift = max(max(part) - min(part) for part in zip(*shares.values(), strict=True))
        words += f" Between the parts, the share of a class differs by up to {100 * drift:.1f} points."
    return f"{table(head, rows)}<p>{words}</p>"


def _samples(facts: DataFacts, pictures: Mapping[int, bytes]) -> str:
    words = '<p class="dim">Drawn at random from the training part. The test part is sealed: it is never shown.</p>'
    return words + "".join(
        f"<h3>{escape(name)}</h3>{_strip(rows, name, pictures)}" for name, rows in facts.samples.items()
    )


def _strip(rows: Sequence[int], name: str, pictures: Mapping[int, bytes]) -> str:
    return f'<div class="strip">{"".join(picture(pictures[row], f"{name}, row {row}") for row in rows)}</div>'


def _duplicates(facts: DataFacts, pictures: Mapping[int, bytes]) -> str:
    totals = facts.totals
    within = [
        (f"{part} images that repeat an earlier one", f"{count:,}", f"{count / totals[part]:.2%}")
        for part, count in facts.copies.items()
    ]
    across = []
    for pair, count in facts.shared.items():
        first, _, second = pair.partition(" and ")
        across.append((f"{second} images that occur in {first}", f"{count:,}", f"{count / totals[second]:.2%}"))
    head = ("exactly the same pixels", ">images", ">share of the part")
    return f"{table(head, [*within, *across])}{_contradictions(facts, pictures)}"


def _contradictions(facts: DataFacts, pictures: Mapping[int, bytes]) -> str:
    groups = facts.contradictions
    if not groups:
        return "<p>No two images of train and validation have the same pixels and different labels.</p>"
    images = sum(map(len, groups))
    words = f"<h3>Same pixels, different labels</h3><p>{images:,} images of train and validation, in "
    words += counted(len(groups), "group")
    words += f"; the first {_SHOWN_CONTRADICTIONS}:" if len(groups) > _SHOWN_CONTRADICTIONS else ":"
    shown = "".join(
        picture(
            pictures[group[0][0]], "one of the group", caption=", ".join(f"{name} (row {row})" for row, name in group)
        )
        for group in groups[:_SHOWN_CONTRADICTIONS]
    )
    return f'{words}</p><div class="strip">{shown}</div>'
