from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import tiny_study as tiny
from hpo.home import Home
from hpo.tracking.registry import fetch, resolve
from hpo.tracking.store import load_mlflow
from ports import free_port, wait_for

_ELSEWHERE = """
import sys
sys.modules["hpo"] = None  # as where it is not installed
import mlflow, numpy
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/tiny@challenger")
table = model.predict(numpy.load(sys.argv[2]))
assert not any(name.startswith("hpo.") for name in sys.modules)
print(table.to_json(orient="split", double_precision=15))
"""


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (300, *tiny.SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def home(registered: Path) -> Home:
    """A home with a registered model, which no test changes."""
    return Home.at(registered)


@pytest.fixture(scope="module")
def kept(home: Home) -> Path:
    """The folder of its model."""
    return fetch(home, resolve(home, "tiny"), home.work)


@pytest.fixture(scope="module")
def folder(exported: Path) -> Path:
    return exported


def expected(folder: Path, images: np.ndarray) -> np.ndarray:
    import torch

    return torch.export.load(folder / "net.pt2").module()(torch.from_numpy(images)).detach().numpy()


def test_a_model_answers_one_row_of_probabilities_per_raw_image(kept: Path, folder: Path, images: np.ndarray) -> None:
    table = load_mlflow().pyfunc.load_model(str(kept)).predict(images)
    assert tuple(table.columns) == tiny.CLASSES
    assert set(table.dtypes) == {np.dtype("float32")}
    np.testing.assert_allclose(table.to_numpy(), expected(folder, images), atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 257])
def test_any_number_of_images_is_a_batch(kept: Path, images: np.ndarray, count: int) -> None:
    assert load_mlflow().pyfunc.load_model(str(kept)).predict(images[:count]).shape == (count, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images.astype(np.float32), "dtype of input float32 does not match expected dtype uint8"),
        (lambda images: images[..., :1], "does not match expected shape"),
        (lambda images: images[0], "does not match expected shape"),
    ],
)
def test_images_of_another_kind_are_refused_by_the_signature(
    kept: Path, images: np.ndarray, change: object, message: str
) -> None:
    mlflow = load_mlflow()
    with pytest.raises(mlflow.exceptions.MlflowException, match=message):
        mlflow.pyfunc.load_model(str(kept)).predict(change(images))


@pytest.mark.slow
def test_a_model_loads_without_this_package_and_without_unpickling(
    home: Home, kept: Path, folder: Path, images: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "images.npy", images[:5])
    command = [sys.executable, "-I", "-c", _ELSEWHERE, home.tracking_uri, str(tmp_path / "images.npy")]
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    answer = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    table = json.loads(answer.stdout)
    assert tuple(table["columns"]) == tiny.CLASSES
    np.testing.assert_allclose(table["data"], expected(folder, images[:5]), atol=1e-5)


@pytest.mark.slow
def test_a_served_model_answers_a_request(kept: Path, folder: Path, images: np.ndarray) -> None:
    port = free_port()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(kept), "--env-manager", "local"]
    command += ["--port", str(port), "--workers", "1"]
    with subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/ping", seconds=200)
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations",
                json.dumps({"inputs": images[:4].tolist()}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
                rows = json.load(answer)["predictions"]
        finally:
            os.killpg(process.pid, 15)
    assert [tuple(row) for row in rows] == [tiny.CLASSES] * 4
    np.testing.assert_allclose([list(row.values()) for row in rows], expected(folder, images[:4]), atol=1e-5)
