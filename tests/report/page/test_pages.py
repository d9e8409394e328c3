"""Pages in a real browser: drawn without errors, requests or overflow, in light and dark, on a phone and on paper."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import page_findings as told
from hpo.report.study_page import study_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@dataclass
class Seen:
    """A page, what its console said, and which requests it made beyond its own file."""

    page: Any
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        # Tests often run as root in a container, where Chromium cannot make its sandbox.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "crowded.html"
    path.write_text(study_page(told.crowded()), encoding="utf-8")
    return path


@pytest.fixture
def see(browser: Any) -> Iterator[Any]:
    contexts = []

    def see(path: Path, *, width: int = 1100, scheme: str = "light") -> Seen:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        seen = Seen(context.new_page())

        def judge(route: Any) -> None:
            url = route.request.url
            if url == path.as_uri() or url.startswith(("data:", "blob:")):
                route.continue_()
            else:
                seen.requests.append(url)
                route.abort()

        seen.page.route("**/*", judge)
        seen.page.on("console", lambda message: seen.said.append(f"{message.type}: {message.text}"))
        seen.page.on("pageerror", lambda error: seen.said.append(str(error)))
        seen.page.goto(path.as_uri())
        seen.page.wait_for_selector("body[data-drawn]", timeout=60_000)
        return seen

    yield see
    for context in contexts:
        context.close()


LOOKS = [(1100, "light"), *(pytest.param(*look, marks=pytest.mark.slow) for look in ((1100, "dark"), (390, "light")))]


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_page_is_drawn_whole_without_errors_requests_or_overflow(
    see: Any, crowded: Path, width: int, scheme: str
) -> None:
    seen = see(crowded, width=width, scheme=scheme)
    assert seen.said == []
    assert seen.requests == []
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    charts = seen.page.locator(".drawn svg")
    assert charts.count() == int(seen.page.locator("body").get_attribute("data-drawn"))
    shown = "[...document.querySelectorAll('.drawn svg')].filter(chart => chart.getBoundingClientRect().width).length"
    assert seen.page.evaluate(shown) == 16
    assert seen.page.locator("[data-trial]").count() > 60
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt)"
    assert seen.page.evaluate(broken) == []
    assert seen.page.evaluate("document.images.length") > 20


def test_on_a_phone_nothing_scrolls_sideways_and_figures_can_be_read(see: Any, crowded: Path) -> None:
    page = see(crowded, width=390).page
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    scrolls = "[...document.querySelectorAll('body *')].filter(e => !e.closest('svg') && e.scrollWidth > 390)"
    assert page.evaluate(f"{scrolls}.map(e => e.outerHTML.slice(0, 80))") == []
    inside = """[...document.querySelectorAll('.scroll, .tall, pre')].filter(e => e.scrollWidth > e.clientWidth + 1)
        .map(e => e.textContent.slice(0, 80))"""
    assert page.evaluate(inside) == []
    # The text of the history, which is not bound to the number of classes, is at least as large as 8 pixels.
    history = page.locator(".small svg[aria-label='Optimisation history']").bounding_box()
    assert history["width"] > 340


def test_the_table_of_trials_is_sorted_by_the_column_that_is_clicked(see: Any, crowded: Path) -> None:
    page = see(crowded).page

    def column(name: str) -> list[str]:
        return page.locator(f".sortable td[data-name='{name}']").all_text_contents()

    head = page.locator(".sortable th", has_text="validation accuracy").locator("button")
    head.click()
    values = [float(value) for value in column("validation accuracy") if value]
    assert values == sorted(values, reverse=True)
    assert not any(column("validation accuracy")[len(values) :])  # those without a value are last
    assert "▼" in page.evaluate("getComputedStyle(document.querySelector('[aria-sort] button'), '::after').content")
    head.click()
    assert [float(value) for value in column("validation accuracy") if value] == sorted(values)
    page.locator(".sortable th", has_text="activation").locator("button").click()
    assert column("activation") == sorted(column("activation"))
    page.locator(".sortable th", has_text="trial").first.locator("button").click()
    assert column("trial") == [str(number) for number in reversed(range(60))]


def test_pointing_at_a_trial_describes_it_and_marks_it_in_every_figure(see: Any, crowded: Path) -> None:
    page = see(crowded).page
    point = page.locator(".large svg[aria-label='Optimisation history'] [data-trial='0']")
    point.scroll_into_view_if_needed()
    box = point.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator("#tip:visible").wait_for(timeout=10_000)
    shown = page.locator("#tip").text_content()
    assert "trial 0" in shown
    assert "lr = " in shown
    assert "5 epochs" in shown
    marked = "[...document.querySelectorAll('.drawn .lit')].map(mark => mark.closest('svg').getAttribute('aria-label'))"
    assert {"Optimisation history", "Parallel coordinates", "Learning curves"} <= set(page.evaluate(marked))


@pytest.mark.slow
def test_charts_follow_the_colour_scheme_and_paper(see: Any, crowded: Path) -> None:
    page = see(crowded).page
    filters = "getComputedStyle(document.querySelector('.lines .large svg')).filter"
    assert page.evaluate(filters) == "none"
    page.emulate_media(color_scheme="dark")
    assert "invert" in page.evaluate(filters)
    page.emulate_media(color_scheme="dark", media="print")
    assert page.evaluate(filters) == "none"


@pytest.mark.slow
def test_printed_page_fits_its_paper(see: Any, crowded: Path) -> None:
    page = see(crowded, width=718).page  # A4 without its margins
    page.emulate_media(media="print")
    page.wait_for_timeout(500)
    wide = "[...document.querySelectorAll('img, .drawn svg')].filter(e => e.getBoundingClientRect().right > 719).length"
    assert page.evaluate(wide) == 0


@pytest.mark.slow
def test_page_without_any_trial_is_drawn_too(see: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.html"
    path.write_text(study_page(told.findings()), encoding="utf-8")
    seen = see(path, width=390)
    assert (seen.said, seen.requests) == ([], [])
    assert seen.page.evaluate("document.documentElement.scrollWidth") == 390
