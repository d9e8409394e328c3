"""A served model answers image files as `hpo predict` does, MLflow's requests as MLflow does, and has a page."""

from __future__ import annotations

import asyncio
import http.client
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from hpo.predict import load_model, predict_files
from ports import free_port, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photo(finished: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(finished / "photo.png")
    return finished / "photo.png"


@pytest.fixture(scope="module")
def address(finished: Path) -> Iterator[str]:
    """A server as a user starts it."""
    port = free_port()
    words = [sys.executable, "-m", "hpo", "serve", "digits-mlp", "--port", str(port), "--no-browser"]
    with subprocess.Popen(words, cwd=finished, env={**os.environ, "HPO_HOME": str(finished)}) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/ping", seconds=120)
            yield f"http://127.0.0.1:{port}/"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def ask(address: str, content: bytes, **headers: str) -> Any:
    request = urllib.request.Request(address, content, headers, method="POST")  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return json.load(answer)


def test_an_image_file_is_answered_as_by_predict(address: str, photo: Path, finished: Path) -> None:
    (expected,) = predict_files(load_model("digits-mlp", home=finished), [photo])
    found = ask(f"{address}image", photo.read_bytes())
    assert found["class"] == expected["class"]
    assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)


def test_what_is_no_image_is_an_error_with_its_reason(address: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(f"{address}image", b"no image")
    assert caught.value.code == 422
    assert "not an image that can be read" in json.load(caught.value)["error"]


def test_requests_of_mlflow_are_answered_as_by_mlflow(address: str, finished: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    content = json.dumps({"inputs": images.tolist()}).encode()
    found = ask(f"{address}invocations", content, **{"Content-Type": "application/json"})["predictions"]
    expected = load_model("digits-mlp", home=finished).predict_proba(images)
    assert [*found[0]] == [str(number) for number in range(10)]
    np.testing.assert_allclose([[*row.values()] for row in found], expected, atol=1e-6)


def test_a_page_of_others_does_not_reach_it_by_another_name(address: str) -> None:
    request = urllib.request.Request(address, headers={"Host": "elsewhere.example"})  # noqa: S310
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)  # noqa: S310
    assert caught.value.code == 400


def test_pages_of_others_and_bodies_that_are_too_long_are_refused_on_every_path(address: str, photo: Path) -> None:
    own, content = address.rstrip("/"), photo.read_bytes()
    assert "class" in ask(f"{address}image", content, Origin=own)
    for path in ("image", "invocations"):
        for origin in ("http://elsewhere.example", "null", own.replace("127.0.0.1", "localhost")):
            with pytest.raises(urllib.error.HTTPError) as caught:
                ask(f"{address}{path}", content, Origin=origin)
            assert caught.value.code == 403
        for header, status in ((("Content-Length", "50000001"), 413), (("Transfer-Encoding", "chunked"), 411)):
            place = http.client.HTTPConnection(str(urlsplit(address).netloc), timeout=60)
            place.putrequest("POST", f"/{path}")
            place.putheader("Content-Type", "application/json")
            place.putheader(*header)
            place.endheaders()
            with place.getresponse() as answer:
                assert answer.status == status
            place.close()


def test_it_answers_at_the_address_that_it_was_given(finished: Path) -> None:
    from hpo.serve import application

    model = load_model("digits-mlp", home=finished)
    app: Any = application(model, title="t", address="http://127.0.0.2:5001/", host="127.0.0.2")

    async def status(host: str) -> int:
        sent: list[Any] = []
        scope = {"type": "http", "method": "GET", "path": "/ping", "query_string": b"", "http_version": "1.1"}
        scope |= {"scheme": "http", "raw_path": b"/ping", "root_path": "", "headers": [(b"host", host.encode())]}

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(status("127.0.0.2:5001")) == 200
    assert asyncio.run(status("localhost:5001")) == 200
    assert asyncio.run(status("elsewhere.example")) == 400


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_an_image_is_dropped_on_the_page_and_its_class_shown(address: str, photo: Path, finished: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    (expected,) = predict_files(load_model("digits-mlp", home=finished), [photo])
    elsewhere, faults, missing = [], [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 400, "height": 800})
        page.on("request", lambda request: elsewhere.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("response", lambda answer: missing.append(answer.url) if answer.status == 404 else None)
        page.goto(address)
        page.evaluate(
            """bytes => {
                const files = new DataTransfer();
                files.items.add(new File([new Uint8Array(bytes)], "photo.png", {type: "image/png"}));
                document.getElementById("drop").dispatchEvent(
                    new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
            }""",
            list(photo.read_bytes()),
        )
        page.wait_for_function("document.getElementById('rows').rows.length > 0", timeout=60_000)
        assert page.inner_text("#answer").startswith(f"{expected['class']} (")
        assert page.locator("#rows tr").count() == 10
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        boxes = [page.locator(each).bounding_box() for each in ("h1", "h1 + p", "#drop", "#shown", "#answer", "#rows")]
        for upper, lower in itertools.pairwise(filter(None, boxes)):
            assert upper["y"] + upper["height"] <= lower["y"], "the parts of the page lie below each other"
        page.set_input_files("#file", files=[{"name": "x.png", "mimeType": "image/png", "buffer": _noise()}])
        page.wait_for_function("document.getElementById('answer').className == 'error'", timeout=60_000)
        assert "not an image" in page.inner_text("#answer")
        browser.close()
    assert faults == missing == []
    assert {urlsplit(url).hostname for url in elsewhere if not url.startswith("blob:")} == {"127.0.0.1"}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_an_answer_of_several_labels_has_no_one_percentage(photo: Path, finished: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    import uvicorn

    from hpo.serve import application

    model = replace(load_model("digits-mlp", home=finished), several_labels=True)
    (expected,) = predict_files(model, [photo])
    port = free_port()
    app = application(model, title="t", address=f"http://127.0.0.1:{port}/", host="127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", seconds=60)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}/")
            page.set_input_files("#file", str(photo))
            page.wait_for_function("document.getElementById('rows').rows.length > 0", timeout=60_000)
            assert page.inner_text("#answer") == expected["class"]
            assert page.inner_text("#rows tr:first-child td.number").endswith(" %")
            browser.close()
    finally:
        server.should_exit = True
        thread.join(30)


def _noise() -> bytes:
    return io.BytesIO(b"noise").getvalue()
