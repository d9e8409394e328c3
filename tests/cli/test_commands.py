"""Commands hand their options on, and print what they get."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jsonschema.validators import validator_for
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.jobs.shared.gates import Verdict
from hpo.options import RunOptions
from hpo.records import ModelVersion
from hpo.spec.files import study_files
from hpo.spec.load import StudyLoader, load_study
from told_study import DATA, SPLIT, ended, opened, study, version, whole_story

runner = CliRunner()
pytestmark = pytest.mark.usefixtures("project")


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What run_study was called with; it tells the whole story."""
    seen: list[dict[str, Any]] = []

    def run_study(spec: Any, options: RunOptions, *, closing: float, watch: Any) -> Any:
        assert closing == 0  # only images of the user's own have one
        seen.append({"spec": spec, **{part.name: getattr(options, part.name) for part in fields(options)}})
        for event in whole_story():
            watch(event)
        return study(0, 1, 2, 3)

    monkeypatch.setattr("hpo.execute.run_study.run_study", run_study)
    return seen


def test_run_hands_every_option_on(calls: list[dict[str, Any]]) -> None:
    numbers = "run digits-mlp --trials 5 --workers 3 --timeout 1h30m --keep-models best:2"
    words = "--device cpu --home x --fresh --retry-failed --precision float32 --profile"
    result = runner.invoke(
        app, [*numbers.split(), *words.split(), "--set", "training.epochs=7", "--set", "data.size=8"]
    )
    assert result.exit_code == 0, result.output
    call = calls[0]
    assert (call["spec"].training.epochs, call["spec"].data.size) == (7, 8)
    del call["spec"]
    given = {name: value for name, value in call.items() if value != getattr(RunOptions(), name)}
    assert given == {
        "settings": ("training.epochs=7", "data.size=8"),
        "trials": 5,
        "workers": 3,
        "device": "cpu",
        "home": Path("x"),
        "fresh": True,
        "retry_failed": True,
        "timeout": 5400.0,
        "keep_models": "best:2",
        "precision": "float32",
        "profile": True,
    }


def test_run_leaves_unsaid_options_to_the_study(calls: list[dict[str, Any]]) -> None:
    runner.invoke(app, ["run", "digits-mlp"])
    assert [calls[0][name] for name in ("trials", "workers", "timeout", "keep_models", "home")] == [None] * 5


def test_next_command_repeats_what_made_the_study_what_it_is(calls: list[dict[str, Any]]) -> None:
    arguments = ["run", "digits-mlp", "--set", "model.activation=tanh", "--home", "my place", "--workers", "1"]
    text = runner.invoke(app, arguments).stdout
    assert "hpo run digits-mlp --set model.activation=tanh --home 'my place' --trials 8" in text


def test_interrupted_run_goes_on_with_the_budget_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_study(spec: Any, options: RunOptions, *, closing: float, watch: Any) -> None:
        watch(opened())
        watch(ended(0, reason="interrupted"))

    monkeypatch.setattr("hpo.execute.run_study.run_study", run_study)
    result = runner.invoke(app, ["run", "digits-mlp", "--trials", "50"])
    assert "hpo run digits-mlp --trials 50" in result.stdout
    assert result.exit_code == 130


def test_run_json_speaks_only_json(calls: list[dict[str, Any]]) -> None:
    lines = runner.invoke(app, ["run", "digits-mlp", "--json"]).stdout.splitlines()
    assert json.loads(lines[-1])["event"] == "study_ended"
    assert all(json.loads(line)["event"] for line in lines)


def test_run_quiet_says_one_line(calls: list[dict[str, Any]]) -> None:
    assert len(runner.invoke(app, ["run", "digits-mlp", "--quiet"]).stdout.splitlines()) == 1


def test_run_into_a_pipe_writes_no_ansi_and_no_cut_lines(calls: list[dict[str, Any]]) -> None:
    text = runner.invoke(app, ["run", "digits-mlp"]).stdout
    assert "\x1b" not in text
    assert "…" not in text


def test_studies_lists_those_that_ship_by_data_set() -> None:
    listed = json.loads(runner.invoke(app, ["studies", "--json"]).stdout)
    assert {row["name"] for row in listed} == set(study_files())
    assert [row["data"] for row in listed] == sorted(row["data"] for row in listed)
    text = runner.invoke(app, ["studies"]).stdout
    assert all(name in text for name in study_files())


def test_broken_study_file_does_not_hide_the_others(project: Path) -> None:
    (project / "studies").mkdir()
    (project / "studies" / "broken.yaml").write_text("data: {nme: digits}\n")
    result = runner.invoke(app, ["studies"])
    assert "digits-mlp" in result.stdout
    assert "warning: studies/broken.yaml" in result.stderr
    assert result.exit_code == 0


@pytest.mark.parametrize("name", sorted(study_files()))
def test_shown_study_is_a_study_file_of_the_same_study(name: str, project: Path) -> None:
    file = project / f"{name}.yaml"
    file.write_text(runner.invoke(app, ["show", name]).stdout)
    assert load_study(file) == load_study(name)


