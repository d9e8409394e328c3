"""Stores that go away under a running study: nothing is lost, and one clear message says what happened."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpo.home import Home
from hpo.records import TrialState
from hpo.storage.reader import read_study

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

HPO = [sys.executable, "-m", "hpo"]
QUICK = ["--set", "search.pruner=none", "--set", "search.sampler=random", "--workers", "1", "--json"]
EPOCHS = 8


class Proxy:
    """Stands before a server: refuses, delays, or loses the answers of connections."""

    def __init__(self, target: int) -> None:
        self.target, self.delay, self.lose = target, 0.0, 0
        self._listener: socket.socket | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.up()

    def up(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()

    def down(self) -> None:
        assert self._listener is not None
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._join, args=(client, listener), daemon=True).start()

    def _join(self, client: socket.socket, listener: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self.target)) as server:
            threading.Thread(target=self._pump, args=(client, server, listener), daemon=True).start()
            while data := server.recv(1 << 16):
                time.sleep(self.delay)
                if self.lose:  # the server has done what was asked
                    self.lose -= 1
                    break
                if listener.fileno() < 0:
                    break
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while listener.fileno() >= 0 and (data := source.recv(1 << 16)):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


class Server:
    """An MLflow server that keeps the artifacts too, to be killed and started again at the same port."""

    def __init__(self, place: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._place = place
        self._process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri"]
        command += [f"sqlite:///{self._place / 'mlflow.db'}", "--artifacts-destination", str(self._place / "artifacts")]
        command += ["--port", str(self.port), "--workers", "1"]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment = {**os.environ, **quiet}
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd=self._place,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            time.sleep(0.5)
        raise AssertionError("the server does not answer")

    def kill(self) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    proxy = Proxy(server.port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.port}")
    return proxy


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits_cache: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder


class Running:
    """`hpo run` in a process of its own, and its events so far."""

    def __init__(self, study: str, *, trials: int, options: tuple[str, ...] = ()) -> None:
        path = Path(f"{study}.yaml")
        if not path.exists():
            space = {"training.optimizer.lr": {"float": [1e-3, 1e-1], "log": True}}
            spec = {
                "name": study,
                "data": {"name": "digits"},
                "split": {"kind": "holdout"},
                "model": {"kind": "mlp", "hidden": 64},
                "training": {"epochs": EPOCHS, "patience": None},
                "search": {"space": space, "trials": 50},
            }
            path.write_text(json.dumps(spec), encoding="utf-8")
        command = [*HPO, "run", str(path), "--trials", str(trials), *QUICK, *options]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.events: list[dict] = []

    def wait_for(self, event: str, text: str = "", count: int = 1) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event and text in line:
                count -= 1
                if not count:
                    return
        raise AssertionError(f"no {event} {text}: {self.end()}")

    def end(self, code: int | None = None) -> str:
        out, err = self.process.communicate(timeout=300)
        self.events += [json.loads(line) for line in out.splitlines()]
        assert code is None or self.process.returncode == code, (self.process.returncode, err, self.notices)
        assert "Traceback" not in err
        return err

    @property
    def notices(self) -> list[str]:
        return [event["text"] for event in self.events if event["event"] == "notice"]

    @property
    def model(self) -> dict | None:
        return self.events[-1].get("model")


def told(running: Running, words: str) -> int:
    return sum(words in text for text in running.notices)


def check_all_is_there_once(project: Path, name: str, trials: int) -> None:
    """Each trial has one run, ended as it did, with each epoch once; the parent is closed; one model is registered."""
    from hpo.tracking import runs
    from hpo.tracking.registry import versions
    from hpo.tracking.store import connect

    home = Home.find(project)
    study = read_study(home, name)
    assert study.count(TrialState.COMPLETE) == trials
    assert study.count(TrialState.RUNNING, TrialState.WAITING, TrialState.FAILED) == 0
    client = connect(home)
    parent = runs.find_parent(client, study)
    assert parent is not None
    assert parent.info.status == "FINISHED"
    children = list(runs.children(client, parent))
    numbers = Counter(int(run.data.tags[runs.TRIAL]) for run in children)
    assert numbers == Counter(trial.number for trial in study.trials)
    for run in children:
        complete = run.data.tags[runs.STATE] == "complete"
        assert run.info.status == ("FINISHED" if complete else "KILLED")
        if complete:
            steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "valid/accuracy")]
            assert sorted(steps) == list(range(1, EPOCHS + 1))
            assert len(client.get_metric_history(run.info.run_id, "objective")) == 1
            assert run.data.tags[runs.MODEL].startswith("models:/")
            files = {item.path for item in client.list_artifacts(run.info.run_id)}
            assert {"confusion.json", "figures", "report"} <= files
    models = client.search_logged_models([parent.info.experiment_id])
    assert len(models) == trials
    (version,) = versions(home, name)
    assert version.aliases == ("challenger",)
    assert version.trial == study.best.number
    assert [path for path in home.work.rglob("*") if path.is_file()] == []


def test_a_server_that_goes_away_and_comes_back_gets_every_record_once(project, proxy):
    running = Running("away", trials=5)
    running.wait_for("trial_ended")
    proxy.down()
    running.wait_for("notice", "tracking waits")
    running.wait_for("trial_ended", count=2)
    proxy.up()
    running.end(0)
    assert told(running, "tracking waits") == told(running, "tracking is back") == 1, running.notices
    assert running.model is not None
    check_all_is_there_once(project, "away", 5)


def test_a_server_killed_and_started_again_gets_every_record_once(project, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.port}")
    running = Running("restarted", trials=10, options=("--set", "training.batch_size=8"))
    running.wait_for("trial_ended", count=2)
    server.kill()
    running.wait_for("notice", "tracking waits")
    running.wait_for("epoch_ended")
    os.killpg(running.process.pid, signal.SIGSTOP)  # or the study would be over before the server has started
    server.start()
    os.killpg(running.process.pid, signal.SIGCONT)
    running.wait_for("notice", "tracking is back")
    running.end(0)
    assert running.model is not None
    check_all_is_there_once(project, "restarted", 10)


def test_answers_that_are_late_or_lost_double_nothing(project, proxy):
    running = Running("lossy", trials=4)
    running.wait_for("study_opened")
    for _ in range(3):
        proxy.lose, proxy.delay = 2, 0.2
        running.wait_for("trial_ended")
    running.end(0)
    check_all_is_there_once(project, "lossy", 4)


def test_a_study_that_ends_while_the_server_is_away_is_delivered_by_the_next_run(project, proxy):
    running = Running("ends", trials=3)
    running.wait_for("trial_ended")
    proxy.down()
    running.end(0)
    assert running.model is None
    assert told(running, "tracking waits") == told(running, "still to be delivered") == 1, running.notices
    refused = Running("ends", trials=3)
    assert "nothing answers there" in refused.end(2)
    proxy.up()
    again = Running("ends", trials=3)
    again.end(0)
    assert told(again, "tracking") == 0, again.notices
    assert again.model is not None
    check_all_is_there_once(project, "ends", 3)


def test_a_study_killed_while_the_server_is_away_loses_nothing(project, proxy):
    running = Running("killed", trials=5)
    running.wait_for("trial_ended")
    proxy.down()
    running.wait_for("trial_ended", count=2)
    os.killpg(running.process.pid, signal.SIGKILL)
    running.process.wait()
    done = {t.number: t.value for t in read_study(Home.find(project), "killed").trials if t.value is not None}
    assert len(done) >= 3
    proxy.up()
    Running("killed", trials=5).end(0)
    after = {t.number: t.value for t in read_study(Home.find(project), "killed").trials}
    assert done.items() <= after.items()
    check_all_is_there_once(project, "killed", 5)


@pytest.fixture
def small_disk(project: Path) -> Iterator[Path]:
    """A file system of its own for mlruns; needs the right to mount."""
    place = project / "mlruns"
    place.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True)
    if not made or made.returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _fill(disk: Path, *, leave: int) -> None:
    free = shutil.disk_usage(disk).free
    with contextlib.suppress(OSError):  # the study writes meanwhile
        (disk / "filler").write_bytes(b"x" * (free - leave))


@pytest.mark.parametrize("leave", [0, 300_000])
def test_a_study_on_a_full_disk_ends_with_one_message_and_goes_on_once_there_is_space(project, small_disk, leave):
    running = Running("full", trials=5)
    running.wait_for("trial_ended", count=2)
    _fill(small_disk, leave=leave)
    said = running.end(2)
    assert said.count("\n") == 1, said
    error = json.loads(said)
    assert "space left" in error["error"] or "full" in error["error"]
    assert "Free some space" in error["hint"]
    ended = [event for event in running.events if event["event"] == "trial_ended"]
    (small_disk / "filler").unlink()
    Running("full", trials=5).end(0)
    after = {trial.number: trial for trial in read_study(Home.find(project), "full").trials}
    for event in ended:
        assert after[event["result"]["number"]].state == event["result"]["state"]
    check_all_is_there_once(project, "full", 5)


def test_a_store_that_cannot_be_written_is_one_message_before_anything_starts(project, small_disk):
    Running("still", trials=1).end(0)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    running = Running("still", trials=2)
    error = json.loads(running.end(2))
    assert "Read-only file system" in error["error"]
    assert "--home" in error["hint"]
    assert running.events == []


@pytest.mark.parametrize("name", ["mlflow.db", "optuna.db"])
def test_a_database_that_cannot_be_written_is_one_message(project, small_disk, name):
    Running("still", trials=1).end(0)
    path = small_disk / name
    subprocess.run(["mount", "--bind", str(path), str(path)], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(path)], check=True)
        error = json.loads(Running("still", trials=2).end(2))
    finally:
        subprocess.run(["umount", str(path)], check=True)
    assert name in error["error"]
    assert error["hint"]
