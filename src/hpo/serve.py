"""Serve a model over HTTP: MLflow's own scoring server, and a page to drop an image on."""

from __future__ import annotations

import asyncio
import html
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from hpo.errors import HpoError
from hpo.predict import Classifier, predict_files
from hpo.tracking.store import load_mlflow
from hpo.tracking.ui import check_free, is_local, page_address

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

_MOST_BYTES = 50_000_000  # of a request
_PAGE = Path(__file__).with_name("serve.html")


class _Scored:
    """A classifier as MLflow's scoring server wants its models; one request at a time."""

    def __init__(self, model: Classifier) -> None:
        from mlflow.types import Schema, TensorSpec

        self._model = model
        self._lock = threading.Lock()  # a program may be a process, which answers one question after the other
        images = TensorSpec(np.dtype(model.input_kind), (-1, *model.image_shape))
        self.metadata = SimpleNamespace(get_input_schema=lambda: Schema([images]), signature=None)

    def predict(self, data: Any, params: Any = None) -> Any:  # noqa: ARG002 - MLflow hands them on
        """Images (n, height, width, channels) -> a data frame of probabilities, one column a class."""
        import pandas

        with self._lock:
            return pandas.DataFrame(self._model.predict_proba(np.asarray(data)), columns=self._model.class_names)

    def classify(self, content: bytes) -> dict[str, Any]:
        """The row of `hpo predict` for the bytes of an image file; with `error` where they are none."""
        with tempfile.TemporaryDirectory() as folder, self._lock:
            file = Path(folder) / "image"
            file.write_bytes(content)
            (row,) = predict_files(self._model, [file])
        if "error" in row:
            row["error"] = row["error"].replace(str(file), "the file")
        return {key: value for key, value in row.items() if key != "file"}


def application(model: Classifier, *, title: str, address: str, host: str) -> FastAPI:
    """The web application: / is the page, /image takes the bytes of an image file, the rest is MLflow's.

    MLflow's are /invocations, /ping, /health and /version. No page of others in a browser reaches it: where host is of
    this machine only, other names of it are refused, and everywhere requests whose Origin is another host. Bodies of
    more than 50 MB are refused, too, and those that do not say how long they are.
    """
    load_mlflow()
    from fastapi import Request
    from fastapi.responses import HTMLResponse, JSONResponse
    from mlflow.pyfunc import scoring_server
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    scored = _Scored(model)
    app: FastAPI = scoring_server.init(scored)
    if is_local(host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", host])

    async def guard(request: Any, call_next: Any) -> Any:
        headers = request.headers
        if "origin" in headers and urlsplit(headers["origin"]).netloc.lower() != headers.get("host", "").lower():
            return JSONResponse({"error": "requests of pages of other hosts are refused"}, 403)
        if "transfer-encoding" in headers:
            return JSONResponse({"error": "a body needs a Content-Length"}, 411)
        if int(headers.get("content-length", 0)) > _MOST_BYTES:
            return JSONResponse({"error": f"more than {_MOST_BYTES:,} bytes"}, 413)
        return await call_next(request)

    app.middleware("http")(guard)
    page = _page(model, title, address)

    async def show() -> HTMLResponse:
        return HTMLResponse(page)

    async def image(request: Request) -> JSONResponse:
        try:
            row = await asyncio.to_thread(scored.classify, await request.body())
        except HpoError as error:
            return JSONResponse({"error": f"{error.message} {error.hint}"}, 500)
        return JSONResponse(row, 422 if "error" in row else 200)

    # Annotations are text in this module, and FastAPI would look for them among its globals.
    image.__annotations__ = {"request": Request}
    app.get("/", include_in_schema=False, response_model=None)(show)
    app.post("/image", response_model=None)(image)
    return app


def _page(model: Classifier, title: str, address: str) -> str:
    height, width, channels = model.image_shape
    names = ", ".join(model.class_names[:12]) + (", ..." if len(model.class_names) > 12 else "")
    kind = {1: "grey", 3: "colour"}.get(channels, f"of {channels} channels")
    words = (
        f"{len(model.class_names)} classes: {names}. Images of any size are made {kind} and {width} x {height} pixels."
    )
    text = _PAGE.read_text(encoding="utf-8")
    for place, value in {"title": title, "words": words, "address": address}.items():
        text = text.replace(f"{{{place}}}", html.escape(value))
    return text


def serve(model: Classifier, *, title: str, host: str, port: int, ready: Callable[[], None] = lambda: None) -> None:
    """Serve a model at http://host:port until Ctrl-C or SIGTERM. Raises HpoError where the port is taken.

    ready is called once the server answers.
    """
    import uvicorn

    check_free(host, port)
    app = application(model, title=title, address=page_address(host, port), host=host)
    server = uvicorn.Server(uvicorn.Config(app, host=host, port=port, log_level="warning"))

    async def run() -> None:
        begun = asyncio.create_task(server.serve())
        while not (server.started or begun.done()):
            await asyncio.sleep(0.05)
        if server.started:
            ready()
        await begun

    try:
        asyncio.run(run())
    except SystemExit:
        raise HpoError(f"{host}:{port}: the server did not start.", "Take another port: --port N") from None
