"""A page is one file that needs nothing else and shows text as it reads."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from hpo.report.page import Html, escape, page, picture, table

PNG = b"\x89PNG\r\n\x1a\n"


class Tags(HTMLParser):
    """Fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_a_page_asks_nobody_for_anything() -> None:
    text = page("A & B", [("One", "<p>1</p>"), ("", "<p>2</p>"), ("Two", "<p>3</p>"), ("<Three>", picture(PNG, "x"))])
    tags = Tags(text)
    places = [value for _, attributes in tags.seen for name, value in attributes.items() if name in ("src", "href")]
    assert all(value is not None and value.startswith(("data:", "#")) for value in places)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not any(tag == "script" for tag, _ in tags.seen)
    anchors = {attributes["id"] for tag, attributes in tags.seen if tag == "section"}
    assert {value[1:] for value in places if value and value.startswith("#")} == anchors - {"s1"}
    assert "<title>A &amp; B</title>" in text
    assert "<h2>&lt;Three&gt;</h2>" in text


@pytest.mark.parametrize("rule", ["prefers-color-scheme: dark", "@media print", 'name="viewport"'])
def test_a_page_suits_night_paper_and_phone(rule: str) -> None:
    assert rule in page("", [])


def test_cells_are_escaped_unless_they_are_html() -> None:
    made = table(["a<b", ">n"], [["<i>", 3], [Html("<b>x</b>"), None]])
    assert "<th>a&lt;b</th>" in made
    assert '<th class="number">n</th>' in made
    assert '<td>&lt;i&gt;</td><td class="number">3</td>' in made
    assert "<td><b>x</b></td>" in made
    Tags(made)
    Tags(table((), [("label", 1)]))
    assert escape(escape("<&>")) == "&lt;&amp;&gt;"
    with pytest.raises(ValueError, match="zip"):
        table(["one"], [[1, 2]])


def test_pictures_say_what_they_are() -> None:
    assert 'src="data:image/png;base64,' in picture(PNG, "a")
    made = picture(b"<svg/>", 'say "x"', caption="<c>", width=90)
    assert 'src="data:image/svg+xml;base64,' in made
    assert 'alt="say &quot;x&quot;" width="90"' in made
    assert "<figcaption>&lt;c&gt;</figcaption>" in made


def test_text_of_others_neither_steers_nor_turns_a_page() -> None:
    text = page("\x1b[31mA\u202e", [("\x9bB", table(["\x00C"], [["\u2066D\x07"]]))])
    assert "<title>[31mA</title>" in text
    assert not set(text) & set("\x1b\u202e\x9b\x00\u2066\x07")