def test_show_tells_the_size_of_the_space_as_overridden() -> None:
    space = "search.space={model.hidden: {int: [1, 4]}, model.activation: {choice: [relu, tanh]}}"
    result = runner.invoke(app, ["show", "digits-mlp", "--set", space])
    assert result.stdout.startswith("# search space: 2 parameters, 8 combinations\n")
    shown = json.loads(runner.invoke(app, ["show", "digits-mlp", "--set", space, "--json"]).stdout)
    assert (shown["size"], shown["spec"]["search"]["space"]["model.hidden"]["int"]) == (8, [1, 4])


def test_check_prints_estimate_and_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    report = SimpleNamespace(
        data=DATA,
        split=SPLIT,
        device="cpu",
        precision="float32",
        parameter_count=101_770,
        batch_seconds=0.002,
        features_seconds=0.0,
        epoch_seconds=1.5,
        export_seconds=7.0,
        model_bytes=400_000,
        workers=2,
        trials=20,
        estimated_seconds=450.0,
        estimated_bytes=4e6,
        warnings=("batches are large",),
        near_duplicates="1 of test in train",
    )
    monkeypatch.setattr("hpo.jobs.check.check_study", lambda spec, **options: report)
    result = runner.invoke(app, ["check", "digits-mlp"])
    assert "101,770 parameters" in result.stdout
    assert "about 7 min 30 s and 4.0 MB" in result.stdout
    assert "288 images, 50.0% to 50.0% of them in a class" in result.stdout
    assert result.stderr == "warning: batches are large\n"


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.storage.reader.list_trials", lambda home, name: study(0, 1, 2, 3))


@pytest.mark.usefixtures("finished")
def test_trials_by_value_put_the_best_first_and_those_without_last() -> None:
    best = [row[0] for row in table(runner.invoke(app, ["trials", "digits-mlp", "--top", "2"]).stdout)[1:]]
    numbers = [row[0] for row in table(runner.invoke(app, ["trials", "digits-mlp", "--sort", "value"]).stdout)[1:]]
    assert best == numbers[:2]
    assert numbers == ["2", "0", "1", "3"]


@pytest.mark.usefixtures("finished")
def test_trials_table_has_state_value_and_parameters() -> None:
    rows = table(runner.invoke(app, ["trials", "digits-mlp"]).stdout)
    assert rows[0] == ["trial", "state", "valid_accuracy", "epoch", "time", "parameters"]
    assert rows[1][:4] == ["0", "complete", "0.8000", "3"]
    assert rows[1][-3:] == ["hidden=16", "optimizer=adam", "lr=0.00123"]
    assert "the loss is nan" in " ".join(rows[4])


@pytest.mark.usefixtures("finished")
def test_trials_json_holds_them_all() -> None:
    result = json.loads(runner.invoke(app, ["trials", "digits-mlp", "--json"]).stdout)
    assert [trial["candidate"]["number"] for trial in result["trials"]] == [0, 1, 2, 3]


