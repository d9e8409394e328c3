"""The commands for clusters print what they should and refuse what does not fit."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml
from typer.testing import CliRunner

from hpo.cli.app import app


def _hpo(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--engine", "slurm"], "--workers 8"),
        (["--engine", "slurm", "--workers", "2"], "HPO_STORAGE"),
        (["--engine", "slurm", "--workers", "2", "--timeout", "1h"], "--timeout: is not for --engine slurm"),
        (["--engine", "slurm", "--workers", "2", "--print", "--slurm", "gpu=1"], "--slurm gpu"),
        (["--detach"], "--detach: is only for --engine slurm"),
        (["--engine", "kubernetes", "--workers", "2"], "hpo manifest digits-mlp --image IMAGE"),
    ],
)
def test_options_that_cannot_be_are_one_clear_error(project, words, said):
    code, output = _hpo("run", "digits-mlp", *words)
    assert code == 2
    assert said in output
    assert not (project / "mlruns").exists()


def test_printed_script_is_ready_for_sbatch_and_nothing_is_begun(project):
    code, output = _hpo("run", "digits-mlp", "--engine", "slurm", "--workers", "4", "--device", "cuda", "--print")
    assert code == 0
    subprocess.run(["bash", "-n"], input=output, text=True, check=True)
    assert "#SBATCH --array=0-3" in output
    assert "srun hpo worker digits-mlp --device cuda" in output
    assert not (project / "mlruns").exists()


def test_manifest_is_yaml_for_kubectl(project):
    code, output = _hpo("manifest", "digits-mlp", "--image", "hpo:1", "--workers", "3", "--gpus", "1")
    assert code == 0
    job = yaml.safe_load(output)
    assert (job["kind"], job["spec"]["completions"]) == ("Job", 3)


def test_study_is_begun_only_where_others_can_join_it(project):
    code, output = _hpo("begin", "digits-mlp")
    assert code == 2
    assert "HPO_STORAGE" in output


@pytest.mark.slow
def test_begun_study_can_be_joined_and_has_its_budget(project, database, monkeypatch):
    monkeypatch.setenv("HPO_STORAGE", database)
    monkeypatch.setenv("HPO_DATA", str(project / "data"))
    settings = ["--set", "training.epochs=1"]
    code, output = _hpo("begin", "digits-mlp", "--trials", "2", *settings, "--json")
    assert code == 0, output
    assert json.loads(output)["budget"] == 2
    (known,) = json.loads(_hpo("status", "--json")[1])
    assert (known["study"], known["supervisors"]) == ("digits-mlp", [])
    code, output = _hpo("worker", "digits-mlp", "--workers", "0", "--quiet")
    assert code == 0, output
    assert "2 of 2 trials" in output
