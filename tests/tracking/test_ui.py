from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

import tiny_study
from deadly_jobs import await_end, is_alive
from hpo.errors import HpoError
from hpo.home import Home
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker
from hpo.tracking.ui import runs_address, ui_command
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


def test_the_address_shows_the_trials_of_a_study_best_first(home: Home, tracker: Tracker) -> None:
    address = runs_address(home, tiny_study.study())
    assert address == "#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=trials-1"
    client = connect(home)
    view = json.loads(client.get_experiment("1").tags["mlflow.sharedViewState.trials-1"])
    assert view["selectedColumns"] == ["metrics.`objective`", "params.`training.optimizer.lr`"]
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`objective`", False)
    assert client.search_runs(["1"], view["searchFilter"]) == []
    tracker.start_trial(tiny_study.candidate(0), None, worker="w0")
    assert len(client.search_runs(["1"], view["searchFilter"], order_by=["metrics.`objective` DESC"])) == 1


def test_the_address_of_an_experiment_of_an_earlier_version_sorts_it_too(home: Home, tracker: Tracker) -> None:
    connect(home).delete_experiment_tag("1", "mlflow.sharedViewState.trials-1")
    words = dict(parse_qsl(runs_address(home, tiny_study.study()).partition("?")[2]))
    assert (words["orderByKey"], words["orderByAsc"]) == ("metrics.`objective`", "false")
    assert words["searchFilter"] == "tags.`hpo.kind` = 'trial' and tags.`hpo.study` = 'tiny'"
    assert runs_address(home, tiny_study.study(name="other")) == ""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc who is alive")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_ui_takes_its_server_along_and_ends_without_a_traceback(number: int, tmp_path: Path) -> None:
    """The server is a process that starts another one and does not hear SIGTERM."""
    server = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); time.sleep(600)"
    )
    code = (
        "import sys; from hpo.tracking import ui; ui._TO_END = 0.2;"
        "ui.ui_command = lambda home, **_: ([sys.executable, '-c', sys.argv[1]], None);"
        "sys.exit(ui.open_ui(None))"
    )
    command = [sys.executable, "-c", code, server]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shown:
        assert shown.stdout is not None
        child = int(shown.stdout.readline())
        assert is_alive(child)
        shown.send_signal(number)
        try:
            _, told = shown.communicate(timeout=60)
        finally:
            shown.kill()
    assert (shown.returncode, told) == (0, "")
    assert await_end(child)


@pytest.mark.slow
def test_the_ui_answers(home: Home) -> None:
    port = free_port()
    command, environment = ui_command(home, port=port)
    with subprocess.Popen(command, env=environment, cwd=home.root, start_new_session=True) as process:
        try:
            assert "<html" in wait_for(f"http://127.0.0.1:{port}/", seconds=200)
        finally:
            os.killpg(process.pid, 15)