def test_trials_of_a_study_file_are_found_by_its_name(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    asked = []
    monkeypatch.setattr("hpo.storage.reader.list_trials", lambda home, name: asked.append(name) or study(0))
    (project / "mine.yaml").write_text(study_files()["digits-mlp"].read_text())
    runner.invoke(app, ["trials", "mine.yaml"])
    assert asked == ["mine"]


@dataclass(frozen=True)
class Promotion:
    promoted: bool
    reason: str
    challenger: ModelVersion
    champion: ModelVersion | None
    scores: dict[str, float] = field(default_factory=dict)
    champion_scores: dict[str, float] = field(default_factory=dict)
    openings: int = 1
    gates: tuple[Verdict, ...] = ()
    refused: bool = False
    history: tuple[str, ...] = ()


def test_promote_shows_both_scores_and_counts_the_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Promotion(
        True, "0.91 > 0.89", version(2), version(0, 3), {"test_accuracy": 0.91}, {"test_accuracy": 0.89}, 2
    )
    monkeypatch.setattr("hpo.jobs.promote.promote", lambda name, **options: told)
    text = runner.invoke(app, ["promote", "digits-mlp"]).stdout
    assert "digits-mlp: version 7 is now champion: 0.91 > 0.89" in text
    assert ["test_accuracy", "0.9100", "0.8900"] in table(text)
    assert "2 times" in text


def test_first_promotion_has_no_champion_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Promotion(True, "there was no champion before", version(2), None, {"test_accuracy": 0.5})
    monkeypatch.setattr("hpo.jobs.promote.promote", lambda name, **options: told)
    text = runner.invoke(app, ["promote", "digits-mlp"]).stdout
    assert "now champion: there was no champion before" in text
    assert text.endswith("Serve it, with a page to drop an image on: hpo serve digits-mlp\n")
    assert table(text)[1] == ["test", "part", "version", "7"]


def test_a_refusal_names_the_gate_shows_no_test_score_and_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    gates = (Verdict("reloads", True, "within 1e-6", "0.0001"), Verdict("is fast", False, "9 ms", "5 ms"))
    told = Promotion(False, "is fast: 9 ms (wanted: 5 ms)", version(2), None, openings=0, gates=gates, refused=True)
    monkeypatch.setattr("hpo.jobs.promote.promote", lambda name, **options: told)
    done = runner.invoke(app, ["promote", "digits-mlp"])
    assert done.exit_code == 1
    assert ["is", "fast", "refused", "9", "ms", "5", "ms"] in table(done.stdout)
    assert "champion unchanged: is fast: 9 ms (wanted: 5 ms)" in done.stdout
    assert "test_accuracy" not in done.stdout
    assert "opened never" not in done.stdout
    assert "hpo promote digits-mlp --force" in done.stdout
    assert "hpo serve" not in done.stdout
    assert runner.invoke(app, ["promote", "digits-mlp", "--json"]).exit_code == 1


def test_models_lists_versions_aliases_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [version(2), version(1, 6, aliases=(), scores={"test_accuracy": 0.8})]
    monkeypatch.setattr("hpo.tracking.registry.versions", lambda home, name: found)
    rows = table(runner.invoke(app, ["models"]).stdout)
    assert rows[1] == ["digits-mlp", "7", "challenger", "2", "0.9000"]
    assert rows[2] == ["digits-mlp", "6", "1", "0.8000"]
    assert json.loads(runner.invoke(app, ["models", "--json"]).stdout)[1]["version"] == 6


def test_models_of_an_empty_store_say_how_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.tracking.registry.versions", lambda home, name: [])
    assert "hpo run digits-mlp" in runner.invoke(app, ["models"]).stdout
    assert json.loads(runner.invoke(app, ["models", "--json"]).stdout) == []


@pytest.fixture
def predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict_files(model: Any, paths: list[Path], *, refuse_below: float | None) -> list[dict[str, Any]]:
        shares = {"a, b": 0.25, "c": 0.75}
        return [{"file": str(path), "class": "c", "probability": 0.75, "probabilities": shares} for path in paths]

    monkeypatch.setattr("hpo.predict.predict_files", predict_files)
    monkeypatch.setattr("hpo.predict.load_model", lambda model, **options: model)


@pytest.mark.usefixtures("predictions")
def test_predict_writes_table_csv_and_json() -> None:
    rows = table(runner.invoke(app, ["predict", "digits-mlp", "one.png", "two.png"]).stdout)
    assert rows == [["file", "class", "probability"], ["one.png", "c", "0.7500"], ["two.png", "c", "0.7500"]]
    text = runner.invoke(app, ["predict", "digits-mlp", "one.png", "--format", "csv"]).stdout
    assert list(csv.DictReader(io.StringIO(text))) == [
        {"file": "one.png", "class": "c", "probability": "0.75", "p_a, b": "0.25", "p_c": "0.75"}
    ]
    listed = json.loads(runner.invoke(app, ["predict", "digits-mlp", "one.png", "--format", "json"]).stdout)
    assert listed[0]["probabilities"] == {"a, b": 0.25, "c": 0.75}


@pytest.mark.usefixtures("predictions")
def test_predict_into_a_file_prints_nothing(project: Path) -> None:
    result = runner.invoke(app, ["predict", "digits-mlp", "one.png", "--out", "out.csv"])
    assert result.stdout == ""
    assert (project / "out.csv").read_text().startswith("file,class,probability")


def test_ui_opens_on_this_machine_only_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("hpo.tracking.ui.open_ui", lambda home, **options: asked.append(options) or 0)
    result = runner.invoke(app, ["ui", "--port", "5055"])
    assert (result.exit_code, result.stdout) == (0, "http://127.0.0.1:5055/\n")
    assert (asked[0]["host"], asked[0]["port"]) == ("127.0.0.1", 5055)


@pytest.mark.parametrize(
    ("display", "words", "count"), [(":0", [], 1), ("", [], 0), (":0", ["--no-browser"], 0)], ids=str
)
def test_ui_opens_a_browser_once_it_answers_where_there_is_a_desktop(
    monkeypatch: pytest.MonkeyPatch, display: str, words: list[str], count: int
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("hpo.tracking.ui.open_ui", lambda home, **options: options["ready"]() or 0)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", display)
    result = runner.invoke(app, ["ui", *words])
    assert "MLflow is ready: http://127.0.0.1:5000/" in result.stderr
    assert opened == ["http://127.0.0.1:5000/"] * count


def test_completion_offers_the_names_of_studies() -> None:
    from hpo.cli.options import complete_study

    assert "digits-mlp" in complete_study("dig")
    assert "digits-mlp" not in complete_study("blood")


def test_schema_accepts_every_shipped_study_and_refuses_unknown_keys() -> None:
    schema = json.loads(runner.invoke(app, ["schema"]).stdout)
    validator_of = validator_for(schema, default=None)
    validator_of.check_schema(schema)
    validator = validator_of(schema)
    for name, path in study_files().items():
        tree = yaml.load(path.read_text(), StudyLoader)  # noqa: S506 - a SafeLoader
        assert list(validator.iter_errors(tree)) == [], name
        (error,) = validator.iter_errors({**tree, "modell": 1})
        assert "'modell' was unexpected" in error.message
        assert not validator.is_valid({**tree, "search": {**tree["search"], "sampler": "tpee"}})
