"""What `hpo run` says about Ray before it trains."""

import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.options import RunOptions


@pytest.mark.parametrize("option", ["--address", "--cpus-per-trial"])
def test_options_of_ray_without_ray_are_refused(option, tmp_path):
    done = CliRunner().invoke(app, ["run", "digits-mlp", "--home", str(tmp_path), option, "1"])
    assert done.exit_code == 2
    assert "--engine ray" in done.output


def test_the_next_command_places_workers_as_this_one_did():
    options = RunOptions(engine="ray", address="auto", gpus_per_trial=0.25)
    assert options.to_resume().flags() == ["--engine", "ray", "--address", "auto", "--gpus-per-trial", "0.25"]
    assert RunOptions().flags() == []


def test_a_wrong_address_is_one_message_with_the_next_step(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    command = ["run", "digits-mlp", "--home", str(tmp_path), "--engine", "ray", "--address", "127.0.0.1:9", "--quiet"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "no Ray cluster answers" in done.output
    assert "ray start --head" in done.output
