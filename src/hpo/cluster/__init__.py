"""Workers of a study as a SLURM array, submitted or printed for sbatch, or as a Kubernetes Job, printed."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.distribution import install_command
from hpo.errors import HpoError, redact

_MINUTES = 240  # of a job, by default
_ASK = 10.0  # seconds between questions to SLURM, which serves many users
_NOTICE = 90  # seconds between SIGTERM and the end of a job's time
# Parameters that only submitit's own script can have.
_NOT_PRINTED = ("stderr_to_stdout", "teardown", "use_srun", "wckey")


def read_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Parameters of submitit, from texts such as `slurm_partition=gpu`, `timeout_min=60`, `setup=["module load cuda"]`.

    A value that is JSON is read as such; slurm_ may be left out. Raises HpoError where submitit does not know one, or
    is not installed.
    """
    from_all, of_slurm = _known()
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not value:
            raise HpoError(f"--slurm {text}: has no value.", "Write KEY=VALUE, such as --slurm timeout_min=60")
        bare = key.removeprefix("slurm_")
        if bare not in from_all | of_slurm:
            close = difflib.get_close_matches(bare, sorted(from_all | of_slurm), n=1)
            meant = f"Did you mean {close[0]}? " if close else ""
            raise HpoError(
                f"--slurm {key}: submitit knows no such parameter.",
                f"{meant}Choose one of: {', '.join(sorted(from_all | of_slurm))}; others of sbatch: "
                """--slurm 'additional_parameters={"reservation": "r1"}'""",
            )
        name = bare if bare in from_all else f"slurm_{bare}"
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
        wanted = {"slurm_setup": list, "slurm_srun_args": list, "slurm_additional_parameters": dict}.get(name)
        if wanted is not None and not isinstance(settings[name], wanted):
            example = '{"reservation": "r1"}' if wanted is dict else '["module load cuda"]'
            raise HpoError(f"--slurm {text}: is not a JSON {wanted.__name__}.", f"Write: --slurm '{bare}={example}'")
    return settings


class Jobs:
    """The jobs of one array, or processes of this machine for submitit's local cluster. folder holds their logs."""

    def __init__(self, jobs: Sequence[Any], folder: Path, *, cluster: str) -> None:
        self.folder = folder
        self._jobs, self._cluster = jobs, cluster
        self._array = str(jobs[0].job_id).partition("_")[0]
        self._ask_at, self._any_left = 0.0, True

    def __len__(self) -> int:
        return len(self._jobs)

    def __str__(self) -> str:
        return f"{len(self)} jobs of array {self._array}" if len(self) > 1 else f"job {self._array}"

    @property
    def names(self) -> tuple[str, ...]:
        """The scheduler's name of each job."""
        return tuple(str(job.job_id) for job in self._jobs)

    def left(self) -> bool:
        """True while a job is waiting or running; also while SLURM, asked every 10 s at most, does not answer."""
        if self._cluster != "slurm":
            return not all(job.done() for job in self._jobs)
        if self._any_left and time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + _ASK
            # Not sacct, which submitit asks: it needs an accounting database.
            asked = _call("squeue", "--noheader", "--format=%T", f"--jobs={self._array}")
            gone = asked.returncode != 0 and "Invalid job id" in asked.stderr
            self._any_left = not gone and (asked.returncode != 0 or bool(asked.stdout.strip()))
        return self._any_left

    def cancel(self, *, waiting: bool = False) -> None:
        """End the jobs, with SIGTERM first; waiting: only those that have not begun."""
        if self._cluster == "slurm":
            _call("scancel", *["--state=PENDING"] * waiting, self._array)
        elif not waiting:
            for job in self._jobs:
                job.cancel(check=False)

    def end_of_log(self, *, lines: int = 3) -> str:
        """The name and the last lines of the newest log that is not empty, without secrets; "" where there is none."""
        logs = [path for name in self.names for path in self.folder.glob(f"{name}_*_log.*")]
        for path in sorted(logs, key=lambda path: (path.suffix == ".err", path.stat().st_mtime), reverse=True):
            content = map(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines())
            words = [line for line in content if line and not line.startswith("submitit")]
            if words:
                return redact(f"{path.name}: {' / '.join(words[-lines:])}")
        return ""


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the command is ours


