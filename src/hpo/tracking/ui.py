"""MLflow's own web page, on the right store, on this machine only."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from threading import Thread
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import ProxyHandler, build_opener

from hpo.database import reading
from hpo.errors import HpoError, shown_address
from hpo.home import Home
from hpo.records import StudyResult
from hpo.relocation import relocate
from hpo.tracking.run_metrics import OBJECTIVE
from hpo.tracking.runs import VIEW, trials_filter, view_key
from hpo.tracking.store import SETTINGS, exists, is_server

_TO_END = 5.0  # seconds that the server may take to end by itself
_POLL = 0.5  # seconds between two questions whether it answers


def ui_command(home: Home, *, host: str = "127.0.0.1", port: int = 5000) -> tuple[list[str], dict[str, str]]:
    """The command line of `mlflow ui` for a home, and its environment.

    Raises HpoError where there is no store yet, where a server holds it, or where the port is taken.
    """
    if is_server(home.tracking_uri):
        raise HpoError(
            f"MLFLOW_TRACKING_URI={shown_address(home.tracking_uri)}: a server holds this store.",
            "Open that address in a browser.",
        )
    if not exists(home):
        raise HpoError(
            f"{home.root}: there is no mlflow.db to show.",
            "Run a study first (hpo run digits-mlp), or give --home DIR.",
        )
    if moved := relocate(home):
        logging.getLogger("hpo").warning(moved)
    check_free(host, port)
    command = [sys.executable, "-m", "mlflow", "ui"]
    command += ["--default-artifact-root", home.artifacts.as_uri()] if home.embedded else []
    # One worker and no job runner: half the time to the first page, and nothing here needs more.
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    # The store goes by the environment: every user of the machine can read the words of a command.
    own = {"MLFLOW_BACKEND_STORE_URI": home.tracking_uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return command, {**SETTINGS, **os.environ, **own}


def runs_address(home: Home, study: StudyResult) -> str:
    """The part of an address of MLflow's UI after its root that shows a study's trials, best first; "" without any."""
    if is_server(home.tracking_uri):
        return ""
    view = f"{VIEW}{view_key(study)}"
    with reading(home.tracking_uri) as reader:
        if reader is None or not {"experiments", "experiment_tags"} <= reader.tables():
            return ""
        known = "SELECT experiment_id FROM experiments WHERE name = :name AND lifecycle_stage = 'active'"
        found = list(reader.rows(known, name=study.name))
        if not found:
            return ""
        number = found[0][0]
        tagged = "SELECT 1 FROM experiment_tags WHERE experiment_id = :id AND key = :key"
        shared = list(reader.rows(tagged, id=number, key=view))
    # MLflow takes a shared view or facets, not both; earlier versions have not written the view.
    facets = {
        "searchFilter": trials_filter(study),
        "orderByKey": f"metrics.`{OBJECTIVE}`",
        "orderByAsc": str(study.direction == "minimize").lower(),
    }
    shown = {"viewStateShareKey": view_key(study)} if shared else facets
    words = urlencode({"workflowType": "machine_learning", **shown}, quote_via=quote)
    return f"#/experiments/{number}/runs?{words}"


def is_local(host: str) -> bool:
    """Whether a server at host answers this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def open_ui(home: Home, *, host: str = "127.0.0.1", port: int = 5000, ready: Callable[[], None] = lambda: None) -> int:
    """Show the MLflow UI at http://host:port until Ctrl-C or SIGTERM; returns its exit code. Raises HpoError.

    ready is called, in a thread, once the server answers.
    """
    command, environment = ui_command(home, host=host, port=port)

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    # A group of its own: Ctrl-C reaches this process only, which ends all of the server, without its tracebacks.
    with subprocess.Popen(command, env=environment, process_group=0) as server:  # noqa: S603
        Thread(target=_await_answer, args=(server, page_address(host, port, "health"), ready), daemon=True).start()
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            _end_group(server)
            signal.signal(signal.SIGTERM, before)


def _name(host: str) -> str:
    """The host as addresses have it; a server on all addresses of a machine answers on its own."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]" if ":" in host else host


def page_address(host: str, port: int, page: str = "") -> str:
    """The address of a page of the UI, as runs_address gives it."""
    return f"http://{_name(host)}:{port}/{page}"


def _await_answer(server: subprocess.Popen[bytes], address: str, ready: Callable[[], None]) -> None:
    opener = build_opener(ProxyHandler({}))  # a proxy does not know this machine's addresses
    while server.poll() is None:
        with contextlib.suppress(OSError), opener.open(address, timeout=5):
            ready()
            return
        time.sleep(_POLL)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            server.wait(_TO_END)


def check_free(host: str, port: int) -> None:
    """Raise HpoError where a port is taken; it names the next free one."""
    if not _free(host, port):
        following = next((other for other in range(port + 1, 65536) if _free(host, other)), 0)
        raise HpoError(f"port {port} on {host} is in use.", f"Take the next free one: --port {following}")


def _free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            return False
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise HpoError(f"{host}:{port}: {error.strerror or error}.", "Give a host of this machine.") from None
    return True
