"""Weights that others trained come whole, checked and without running anything; offline there is a way out."""

import hashlib
import http.server
import pickle
import subprocess
import sys
import threading

import pytest
import torch

from hpo.data.cache import hub_file, read_weights, torchvision_file
from hpo.errors import DataError


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the folder tmp_path/site."""
    (tmp_path / "site").mkdir()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "site"))

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    thread.join()
    running.server_close()


def _published(tmp_path, state):
    file = tmp_path / "site" / "net.pth"
    torch.save(state, file)
    name = f"net-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    return file.rename(file.with_name(name)).name


def test_published_weights_are_fetched_once_into_torch_home(server, tmp_path):
    name = _published(tmp_path, {"weight": torch.ones(3)})
    file = torchvision_file(f"{server}/{name}")
    assert file == tmp_path / "torch" / "hub" / "checkpoints" / name
    (tmp_path / "site" / name).unlink()
    assert torch.equal(read_weights(torchvision_file(f"{server}/{name}"))["weight"], torch.ones(3))


def test_a_file_that_is_not_the_published_one_is_refused(server, tmp_path):
    name = _published(tmp_path, {"weight": torch.ones(3)})
    torchvision_file(f"{server}/{name}").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"not the official file.*--set model\.weights="):
        torchvision_file(f"{server}/{name}")


def test_without_a_network_the_error_names_the_file_and_its_place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(DataError) as caught:
        torchvision_file("http://127.0.0.1:9/net-0123abcd.pth")
    said = str(caught.value)
    assert str(tmp_path / "hub" / "checkpoints" / "net-0123abcd.pth") in said
    assert "sha256 0123abcd" in said
    assert "model.weights=none" in said


def test_without_a_hub_the_error_comes_at_once_and_names_the_file():
    # In a process of its own: the hub's client reads its environment when it is imported.
    code = (
        "import time; from hpo.data.cache import hub_file; from hpo.errors import DataError; began = time.time()\n"
        "try: hub_file('timm/resnet18.a1_in1k', None)\n"
        "except DataError as error: print(error)\n"
        "assert time.time() - began < 15"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nowhere", "PATH": "", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "http://127.0.0.1:9/timm/resnet18.a1_in1k/resolve/main/model.safetensors: the download failed" in done.stdout
    assert "--set model.weights=FILE" in done.stdout
    assert "hf download timm/resnet18.a1_in1k model.safetensors" in done.stdout


def test_what_the_hub_has_cached_needs_no_network(tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    commit = "0" * 40
    place = tmp_path / "models--timm--resnet18.a1_in1k"
    (place / "snapshots" / commit).mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    assert hub_file("timm/resnet18.a1_in1k", None).read_bytes() == b"weights"


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("content", ["bomb", "text", "cut"])
def test_a_file_that_is_not_plain_weights_is_refused_and_never_executed(content, tmp_path):
    file = tmp_path / ("net.safetensors" if content == "cut" else "net.pth")
    file.write_bytes({"bomb": pickle.dumps({"weight": _Bomb()}), "text": b"hello", "cut": b"\x10"}[content])
    with pytest.raises(DataError, match="not a file of plain weights"):
        read_weights(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_weights(tmp_path / "absent.pth")