def submit(
    command: Sequence[str],
    *,
    name: str,
    workers: int,
    folder: Path,
    settings: Mapping[str, Any],
    cluster: str = "slurm",
) -> Jobs:
    """Submit one array of `workers` jobs that each become the command.

    Scripts and logs are in folder, which all machines must see. sbatch passes this process's environment to the jobs:
    addresses and passwords are in no command and in no file. cluster is submitit's: slurm, or
    local for processes of this machine. Raises HpoError.
    """
    from submitit import AutoExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    extra = {"signal": f"TERM@{settings.get('slurm_signal_delay_s', _NOTICE)}"}
    chosen = {"name": f"hpo-{name}", "timeout_min": _MINUTES, "slurm_array_parallelism": workers, **settings}
    chosen["slurm_additional_parameters"] = {**extra, **settings.get("slurm_additional_parameters", {})}
    logging.getLogger("submitit").setLevel(logging.ERROR)
    try:
        executor = AutoExecutor(folder, cluster=cluster)
        executor.update_parameters(**chosen)
        # exec: no process of submitit stays between SLURM's signals and the worker, which handles them.
        jobs = executor.map_array(os.execv, [command[0]] * workers, [list(command)] * workers)
    except (AssertionError, NameError, TypeError, ValueError, FailedJobError, FailedSubmissionError) as error:
        raise HpoError(
            f"--engine slurm: the jobs were not submitted: {error}", "Fix what it names, and run this again."
        ) from None
    except RuntimeError as error:
        raise HpoError(
            f"--engine slurm: {error}", "Submit on a login node of the cluster, or print the script: --print"
        ) from None
    except FileNotFoundError as error:
        raise HpoError(f"--engine slurm: {error.filename}: not found.", "Submit on a login node, or: --print") from None
    return Jobs(jobs, folder, cluster=cluster)


def worker_command(study: str, options: Sequence[str], *, home: Path) -> list[str]:
    """The command of `hpo worker` in this interpreter; home is the folder that holds mlruns."""
    return [sys.executable, "-u", "-m", "hpo", "worker", study, *options, "--home", str(home)]


def script(study: str, options: Sequence[str], *, workers: int, settings: Mapping[str, Any]) -> str:
    """A script for sbatch that starts the workers: an array of `workers` jobs. Raises HpoError."""
    odd = [key for key in settings if key.removeprefix("slurm_") in _NOT_PRINTED]
    if odd:
        raise HpoError(f"--slurm {odd[0]}: is not possible in a printed script.", "Leave it out and edit the script.")
    flagged = {_FLAGS.get(key, key.removeprefix("slurm_")): value for key, value in settings.items()}
    if "mem_gb" in flagged:
        flagged["mem"] = f"{int(1024 * flagged.pop('mem_gb'))}M"
    parallel, notice = flagged.pop("array_parallelism", None), flagged.pop("signal_delay_s", _NOTICE)
    setup, arguments = flagged.pop("setup", []), map(str, flagged.pop("srun_args", []))
    flags = {
        "job_name": re.sub(r"[^\w.-]", "-", f"hpo-{study}"),
        "array": f"0-{workers - 1}" + (f"%{parallel}" if parallel else ""),
        "output": "%x-%A_%a.log",
        "open_mode": "append",
        "requeue": True,
        "signal": f"TERM@{notice}",
        "time": _MINUTES,
        **flagged.pop("additional_parameters", {}),
        **flagged,
    }
    return _SCRIPT.format(
        workers=workers,
        study=study,
        flags="\n".join(f"#SBATCH --{_flag(key, value)}" for key, value in flags.items()),
        setup="".join(f"{line}\n" for line in [*setup, ""] if setup),
        command=shlex.join(["srun", *arguments, "hpo", "worker", study, *options]),
    )


_FLAGS = {"timeout_min": "time", "name": "job_name", "tasks_per_node": "ntasks_per_node"}
_SCRIPT = """\
#!/bin/bash
# {workers} workers of the study {study}. Once, before: hpo begin {study}
# Then, in the folder that holds mlruns: sbatch THIS_FILE. The workers find the stores in hpo.toml there, or in
# HPO_STORAGE and MLFLOW_TRACKING_URI: sbatch passes on the environment in which it is called.
{flags}

{setup}# SIGTERM comes before the time is up, and before a preemption. The worker then stops its
# trials and ends; the shell waits for it. Other workers resume them, or this job once SLURM has queued it again.
trap : TERM
{command} --home "${{SLURM_SUBMIT_DIR:-.}}"
"""


def _flag(key: str, value: Any) -> str:
    return key.replace("_", "-") + ("" if value is True else f"={shlex.quote(str(value))}")


