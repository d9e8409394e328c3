"""Arrays of workers: what is asked of SLURM, and what scripts say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpo.cluster import read_settings, script, submit, worker_command
from hpo.cluster.shared_study import run_array
from hpo.errors import HpoError
from hpo.execute.process import cores
from hpo.options import RunOptions
from hpo.spec.load import load_study

PASSWORD = "a-word-that-nobody-sees"  # noqa: S105 - of no server


@pytest.fixture
def bin_folder(tmp_path, monkeypatch) -> Path:
    """A folder where commands are found first; the stores are on a server with a password."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HPO_STORAGE", f"postgresql://hpo:{PASSWORD}@db/hpo")
    return folder


def _command(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def test_settings_are_those_of_submitit_with_or_without_its_prefix():
    texts = ["partition=gpu", "slurm_time=30", "cpus_per_task=4", "mem_gb=2.5", 'setup=["module load cuda"]']
    assert read_settings(texts) == {
        "slurm_partition": "gpu",
        "slurm_time": 30,
        "cpus_per_task": 4,
        "mem_gb": 2.5,
        "slurm_setup": ["module load cuda"],
    }


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("partitoin=gpu", "--slurm partitoin", "partition?"),
        ("gpus_per_nodes=1", "--slurm gpus_per_nodes", "gpus_per_node?"),
        ("time", "has no value", "KEY=VALUE"),
        ("setup=module load cuda", "is not a JSON list", "module load"),
        ("additional_parameters=[1]", "is not a JSON dict", "reservation"),
    ],
)
def test_unknown_setting_is_one_clear_error(text, message, hint):
    with pytest.raises(HpoError, match=message) as error:
        read_settings([text])
    assert hint in error.value.hint


def test_printed_script_parses_asks_for_the_array_and_knows_no_secret_and_no_machine(tmp_path, bin_folder):
    settings = read_settings(
        ["partition=gpu", "timeout_min=60", "mem_gb=2.5", 'setup=["module load a"]', "exclusive=true"]
    )
    text = script("digits-mlp", ["--device", "cuda"], workers=8, settings=settings)
    file = tmp_path / "array.sh"
    file.write_text(text, encoding="utf-8")
    assert subprocess.run(["bash", "-n", file], check=True, capture_output=True).stderr == b""
    flags = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    wanted = {"array=0-7", "time=60", "mem=2560M", "partition=gpu", "signal=TERM@90", "requeue", "exclusive"}
    assert wanted <= set(flags)
    assert text.index("module load a") < text.index("srun hpo worker digits-mlp --device cuda")
    assert PASSWORD not in text
    assert not any(place in text for place in (sys.executable, str(tmp_path), str(Path.cwd())))


def test_printed_script_runs_the_worker_in_the_folder_it_was_submitted_in(tmp_path, bin_folder):
    _command(bin_folder, "srun", 'exec "$@"')
    _command(bin_folder, "hpo", 'echo "$@"')
    text = script("digits-mlp", [], workers=2, settings={})
    done = subprocess.run(
        ["bash", "-c", text], env={"PATH": f"{bin_folder}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": "a b"}, **_CAPTURED
    )
    assert done.stdout == "worker digits-mlp --home a b\n"


_CAPTURED = {"check": True, "capture_output": True, "text": True}


def test_one_array_is_submitted_whose_files_and_commands_hold_no_secret(tmp_path, bin_folder):
    _command(bin_folder, "srun", "")
    _command(
        bin_folder, "sbatch", f'echo "$@" >> {tmp_path}/calls; env > {tmp_path}/environment; echo Submitted batch job 7'
    )
    command = worker_command("digits-mlp", ["--trust"], home=tmp_path)
    folder = tmp_path / "jobs"
    jobs = submit(
        command, name="digits-mlp", workers=3, folder=folder, settings={"slurm_partition": "gpu", "name": "mine"}
    )
    assert jobs.names == ("7_0", "7_1", "7_2")
    assert len((tmp_path / "calls").read_text(encoding="utf-8").splitlines()) == 1
    text = (folder / "7_submission.sh").read_text(encoding="utf-8")
    assert "#SBATCH --array=0-2%3\n" in text
    assert "#SBATCH --job-name=mine\n" in text
    assert "#SBATCH --signal=TERM@90\n" in text
    for file in (tmp_path / "calls", *folder.iterdir()):
        assert PASSWORD.encode() not in file.read_bytes(), file
    # What sbatch hands on to the jobs.
    assert PASSWORD in (tmp_path / "environment").read_text(encoding="utf-8")


def test_jobs_have_ended_when_slurm_says_so_and_not_when_it_does_not_answer(tmp_path, bin_folder, monkeypatch):
    monkeypatch.setattr("hpo.cluster._ASK", 0.0)
    _command(bin_folder, "srun", "")
    _command(bin_folder, "sbatch", "echo Submitted batch job 7")
    jobs = submit(["true"], name="x", workers=2, folder=tmp_path / "jobs", settings={})
    for answer, left in [
        ("echo PENDING", True),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", True),
        ("echo RUNNING", True),
    ]:
        _command(bin_folder, "squeue", answer)
        assert jobs.left() is left
    _command(bin_folder, "squeue", "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    assert not jobs.left()


def test_machine_without_slurm_is_told_where_to_go(tmp_path, bin_folder, monkeypatch):
    monkeypatch.setenv("PATH", str(bin_folder))
    with pytest.raises(HpoError) as error:
        submit(["true"], name="x", workers=2, folder=tmp_path / "jobs", settings={})
    assert "--print" in error.value.hint


def test_refusal_of_sbatch_is_passed_on(tmp_path, bin_folder):
    _command(bin_folder, "srun", "")
    _command(bin_folder, "sbatch", "echo sbatch: error: invalid partition specified: gpu >&2; exit 1")
    with pytest.raises(HpoError, match=r"not submitted.*invalid partition specified: gpu"):
        submit(["true"], name="x", workers=2, folder=tmp_path / "jobs", settings={})


def test_array_needs_a_storage_that_its_jobs_can_share(tmp_path, monkeypatch):
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    with pytest.raises(HpoError) as error:
        run_array(load_study("digits-mlp"), RunOptions(engine="slurm", workers=2, home=tmp_path))
    assert "HPO_STORAGE" in error.value.hint
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize(("said", "count"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", None)])
def test_container_counts_the_cores_that_it_is_given(tmp_path, said, count):
    quota = tmp_path / "cpu.max"
    quota.write_text(said, encoding="ascii")
    assert cores(quota) == (count or cores(tmp_path / "none"))
