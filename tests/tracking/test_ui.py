from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from hpo.errors import HpoError
from hpo.home import Home
from hpo.tracking.ui import ui_command
from ports import free_port, wait_for


@pytest.fixture
def taken() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_the_ui_shows_this_home_on_this_machine_only(home: Home) -> None:
    command, environment = ui_command(home, port=free_port())
    text = " ".join(command)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == home.tracking_uri
    assert f"--default-artifact-root {home.artifacts.as_uri()}" in text
    assert "--host 127.0.0.1" in text
    assert environment["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_port_in_use_is_told_with_the_next_free_one(home: Home, taken: int) -> None:
    with pytest.raises(HpoError, match=f"port {taken} on 127.0.0.1 is in use") as error:
        ui_command(home, port=taken)
    following = int(error.value.hint.split()[-1])
    assert following > taken
    ui_command(home, port=following)


def test_without_a_store_there_is_nothing_to_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(HpoError, match=r"no mlflow\.db to show"):
        ui_command(Home.find(tmp_path))


def test_a_server_is_opened_in_the_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example:5000")
    with pytest.raises(HpoError, match="Open that address in a browser"):
        ui_command(Home.find(tmp_path))


@pytest.mark.slow
def test_the_ui_answers(home: Home) -> None:
    port = free_port()
    command, environment = ui_command(home, port=port)
    with subprocess.Popen(command, env=environment, cwd=home.root, start_new_session=True) as process:
        try:
            assert "<html" in wait_for(f"http://127.0.0.1:{port}/", seconds=200)
        finally:
            os.killpg(process.pid, 15)
