from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_study as tiny
from hpo.home import Home
from hpo.models.safe_loader import Program
from hpo.predict import load_model
from hpo.tracking.models import save_model
from hpo.tracking.registry import REGISTERED, fetch, resolve
from hpo.tracking.store import connect, load_mlflow
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


@pytest.fixture
def home(registered: Path, tmp_path: Path) -> Home:
    """A home with a registered model."""
    shutil.copytree(registered / "mlruns", tmp_path / "mlruns")
    return Home.at(tmp_path)


@pytest.fixture
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


def test_it_is_saved_in_silence_with_a_black_image_as_example(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model", folder, model_id="m-0", run_id="0", tags={})
    assert capfd.readouterr() == ("", "")
    model = load_mlflow().pyfunc.load_model(str(tmp_path / "model"))
    (image,) = model.input_example
    assert (image.shape, image.any()) == (tiny.SHAPE, False)
    assert len(model.predict(model.input_example)) == 1


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


def elsewhere(home: Home, images: np.ndarray, folder: Path) -> subprocess.CompletedProcess[str]:
    """What plain MLflow says of the images in a process that has no hpo."""
    np.save(folder / "images.npy", images)
    command = [sys.executable, "-I", "-c", _ELSEWHERE, home.tracking_uri, str(folder / "images.npy")]
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_model_loads_without_this_package_and_without_unpickling(
    home: Home, kept: Path, folder: Path, images: np.ndarray, tmp_path: Path
) -> None:
    answer = elsewhere(home, images[:5], tmp_path)
    assert answer.returncode == 0, answer.stderr
    table = json.loads(answer.stdout)
    assert tuple(table["columns"]) == tiny.CLASSES
    np.testing.assert_allclose(table["data"], expected(folder, images[:5]), atol=1e-5)


def replace_program(kept: Path) -> Path:
    """A program of anyone in place of the model's: it would answer with memory of the process as it is."""
    import torch

    class Peek(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.empty((images.shape[0], 3))

    example = (torch.zeros((2, *tiny.SHAPE), dtype=torch.uint8),)
    program = torch.export.export(Peek(), example, dynamic_shapes=({0: torch.export.Dim("images")},))
    torch.export.save(program, kept / "artifacts" / "net.pt2")
    return kept


def test_a_program_that_was_put_into_a_model_is_refused_by_its_script(kept: Path) -> None:
    mlflow = load_mlflow()
    with pytest.raises(Exception, match=r"the operator torch\.ops\.aten\.empty\.memory_format"):
        mlflow.pyfunc.load_model(str(replace_program(kept)))
    assert not [*kept.rglob("__pycache__")]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def pickle_a_weight(kept: Path, trap: Path) -> Path:
    """The model's own program, with a weight that torch.export.load would unpickle; returns its file."""
    import torch

    file, buffer = kept / "artifacts" / "net.pt2", io.BytesIO()
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (listed,) = [name for name in entries if name.endswith("model_weights_config.json")]
    config = json.loads(entries[listed])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    torch.save(Touch(trap), buffer)
    entries[listed] = json.dumps(config).encode()
    entries[f"{listed.rpartition('/')[0]}/{first['path_name']}"] = buffer.getvalue()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["an operator that shows memory", "a weight whose reading runs code"])
def test_it_is_refused_by_plain_mlflow_where_this_package_is_not_installed(
    home: Home, kept: Path, images: np.ndarray, tmp_path: Path, harm: str
) -> None:
    import torch

    trap = tmp_path / "trap"
    if harm == "an operator that shows memory":
        replace_program(kept)
    else:
        file = pickle_a_weight(kept, trap)
        with contextlib.suppress(Exception):  # it fails after the fact
            torch.export.load(file)
        assert trap.exists()
        trap.unlink()
    answer = elsewhere(home, images, tmp_path)
    assert answer.returncode == 1
    assert "ModelError" in answer.stderr
    assert not trap.exists()
    reason = (
        "the operator torch.ops.aten.empty.memory_format" if harm.startswith("an operator") else "a pickled value in"
    )
    assert reason in answer.stderr


def test_a_model_of_this_home_is_loaded_here_and_one_that_came_from_elsewhere_in_its_own_process(
    home: Home, kept: Path, images: np.ndarray
) -> None:
    own = load_model("tiny", home=home)
    assert isinstance(own._model, Program)
    connect(home).set_model_version_tag("tiny", "1", REGISTERED, "1")  # as an import does
    foreign = load_model("tiny", home=home)
    assert not isinstance(foreign._model, Program)
    np.testing.assert_array_equal(foreign.predict_proba(images), own.predict_proba(images))


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
