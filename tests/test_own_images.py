"""A folder of one's own images becomes a promoted, served model in three commands, and its page shows a class."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from hpo.spec.load import load_study
from ports import free_port, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_three_commands_from_a_folder_to_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_digits()
    for number, (image, label) in enumerate(zip(found.images[:600], found.target[:600], strict=True)):
        place = tmp_path / "photos" / f"digit {label}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * (255 / 16)).astype(np.uint8)).save(place / f"{number}.png")
    environment = {**os.environ, "HPO_DATA": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    environment.pop("HPO_HOME", None)

    def hpo(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "hpo", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    # A long budget and the fewest trials: the run must end by itself, however busy the machine is.
    words = ("--preset", "quick", "--minutes", "0.5", "--timeout", "20m", "--device", "cpu", "--weights", "none")
    said = hpo("run", "photos", *words)
    assert "nearest neighbours" in said  # why it is as it is
    monkeypatch.chdir(tmp_path)
    spec = load_study("photos")
    assert spec.final is not None
    assert "studies/photos.yaml is there already" in hpo("run", "photos", *words)
    assert "is now champion" in hpo("promote", "photos")
    port = free_port()
    server = [sys.executable, "-m", "hpo", "serve", "photos@champion", "--port", str(port), "--no-browser"]
    with subprocess.Popen(server, cwd=tmp_path, env=environment) as process:
        try:
            page = wait_for(f"http://127.0.0.1:{port}/", seconds=300)
            assert "photos@champion" in page
            if CHROMIUM is not None:
                _look(f"http://127.0.0.1:{port}/", next((tmp_path / "photos" / "digit 0").iterdir()))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _look(address: str, photo: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address, timeout=120_000)
        page.set_input_files("#file", photo)
        page.wait_for_function("document.getElementById('rows').rows.length == 10", timeout=120_000)
        assert page.inner_text("#answer").startswith("digit ")
        browser.close()
