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
from typing import Any

from hpo.errors import HpoError, shown_address
from hpo.home import Home
from hpo.relocation import relocate
from hpo.tracking.store import SETTINGS, exists, is_server

_TO_END = 5.0  # seconds that the server may take to end by itself


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
    if not _free(host, port):
        following = next((other for other in range(port + 1, 65536) if _free(host, other)), 0)
        raise HpoError(f"port {port} on {host} is in use.", f"Take the next free one: --port {following}")
    command = [sys.executable, "-m", "mlflow", "ui"]
    command += ["--default-artifact-root", home.artifacts.as_uri()] if home.embedded else []
    # One worker and no job runner: half the time to the first page, and nothing here needs more.
    command += ["--host", host, "--port", str(port), "--workers", "1"]
    # The store goes by the environment: every user of the machine can read the words of a command.
    own = {"MLFLOW_BACKEND_STORE_URI": home.tracking_uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return command, {**SETTINGS, **os.environ, **own}


def is_local(host: str) -> bool:
    """Whether a server at host answers this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def open_ui(home: Home, *, host: str = "127.0.0.1", port: int = 5000) -> int:
    """Show the MLflow UI at http://host:port until Ctrl-C or SIGTERM; returns its exit code. Raises HpoError."""
    command, environment = ui_command(home, host=host, port=port)

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    # A group of its own: Ctrl-C reaches this process only, which ends all of the server, without its tracebacks.
    with subprocess.Popen(command, env=environment, process_group=0) as server:  # noqa: S603
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            _end_group(server)
            signal.signal(signal.SIGTERM, before)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            server.wait(_TO_END)


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