def _known() -> tuple[set[str], set[str]]:
    """The names of submitit's parameters: those of every cluster, and SLURM's own without slurm_."""
    try:
        from submitit import AutoExecutor, SlurmExecutor
    except ImportError:
        hint = f"Install it: {install_command('postgres', 'slurm')}"
        raise HpoError("--engine slurm: submitit is not installed.", hint) from None
    return set(AutoExecutor._typed_parameters()), set(SlurmExecutor._valid_parameters())


_SIZE = re.compile(r"[0-9]+(\.[0-9]+)?([EPTGM]i?|Ki|k)?")
_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
_LONGEST = 50  # letters of a Job's name: pods add an index and five letters, and have at most 63
_GRACE = 60  # seconds in which a worker stops its trials
_RETRIES = 6


@dataclass(frozen=True)
class Pods:
    """The number of pods, their image, and the resources of each; sizes as Kubernetes writes them.

    secret is the name of the Secret that holds HPO_STORAGE and MLFLOW_TRACKING_URI.
    """

    image: str
    workers: int = 4
    cpus: int = 4
    memory: str = "8Gi"
    gpus: int = 0
    scratch: str = "20Gi"
    secret: str = "hpo-stores"  # noqa: S105 - its name

    def check(self) -> Pods:
        """Returns itself. Raises HpoError for what Kubernetes would refuse."""
        for option, size in (("--memory", self.memory), ("--scratch", self.scratch)):
            if not _SIZE.fullmatch(size):
                raise HpoError(
                    f"{option} {size}: is not an amount of bytes.", "Write it as Kubernetes does: 8Gi, 500Mi"
                )
        if not _NAME.fullmatch(self.secret):
            raise HpoError(
                f"--secret {self.secret}: is not a name in Kubernetes.", "Use small letters, digits, - and ."
            )
        if not self.image or re.search(r"\s", self.image):
            raise HpoError(f"--image {self.image!r}: is not the name of an image.", "Write REGISTRY/NAME:TAG")
        return self


def manifest(study: str, pods: Pods, *, options: Sequence[str] = ()) -> str:
    """YAML of a Job of `hpo worker`, options included, with comments on how to use it. Raises HpoError."""
    import yaml

    comments = [
        f"Workers of the study {study}. Once, before: hpo begin {study}, from wherever the storage is reached.",
        f"The Secret {pods.secret} holds HPO_STORAGE and MLFLOW_TRACKING_URI; stores.env has one NAME=VALUE a line:",
        f"kubectl create secret generic {pods.secret} --from-env-file=stores.env",
    ]
    body = yaml.safe_dump(_job(study, pods.check(), options), sort_keys=False, width=120)
    return "".join(f"# {line}\n" for line in comments) + body


def _job(study: str, pods: Pods, options: Sequence[str]) -> dict[str, Any]:
    """The Job, as the API batch/v1 takes it (Kubernetes 1.29 and later)."""
    amounts = {"cpu": str(pods.cpus), "memory": pods.memory}
    if pods.gpus:
        amounts["nvidia.com/gpu"] = str(pods.gpus)
    stores = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": pods.secret, "key": name}}}
        for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI")
    ]
    folders = [{"name": "HPO_HOME", "value": "/scratch/home"}, {"name": "HPO_DATA", "value": "/scratch/data"}]
    container = {
        "name": "worker",
        "image": pods.image,
        "command": ["hpo", "worker", study, *options],
        "env": [*stores, *folders],
        # It requests its limits: pods that use more than they requested are evicted first.
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    }
    # A spot machine that is taken away counts as no failure. After `hpo stop` (exit code 130) pods are not restarted.
    # Other failures may come from a store that is unavailable: they are tried again, later each time.
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailIndex", "onExitCodes": {"containerName": "worker", "operator": "In", "values": [130]}},
    ]
    labels = {"app.kubernetes.io/name": "hpo", "app.kubernetes.io/component": "worker"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job_name(study), "labels": dict(labels)},
        "spec": {
            "completionMode": "Indexed",
            "completions": pods.workers,
            "parallelism": pods.workers,
            "backoffLimitPerIndex": _RETRIES,
            "podFailurePolicy": {"rules": rules},
            "template": {
                "metadata": {"labels": dict(labels)},
                "spec": {
                    "restartPolicy": "Never",
                    "terminationGracePeriodSeconds": _GRACE,
                    "automountServiceAccountToken": False,
                    "containers": [container],
                    "volumes": [{"name": "scratch", "emptyDir": {"sizeLimit": pods.scratch}}],
                },
            },
        },
    }


def job_name(study: str) -> str:
    """The Job's name: hpo- and the study's name, in the letters that Kubernetes allows."""
    return f"hpo-{re.sub('[^a-z0-9]+', '-', study.lower())}"[:_LONGEST].strip("-")
