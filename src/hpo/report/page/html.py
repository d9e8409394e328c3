"""Parts of a self-contained HTML page: light and dark, for phones and paper, without requests."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape as _escape

from hpo.errors import clean

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


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """Rows below their column names, escaped except Html; a name that begins with > is of a column of numbers.

    Wide tables scroll sideways on a phone. Without names (an empty head) the first column is the rows' labels.
    """
    names = list(map(str, head))
    kinds = [' class="number"' if name.startswith(">") else "" for name in names]
    top = "".join(f"<th{kind}>{escape(name.removeprefix('>'))}</th>" for kind, name in zip(kinds, names, strict=True))

    def cells(row: Sequence[object]) -> str:
        if not names:
            return f"<th>{escape(row[0])}</th>" + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        return "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells(row)}</tr>\n" for row in rows)
    thead = f"<thead><tr>{top}</tr></thead>\n" if names else ""
    kind = "" if names else ' class="facts"'
    return Html(f'<div class="scroll"><table{kind}>\n{thead}<tbody>\n{body}</tbody>\n</table></div>')


def picture(image: bytes, alt: str, *, caption: str = "", width: int | None = None) -> Html:
    """PNG or SVG bytes inside the page; alt is its text alternative, width is in CSS pixels."""
    kind = "png" if image.startswith(b"\x89PNG") else "svg+xml"
    data = base64.b64encode(image).decode("ascii")
    size = f' width="{width}"' if width else ""
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f'<figure><img alt="{escape(alt)}"{size} src="data:image/{kind};base64,{data}">{words}</figure>')
