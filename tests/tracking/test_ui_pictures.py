"""The MLflow UI in a real browser shows trials, curves and pictures, and asks no other machine for anything."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from PIL import Image

import tiny_study as tiny
from hpo.home import Home
from hpo.records import TrialState
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker
from hpo.tracking.ui import page_address, runs_address, ui_command
from ports import free_port, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"),
]
PATIENCE = 120_000  # ms
# The first cell of each row of the table, from top to bottom.
NAMES = """() => [...document.querySelectorAll('.ag-row [col-id="runName"], .ag-row a[href*="/runs/"]')]
    .filter(cell => cell.innerText.includes('·'))
    .map(cell => [cell.getBoundingClientRect().top, cell.innerText.trim()])
    .filter(([top]) => top > 0 && top < window.innerHeight)
    .sort((one, other) => one[0] - other[0]).map(([_, name]) => name)"""

# The headings of charts, such as train (3), from top to bottom.
SECTIONS = r"""() => [...new Set([...document.querySelectorAll('*')]
    .map(part => part.textContent.trim().match(/^([a-z/]+)\s*\(\d+\)$/))
    .filter(Boolean).map(found => found[1]))]"""


@contextmanager
def browsed(home: Home) -> Iterator[tuple[Any, int]]:
    """A page of Chromium and the port of the home's UI; at the end, no other machine was asked for anything."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    port, elsewhere = free_port(), []
    command, environment = ui_command(home, port=port)

    def judge(route: Any) -> None:
        if urlsplit(route.request.url).hostname in ("127.0.0.1", None):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    with subprocess.Popen(command, env=environment, cwd=home.root, start_new_session=True) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/", seconds=200)
            with sync_api.sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 1500, "height": 950})
                page.route("**/*", judge)
                yield page, port
                if target := os.environ.get("HPO_SCREENSHOT"):
                    page.screenshot(path=target)
                assert elsewhere == []
                browser.close()
        finally:
            os.killpg(process.pid, 15)


def test_trials_are_in_sight_sorted_by_value_and_curves_come_first(home: Home, tracker: Tracker) -> None:
    values = {0: 0.5, 1: 0.96, 2: 0.75, 3: 0.961}
    for number, value in values.items():
        tracker.start_trial(tiny.candidate(number), tiny.spec().setup, worker="w0")
        tracker.log_epochs(number, tiny.epochs(3))
        tracker.end_trial(tiny.result(number, value=value))
    tracker.start_trial(tiny.candidate(4), tiny.spec().setup, worker="w0")
    tracker.end_trial(tiny.result(4, TrialState.FAILED))
    ended = [tiny.trial(number, value=value) for number, value in values.items()]
    tracker.close_study(tiny.study(*ended), status="FINISHED", summary="# tiny")
    client = connect(home)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (best,) = client.search_runs([experiment], "tags.`hpo.trial` = '3'")
    with browsed(home) as (page, port):
        page.goto(page_address("127.0.0.1", port, runs_address(home, tiny.study())))
        expected = ["3 · 0.9610", "1 · 0.9600", "2 · 0.7500", "0 · 0.5000", "4 · failed"]
        listed = f"names => JSON.stringify([...new Set(({NAMES})())]) === names"
        page.wait_for_function(listed, arg=_json(expected), timeout=PATIENCE)
        text = page.inner_text("body")
        assert "Which rate is best?" in text
        assert {"objective", "training.optimizer.lr"} <= set(text.split())
        page.goto(page_address("127.0.0.1", port, f"#/experiments/{experiment}/runs/{best.info.run_id}/model-metrics"))
        page.wait_for_function(f"() => ({SECTIONS})().length >= 3", timeout=PATIENCE)
        assert page.evaluate(SECTIONS)[:3] == ["train", "valid", "valid/best"]


def test_picture_of_a_trial_is_seen_in_the_ui(home: Home, tracker: Tracker, folder: Path) -> None:
    Image.new("RGB", (321, 123), "red").save(folder / "curves.png")
    tracker.start_trial(tiny.candidate(0), tiny.spec().setup, worker="worker 0")
    tracker.end_trial(tiny.result(0))
    tracker.keep_model(0, folder)
    client = connect(home)
    (experiment,) = [each for each in client.search_experiments() if each.name == "tiny"]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`hpo.trial` = '0'")
    with browsed(home) as (page, port):
        place = f"experiments/{experiment.experiment_id}/runs/{run.info.run_id}/artifacts/report/curves.png"
        page.goto(f"http://127.0.0.1:{port}/#/{place}")
        seen = "[...document.images].some(image => image.naturalWidth === 321 && image.offsetWidth > 100)"
        page.wait_for_function(seen, timeout=PATIENCE)


def _json(names: list[str]) -> str:
    """The names as JavaScript's JSON.stringify writes them."""
    return json.dumps(names, ensure_ascii=False, separators=(",", ":"))
