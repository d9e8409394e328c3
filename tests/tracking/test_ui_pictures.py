"""The MLflow UI in a real browser shows the pictures of a trial, and asks no other machine for anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

import tiny_study
from hpo.home import Home
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker
from hpo.tracking.ui import ui_command
from ports import free_port, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_picture_of_a_trial_is_seen_in_the_ui(home: Home, tracker: Tracker, folder: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    Image.new("RGB", (321, 123), "red").save(folder / "curves.png")
    tracker.start_trial(tiny_study.candidate(0), tiny_study.spec().setup, worker="worker 0")
    tracker.end_trial(tiny_study.result(0))
    tracker.keep_model(0, folder)
    client = connect(home)
    (experiment,) = [each for each in client.search_experiments() if each.name == "tiny"]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`hpo.trial` = '0'")
    port = free_port()
    command, environment = ui_command(home, port=port)
    with subprocess.Popen(command, env=environment, cwd=home.root, start_new_session=True) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/", seconds=200)
            with sync_api.sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
                page = browser.new_page()
                elsewhere: list[str] = []

                def judge(route: object) -> None:
                    url = route.request.url  # type: ignore[attr-defined]
                    if urlsplit(url).hostname in ("127.0.0.1", None):
                        route.continue_()  # type: ignore[attr-defined]
                    else:
                        elsewhere.append(url)
                        route.abort()  # type: ignore[attr-defined]

                page.route("**/*", judge)
                place = f"experiments/{experiment.experiment_id}/runs/{run.info.run_id}/artifacts/report/curves.png"
                page.goto(f"http://127.0.0.1:{port}/#/{place}")
                seen = "[...document.images].some(image => image.naturalWidth === 321 && image.offsetWidth > 100)"
                page.wait_for_function(seen, timeout=120_000)
                if target := os.environ.get("HPO_SCREENSHOT"):
                    page.screenshot(path=target)
                assert elsewhere == []
                browser.close()
        finally:
            os.killpg(process.pid, 15)
