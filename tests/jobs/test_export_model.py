"""A registered model is written for other programs only once they answer as it does; its card is from the record."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hpo.errors import HpoError, ModelError, StoreError
from hpo.home import Home
from hpo.jobs import export_model as exporting
from hpo.jobs.card import write_card
from hpo.jobs.export_model import export_model
from hpo.predict import load_model
from hpo.report.card import model_card
from hpo.tracking.store import connect


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_DATA", str(finished / "data"))
    return finished


@pytest.mark.parametrize(
    ("form", "files"),
    [
        ("pt2", {"net.pt2", "config.json"}),
        ("safetensors", {"weights.safetensors", "config.json", "setup.json"}),
        ("onnx", {"model.onnx", "config.json"}),
    ],
)
def test_each_format_is_compared_on_the_validation_images(place: Path, form: str, files: set[str]) -> None:
    if form == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package, reason=f"the extra onnx is not installed: {package}")
    made = export_model("digits-mlp/1", form=form, home=place)
    assert made.folder == Path(f"digits-mlp-1-{form}")
    assert set(made.files) == files
    assert made.parity.passed
    assert made.images == "288 validation images"
    config = json.loads((made.folder / "config.json").read_text())
    assert len(config["class_names"]) == 10
    with pytest.raises(HpoError, match="exists already"):
        export_model("digits-mlp/1", form=form, home=place)


def test_an_exported_folder_of_mlflow_is_a_model_of_every_command(place: Path, tmp_path: Path) -> None:
    made = export_model("digits-mlp", form="mlflow", out=tmp_path / "model", home=place)
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    expected = load_model("digits-mlp", home=place).predict_proba(images)
    np.testing.assert_allclose(load_model(made.folder).predict_proba(images), expected, atol=1e-6)


def test_files_that_answer_otherwise_are_not_left(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exporting._write

    def damaged(form: str, fetched: Path, folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        write(form, fetched, folder)
        state = load_file(folder / "weights.safetensors")
        save_file({name: tensor * 0.9 for name, tensor in state.items()}, folder / "weights.safetensors")

    monkeypatch.setattr(exporting, "_write", damaged)
    with pytest.raises(ModelError, match="as safetensors it answers otherwise"):
        export_model("digits-mlp", form="safetensors", out="x", home=place)
    assert not Path("x").exists()


def test_a_card_is_from_the_record_and_on_the_version(place: Path, tmp_path: Path) -> None:
    card = write_card("digits-mlp", licence="MIT", out=tmp_path / "hub", home=place)
    _, head, text = card.text.split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["license"] == "mit"
    assert facts["pipeline_tag"] == "image-classification"
    names = [each["type"] for each in facts["model-index"][0]["results"][0]["metrics"]]
    assert "accuracy" in names
    for part in ("## Use", "## Data", "## How it was made", "## Scores", "## Limits", "## Licence", "CC BY 4.0"):
        assert part in text
    assert "The test part has not been opened for this model" in text
    assert 'load_model("models:/digits-mlp/1")' in text
    assert "| validation accuracy |" in text
    assert (tmp_path / "hub" / "README.md").read_text() == card.text
    assert (tmp_path / "hub" / "MLmodel").is_file()
    described = connect(Home.at(place)).get_model_version("digits-mlp", "1").description
    assert described.startswith("# digits-mlp")
    assert str(place) not in card.text


@pytest.mark.parametrize("form", ["safetensors", "mlflow"])
def test_what_is_written_for_others_names_no_folder_of_this_machine(place: Path, tmp_path: Path, form: str) -> None:
    setup = {"data": {"path": "/home/me/pets.npz"}, "model": {"weights": "/home/me/w.pth", "backbones": []}}
    setup["model"]["backbones"] = [{"weights": "/home/me/v.pth"}, {"weights": "imagenet"}]
    (tmp_path / "setup.json").write_text(json.dumps(setup))
    exporting._without_folders(tmp_path / "setup.json")
    assert json.loads((tmp_path / "setup.json").read_text()) == {
        "data": {"path": "pets.npz"},
        "model": {"weights": "w.pth", "backbones": [{"weights": "v.pth"}, {"weights": "imagenet"}]},
    }
    made = export_model("digits-mlp/1", form=form, out=tmp_path / "model", home=place)
    for file in made.folder.rglob("*"):
        if file.name in ("MLmodel", "setup.json"):
            assert '"/' not in (text := file.read_text())
            assert ": /" not in text


def test_a_card_is_not_written_where_openings_may_be_missing(place: Path) -> None:
    ledger = Home.at(place).root / "openings.jsonl"
    ledger.write_text("damaged\n")
    try:
        with pytest.raises(StoreError, match="an opening of the test part would go uncounted"):
            write_card("digits-mlp/1", home=place)
    finally:
        ledger.unlink()


def test_a_description_that_a_person_wrote_stays(place: Path) -> None:
    client = connect(Home.at(place))
    first = write_card("digits-mlp/1", home=place)
    assert first.described
    assert write_card("digits-mlp/1", licence="MIT", home=place).described  # over the earlier card
    assert "model: MIT" in client.get_model_version("digits-mlp", "1").description
    client.update_model_version("digits-mlp", "1", description="Checked by Ada.")
    assert not write_card("digits-mlp/1", home=place).described
    assert client.get_model_version("digits-mlp", "1").description == "Checked by Ada."
    client.update_model_version("digits-mlp", "1", description="")
    assert write_card("digits-mlp/1", home=place).described


def test_a_card_names_the_members_of_an_ensemble_and_looks_at_the_test_part_before_it() -> None:
    from page_findings import findings, look, model, trial

    settings = {"average": "probabilities"}
    for offset, words in ((-60, "once in this study, after the choice"), (60, "1 of them before this model was made")):
        made = trial(
            2,
            stage="ensemble",
            parameters={},
            members={"tiny#1": 3, "tiny#0": 1},
            settings=settings,
            ended=look().when.timestamp() + offset,
        )
        text = model_card(findings(trial(0), trial(1), made, model=model(2), openings=(look(1, 2),)))
        assert "- this model: trial 2, the mean of the probabilities of tiny#1 (3 times), tiny#0, which were" in text
        assert "2 trained networks together" in text
        assert words.replace("once", "1 time") in text


def test_a_card_says_which_sampler_and_pruner_auto_stands_for() -> None:
    from dataclasses import replace

    from page_findings import findings as made_findings

    findings = made_findings()
    search = findings.spec.search
    auto = {name: getattr(search, name).model_copy(update={"name": "auto"}) for name in ("sampler", "pruner")}
    spec = findings.spec.model_copy(update={"search": search.model_copy(update=auto)})
    (line,) = [line for line in model_card(replace(findings, spec=spec)).splitlines() if line.startswith("- search:")]
    assert "auto" not in line


def test_nothing_is_uploaded_without_a_folder(place: Path) -> None:
    with pytest.raises(HpoError, match="--push a/b"):
        write_card("digits-mlp", push="a/b", home=place)


class _Hub(BaseHTTPRequestHandler):
    """The part of the Hub's HTTP interface that an upload of small files asks for."""

    def do_GET(self) -> None:
        self._answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub: Any = self.server
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self._answer({"url": f"{hub.address}/me/digits"})
        elif self.path == "/api/models/me/digits/preupload/main":
            paths = [each["path"] for each in json.loads(body)["files"]]
            same = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._answer({"files": [{"path": path, **same} for path in paths]})
        elif self.path == "/api/models/me/digits/commit/main":
            lines = [json.loads(line)["value"] for line in body.splitlines()]
            hub.files |= {each["path"]: base64.b64decode(each["content"]) for each in lines if "path" in each}
            self._answer({"commitOid": "a" * 40, "commitUrl": f"{hub.address}/me/digits/commit/a"})
        else:
            self._answer({})

    def _answer(self, plain: dict[str, Any]) -> None:
        hub: Any = self.server
        content = json.dumps({"error": "no such token"} if hub.refuses else plain).encode()
        self.send_response(401 if hub.refuses else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that stands for the Hub: what it was asked to create, and the files that it was given."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.address, server.created, server.files = f"http://127.0.0.1:{server.server_port}", [], {}
    server.refuses = False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_folder_is_pushed_to_the_hub_whose_own_reader_reads_the_card(place: Path, tmp_path: Path, hub: Any) -> None:
    from huggingface_hub import ModelCard

    card = write_card("digits-mlp", licence="MIT", out=tmp_path / "hub", push="me/digits", home=place)
    assert card.address == f"{hub.address}/me/digits"
    assert [each["visibility"] for each in hub.created] == ["private"]
    files = {path.relative_to(tmp_path / "hub").as_posix(): path for path in (tmp_path / "hub").rglob("*")}
    written = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    assert hub.files == written
    (tmp_path / "README.md").write_bytes(hub.files["README.md"])
    read = ModelCard.load(tmp_path / "README.md")
    assert (read.data.license, read.data.pipeline_tag) == ("mit", "image-classification")
    scores = {each.metric_type: each.metric_value for each in read.data.eval_results}
    assert scores["accuracy"] > 0.2
    assert {each.dataset_name for each in read.data.eval_results} == {"digits"}
    hub.refuses = True
    with pytest.raises(HpoError, match="--push me/digits: the Hub refuses: ") as caught:
        write_card("digits-mlp", out=tmp_path / "again", push="me/digits", home=place)
    assert "hf upload me/digits" in caught.value.hint
    assert (tmp_path / "again" / "README.md").is_file()
