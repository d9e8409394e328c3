import hashlib
import http.server
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from hpo.data.cache import fetch
from hpo.errors import DataError

CONTENT = bytes(range(256)) * 8192  # 2 MiB
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


class _Server(http.server.ThreadingHTTPServer):
    asked = 0
    sent = len(CONTENT)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        if self.path != "/good.npz":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[: self.server.sent])

    def log_message(self, *args):
        pass


@contextmanager
def _serving():
    server = _Server(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with _serving() as running:
        yield running


def url(server, name="good.npz"):
    return f"http://127.0.0.1:{server.server_port}/{name}"


def silent(text, done, total):
    pass


def test_download_arrives_whole_and_shows_progress(server, tmp_path):
    heard = []
    path = fetch(url(server), md5=MD5, path=tmp_path / "a" / "good.npz", progress=lambda *what: heard.append(what))
    assert path.read_bytes() == CONTENT
    assert heard[-1] == ("downloading good.npz", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert not list(tmp_path.rglob("*.part"))


def test_cached_file_is_not_downloaded_again(server, tmp_path):
    for _ in range(2):
        fetch(url(server), md5=MD5, path=tmp_path / "good.npz", progress=silent)
    assert server.asked == 1


def test_wrong_checksum_from_the_server_names_both_and_keeps_nothing(server, tmp_path):
    with pytest.raises(DataError, match=f"md5 is {MD5}, the official one is {'0' * 32}"):
        fetch(url(server), md5="0" * 32, path=tmp_path / "good.npz", progress=silent)
    assert [path.name for path in tmp_path.iterdir()] == ["good.npz.lock"]


def test_cached_file_with_another_checksum_is_refused_and_left_alone(server, tmp_path):
    path = tmp_path / "good.npz"
    path.write_bytes(b"mine")
    with pytest.raises(DataError, match=f"official one is {MD5}") as caught:
        fetch(url(server), md5=MD5, path=path, progress=silent)
    assert f"--set data.path={path}" in caught.value.hint
    assert path.read_bytes() == b"mine"
    assert server.asked == 0


def test_interrupted_transfer_is_an_error_and_the_next_try_starts_cleanly(server, tmp_path):
    server.sent = 100_000
    with pytest.raises(DataError, match="download failed"):
        fetch(url(server), md5=MD5, path=tmp_path / "good.npz", progress=silent)
    assert not (tmp_path / "good.npz").exists()
    server.sent = len(CONTENT)
    (tmp_path / "good.npz.part").write_bytes(b"left by a process that was killed" * 100_000)
    assert fetch(url(server), md5=MD5, path=tmp_path / "good.npz", progress=silent).read_bytes() == CONTENT


def test_offline_error_says_which_file_to_put_where_and_what_runs_without(tmp_path):
    with _serving() as closed:
        pass
    path = tmp_path / "good.npz"
    with pytest.raises(DataError, match="Connection refused") as caught:
        fetch(url(closed), md5=MD5, path=path, progress=silent)
    assert str(path) in caught.value.hint
    assert MD5 in caught.value.hint
    assert "hpo run digits-mlp" in caught.value.hint


def test_file_that_the_server_has_not_is_an_error(server, tmp_path):
    with pytest.raises(DataError, match="404"):
        fetch(url(server, "other.npz"), md5=MD5, path=tmp_path / "other.npz", progress=silent)


def test_folder_that_cannot_be_written_is_an_error(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot be read or written") as caught:
        fetch(url(server), md5=MD5, path=tmp_path / "file" / "good.npz", progress=silent)
    assert "HPO_DATA" in caught.value.hint


def test_two_processes_at_once_download_once(server, tmp_path):
    code = (
        "import sys; from pathlib import Path; from hpo.data.cache import fetch;"
        "fetch(sys.argv[1], md5=sys.argv[2], path=Path(sys.argv[3]), progress=lambda *_: None)"
    )
    command = [sys.executable, "-c", code, url(server), MD5, str(tmp_path / "good.npz")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert server.asked == 1
    assert (tmp_path / "good.npz").read_bytes() == CONTENT
