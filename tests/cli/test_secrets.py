"""No password, key or token of the environment or of a store's address is printed, stored or shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.errors import HpoError, redact, shown_address
from hpo.home import Home
from hpo.tracking.ui import ui_command

runner = CliRunner()
SECRET, CODED = "xyzzy-plugh-42", "xyzzy%2Dplugh%2D42"
TELLING_MODEL = """
import os
from torch import nn

def build(*, image_shape, classes, width=1):
    if width == 2:
        raise ValueError(f"{dict(os.environ)} {os.environ['OWN_TOKEN']!r}")
    height, wide, channels = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(height * wide * channels, classes))
"""
STUDY = """
data: {name: digits}
split: {kind: holdout}
model: {kind: telling_net:build, options: {width: 1}}
training: {epochs: 1, precision: float32}
search:
  objective: valid_accuracy
  trials: 2
  sampler: grid
  space: {model.options.width: {choice: [1, 2]}}
"""


@pytest.fixture
def secretive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HPO_HOME", "HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "OWN_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_neither_a_store_nor_a_page_nor_a_message_holds_a_secret(secretive: Path) -> None:
    (secretive / "telling_net.py").write_text(TELLING_MODEL)
    (secretive / "telling.yaml").write_text(STUDY)
    commands = ["run telling.yaml --workers 0 --debug", "trials telling", "trials telling --json", "report telling"]
    commands += ["models --json", "promote telling --debug", "run telling.yaml --retry-failed --workers 0 --json"]
    said = "".join(runner.invoke(app, command.split()).output for command in commands)
    assert "ValueError" in said
    assert "promoted" in said or "champion" in said
    assert SECRET not in said
    holding = [file for file in secretive.rglob("*") if file.is_file() and SECRET.encode() in file.read_bytes()]
    assert holding == []


COMMANDS = ["trials digits-mlp", "models", "run digits-mlp --trials 1", "ui", "report digits-mlp"]
ADDRESSES = [
    ("HPO_STORAGE", f"postgresql+psycopg2://me:{SECRET}@127.0.0.1:1/x"),
    ("HPO_STORAGE", f"postgresql+psycopg2://127.0.0.1:1/x?user=me&password={SECRET}"),
    ("HPO_STORAGE", f"postgresql+nodriver://me:{CODED}@127.0.0.1:1/x"),
    ("HPO_STORAGE", f"no address {SECRET}"),
    ("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:1"),
    ("MLFLOW_TRACKING_URI", f"postgresql+psycopg2://me:{SECRET}@127.0.0.1:1/x"),
]
# Each address with the command that looks at its store, and each command with one address; all others are slow.
FIRST = {("HPO_STORAGE", "trials digits-mlp"), ("MLFLOW_TRACKING_URI", "models")}
CASES = [
    pytest.param(*address, command, marks=[] if number == 0 or (address[0], command) in FIRST else [pytest.mark.slow])
    for number, address in enumerate(ADDRESSES)
    for command in COMMANDS
]


@pytest.mark.parametrize(("name", "url", "command"), CASES)
def test_an_address_is_told_without_its_password(
    secretive: Path, monkeypatch: pytest.MonkeyPatch, name: str, url: str, command: str
) -> None:
    if command == "ui" and not url.startswith("http"):
        pytest.skip("it would start a server")
    if command.startswith("run") and "digits" in command and name == "MLFLOW_TRACKING_URI":
        pytest.skip("a study goes on without its tracking server")
    monkeypatch.setenv(name, url)
    result = runner.invoke(app, [*command.split(), "--debug"])
    assert SECRET not in result.output
    assert CODED not in result.output


def test_the_ui_hands_its_store_on_where_other_users_cannot_read_it(
    secretive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:{SECRET}@127.0.0.1:1/x")
    command, environment = ui_command(Home.find(secretive), port=5999)
    assert not any(SECRET in word for word in command)
    assert environment["MLFLOW_BACKEND_STORE_URI"].endswith(f"{SECRET}@127.0.0.1:1/x")


@pytest.mark.parametrize(
    ("host", "warned"), [("::", True), ("10.0.0.1", True), ("127.0.0.1", False), ("localhost", False)]
)
def test_a_server_for_others_is_warned_of_in_a_line(
    secretive: Path, monkeypatch: pytest.MonkeyPatch, host: str, warned: bool
) -> None:
    monkeypatch.setattr("hpo.tracking.ui.open_ui", lambda home, **options: 0)
    result = runner.invoke(app, ["ui", "--host", host])
    assert (result.stderr.count("warning: anyone who can reach") == 1) is warned


def test_an_error_hides_secrets_and_what_would_steer_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", SECRET)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    error = HpoError(f"a\n\x1b[31m{SECRET} false", "postgresql://me:pw@host/x")
    assert (error.message, error.hint) == ("a  [31m*** false", "postgresql://me:***@host/x")
    assert redact("http://host/a:b@c and me@host: https://x") == "http://host/a:b@c and me@host: https://x"


@pytest.mark.parametrize("name", ["DB_PASS", "SIGNING_KEY", "PGPASSWORD", "db-pass", "LDAP_PWD", "KEY_PASSPHRASE"])
def test_a_variable_that_is_named_like_a_secret_is_hidden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redact(f"a {SECRET} b") == "a *** b"


def test_the_working_directory_and_such_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWD", "OLDPWD", "KEYBOARD", "BYPASS", "MONKEYS"):
        monkeypatch.setenv(name, "plain-text")
    assert redact("plain-text") == "plain-text"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"postgresql://me:{SECRET}@db:5432/x", "postgresql://me:***@db:5432/x"),
        (f"postgresql://me:a/{SECRET}@db/x", "postgresql://me:***@db/x"),
        (f"postgresql://me:a@{SECRET}@db/x", "postgresql://me:***@db/x"),
        (f"postgresql://me:%2F{CODED}@db/x", "postgresql://me:***@db/x"),
        (f"postgresql://me:a?b#{SECRET}@db/x", "postgresql://me:***@db/x"),
        (f"http://me:{SECRET}/x@host:5000", "http://me:***@host:5000"),
        (f"postgresql://db/x?user=me&password={SECRET}", "postgresql://db/x?user=me&password=***"),
        (f"postgresql://db/x?pass%77ord={SECRET}&sslmode=require", "postgresql://db/x?pass%77ord=***&sslmode=require"),
        ("sqlite:////home/me/mlruns/optuna.db", "sqlite:////home/me/mlruns/optuna.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
    ],
)
def test_one_function_shows_every_address(url: str, shown: str) -> None:
    assert shown_address(url) == shown
    assert SECRET not in redact(f"cannot connect to {url}: refused")


@pytest.mark.parametrize(
    "url", [f"postgresql://me:a@{SECRET}@127.0.0.1:1/x", f"http://me:a/{SECRET}@127.0.0.1:1", f"http://a:b?{SECRET}@h"]
)
def test_a_password_that_a_name_server_would_be_asked_for_is_refused(
    secretive: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    result = runner.invoke(app, ["models", "--debug"])
    assert result.exit_code == 2
    assert "Write @ as %40" in result.stderr
    assert SECRET not in result.output


COMMANDS = "status; store status; store status --json; doctor --json; studies; models; clean; trials digits-mlp --json"
COMMANDS += "; report digits-mlp; evaluate digits-mlp; promote digits-mlp --json; export digits-mlp; stop digits-mlp"
COMMANDS += (
    "; compare digits-mlp; predict digits-mlp x.png; explain digits-mlp x.png; rerun digits-mlp 0; store upgrade"
)
COMMANDS += "; run digits-mlp --trials 1 --workers 0; worker digits-mlp --workers 0; import x.zip; promote x --to {to}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "address", ["postgresql://127.0.0.1:1/x?user=me&password={0}", "postgresql://me:/{0}@127.0.0.1:1/x"]
)
def test_no_command_shows_a_password_of_the_project_s_file(secretive: Path, address: str) -> None:
    url = address.format(SECRET)
    (secretive / "hpo.toml").write_text(f'storage = "{url}"\ntracking = "{url.replace("/x", "/y", 1)}"\n')
    for command in COMMANDS.split("; "):
        result = runner.invoke(app, [*command.format(to=url).split(), "--debug"])
        assert SECRET not in result.output, command
        assert not any(SECRET in str(entry) for entry in secretive.rglob("*.html"))
    assert "***" in runner.invoke(app, ["store", "status", "--json"]).output
