"""Self-contained HTML pages, for phones and paper, without requests; and the page of a data set."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape as _escape

from hpo.errors import clean
from hpo.records import DataCard
from hpo.report.text import counted, groups_row, listed, without_folders

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --line: #d5dae0; --paper: #ffffff; --tint: #f4f6f8;
  --link: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --dim: #9aa4af; --line: #3a424b; --paper: #15191e;
  --tint: #1f252b; --link: #7ab8ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .5rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; }
p { max-width: 46rem; }
.dim { color: var(--dim); }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
th.number, td.number { text-align: right; white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
code, pre { font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
pre { background: var(--tint); padding: .75rem 1rem; border-radius: 6px; overflow-x: auto; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; border-radius: 4px; }
figcaption { color: var(--dim); font-size: .9rem; }
.bar { display: inline-block; height: .7rem; background: var(--link); border-radius: 2px; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; }
.strip figure { margin: 0; max-width: 11rem; }
.strip img { width: 4.5rem; image-rendering: pixelated; background: none; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
.answer { font-size: 1.12rem; }
.tall { max-height: 34rem; overflow: auto; } .tall table { font-size: .84rem; }
.tall th, .tall td { padding-right: .7rem; }
.tall th { white-space: normal; vertical-align: bottom; position: sticky; top: 0; background: var(--paper); }
.sortable th button { all: unset; cursor: pointer; }
.sortable th button:focus-visible { outline: 2px solid var(--link); }
.sortable th[aria-sort=ascending] button::after { content: " ▲"; }
.sortable th[aria-sort=descending] button::after { content: " ▼"; }
/* On a phone nothing scrolls sideways: words break, and the rows of wide tables are paragraphs with named values. */
@media screen and (max-width: 40rem) {
  th, td, th.number, td.number { white-space: normal; overflow-wrap: anywhere; padding-right: .6rem; }
  .number, .facts th { overflow-wrap: normal !important; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .tall { max-height: none; }
  .cards, .cards thead, .cards tbody { display: block; }
  .cards:not(.sortable) thead { display: none; }
  .cards tr { display: flex; flex-wrap: wrap; gap: 0 .9rem; padding: .35rem 0; border-bottom: 1px solid var(--line); }
  .cards th, .cards td, .cards td.number { border: 0; padding: 0; text-align: left; }
  .cards td:empty { display: none; }
  .cards td::before { content: attr(data-name) " "; color: var(--dim); }
}
@media print { :root { color-scheme: light; --ink: #000; --dim: #444; --line: #bbb; --paper: #fff; --tint: #f4f4f4;
  --link: #000; } body { max-width: none; padding: 0; font-size: 10.5pt; } nav { display: none; }
  h2, h3 { break-after: avoid; } figure, tr, pre { break-inside: avoid; } .scroll { overflow: visible; } }
"""


class Html(str):
    """Text that is HTML already, which table() and escape() do not change."""

    __slots__ = ()


def escape(value: object) -> Html:
    """value as HTML text; Html is not changed."""
    return value if isinstance(value, Html) else Html(_escape(str(value)))


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole HTML file: the title, links to the sections, and each section's heading above its body.

    Title and headings are plain text, bodies are HTML. A section without a heading is not linked.
    """
    headed = [(number, heading) for number, (heading, _) in enumerate(sections) if heading]
    links = "".join(f'<a href="#s{number}">{escape(heading)}</a>' for number, heading in headed)
    nav = f"<nav>{links}</nav>\n" if len(headed) > 2 else ""
    body = "".join(
        f'<section id="s{number}">\n{f"<h2>{escape(heading)}</h2>" if heading else ""}\n{content}\n</section>\n'
        for number, (heading, content) in enumerate(sections)
    )
    # The empty icon prevents a request for one.
    return clean(
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{nav}{body}</body>\n</html>\n"
    )


_MOST_COLUMNS = 3  # that a phone shows next to each other


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, sortable: bool = False) -> Html:
    """Rows below their column names, escaped except Html; a name that begins with > is of a column of numbers.

    On a phone, rows of more than three columns become paragraphs of named values. Without names (an empty head) the
    first column is the rows' labels. A script of the page makes sortable ones sort by a column.
    """
    names = list(map(str, head))
    wide = sortable or len(names) > _MOST_COLUMNS
    kinds = [' class="number"' if name.startswith(">") else "" for name in names]
    labels = [f' data-name="{escape(name.removeprefix(">"))}"' if wide else "" for name in names]
    top = "".join(f"<th{kind}>{escape(name.removeprefix('>'))}</th>" for kind, name in zip(kinds, names, strict=True))

    def cells(row: Sequence[object]) -> str:
        if not names:
            return f"<th>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        cells = zip(kinds, labels, row, strict=True)
        return "".join(f"<td{kind}{label}>{escape(cell)}</td>" for kind, label, cell in cells)

    body = "".join(f"<tr>{cells(row)}</tr>\n" for row in rows)
    thead = f"<thead><tr>{top}</tr></thead>\n" if names else ""
    kind = ("sortable " if sortable else "") + ("cards" if wide else "") if names else "facts"
    kind = f' class="{kind}"' if kind else ""
    return Html(
        f'<div class="{"tall" if sortable else "scroll"}"><table{kind}>\n{thead}<tbody>\n{body}</tbody>\n</table></div>'
    )


def picture(image: bytes, alt: str, *, caption: str = "", width: int | None = None) -> Html:
    """PNG or SVG bytes inside the page; alt is its text alternative, width is in CSS pixels."""
    kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
    data = base64.b64encode(image).decode("ascii")
    size = f' width="{width}"' if width else ""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f'<figure><img alt="{escape(alt)}"{size} src="data:image/{kind};base64,{data}">{words}</figure>')


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
    nearly like one of an earlier part. groups_declared is declares_groups of the study.
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
    groups_declared: bool = False

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


def origin_rows(card: DataCard, near_duplicates: str, *, groups_declared: bool = False) -> list[tuple[str, object]]:
    """Labels and values of a data set's images, files, source, licence and digest, and what is doubtful about them."""
    height, width, channels = card.image_shape
    source = without_folders(card.source, card.source)
    return [
        ("size", f"{width} x {height} pixels, {counted(channels, 'channel')}"),
        *([("files", card.accounting)] if card.accounting else []),
        *([("pixels", card.pixel_ranges)] if card.pixel_ranges else []),
        *groups_row(card, declared=groups_declared),
        *([("near-duplicates", near_duplicates)] if near_duplicates else []),
        *(("warning", without_folders(warning, card.source)) for warning in card.warnings),
        ("source", f"{source} ({'the' if card.official else 'not the'} publisher's file)"),
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
    return table((), [*rows, *origin_rows(facts.data, facts.near_duplicates, groups_declared=facts.groups_declared)])


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
