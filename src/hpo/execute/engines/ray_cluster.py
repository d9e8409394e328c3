"""The Ray cluster that a study trains on: connected or started, and the number of workers that fit on it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.data.cache import models_folder
from hpo.distribution import install_command
from hpo.errors import HpoError
from hpo.execute.engines.base import StudyWork, WorkerPlan
from hpo.execute.engines.ray import RayActors
from hpo.execute.process import cores
from hpo.execute.workers.ray_actor import WorkerSetup, read_files
from hpo.options import RunOptions
from hpo.spec.models import TransferSpec

_NO_GPU = "Add nodes with GPUs, or train on CPUs: leave --device and --gpus-per-trial out."
_CONNECT_TIMEOUT = 5.0  # seconds
_START = "Start one on the first machine: ray start --head --port 6379, and give its address: --address HOST:6379"


@dataclass(frozen=True)
class RayOptions:
    """The Ray cluster, and what each worker needs of it.

    address is HOST:PORT of a running cluster, or auto for the one that this machine belongs to; None: that of the
    environment variable RAY_ADDRESS, else a Ray of its own on this machine, which ends with the run. Each worker has
    cpus_per_trial cores and gpus_per_trial of a GPU (None: one, if the cluster has any and the device allows it).
    """

    address: str | None = None
    cpus_per_trial: float = 1.0
    gpus_per_trial: float | None = None

    def __post_init__(self) -> None:
        if not self.cpus_per_trial > 0:
            raise HpoError(f"--cpus-per-trial {self.cpus_per_trial:g}: is not positive.", "Give 0.5, 1 or 2, say.")
        gpus = self.gpus_per_trial or 0.0
        if not gpus >= 0 or (gpus > 1 and gpus % 1):
            raise HpoError(
                f"--gpus-per-trial {gpus:g}: Ray gives a share of one GPU, or several whole ones.",
                "Give 0, 0.25, 0.5, 1 or 2, say.",
            )

    @property
    def resolved_address(self) -> str:
        """HOST:PORT, auto or local."""
        default = os.environ.get("RAY_ADDRESS")
        return (default or "auto") if self.address == "auto" else self.address or default or "local"

    def check(self) -> None:
        """Raise HpoError where Ray is not installed or nothing answers at the address: Ray itself tries for minutes."""
        if importlib.util.find_spec("ray") is None:
            raise HpoError("Ray is not installed.", f"Install it: {install_command('ray')}")
        if self.resolved_address not in ("auto", "local"):
            _check_address(self.resolved_address)


class Cluster:
    """A cluster that this process is connected to. device is the kind of its workers' devices: cpu or cuda.

    Raises HpoError where Ray is not installed, or no cluster answers.
    """

    def __init__(self, options: RayOptions, *, device: str = "auto") -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise HpoError(f"--device {device}: Ray chooses which GPU a worker has.", "Choose one of: auto, cpu, cuda.")
        options.check()
        # Otherwise Ray, under `uv run`, sends the working folder with .venv and mlruns to every node, and workers run
        # that copy. Ray reads these variables when it is imported.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray, self._own = ray, not ray.is_initialized()
        if self._own:
            _connect(ray, options.resolved_address)
        try:
            self._nodes: list[Mapping[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self.cpus, self.gpus = options.cpus_per_trial, self._share_of_gpu(options.gpus_per_trial, device)
        except BaseException:
            self.close()
            raise
        self.device = "cuda" if self.gpus else "cpu"

    def _share_of_gpu(self, asked: float | None, device: str) -> float:
        has_gpu = any(node.get("GPU") for node in self._nodes)
        share = (1.0 if has_gpu and device != "cpu" else 0.0) if asked is None else asked
        if (device == "cpu" and share) or (device == "cuda" and asked == 0):
            raise HpoError(f"--device {device}: and --gpus-per-trial {share:g}.", "Leave one of them out.")
        if device == "cuda" and not share:
            raise HpoError("--device cuda: no node of the Ray cluster has a GPU.", _NO_GPU)
        return share

    def __str__(self) -> str:
        """The cluster in words: cpu on 3 Ray nodes."""
        return f"{self.device} on {len(self._nodes)} Ray node{'s' if len(self._nodes) > 1 else ''}"

    def fit(self, workers: int | None, *, most: int) -> int:
        """The number of workers: `workers`, by default as many as fit on all nodes; `most` at most.

        Raises HpoError where no node could ever hold one.
        """
        room = sum(worker_count(node, cpus=self.cpus, gpus=self.gpus) for node in self._nodes)
        if not room:
            cpus, gpus = (max(node.get(name, 0) for node in self._nodes) for name in ("CPU", "GPU"))
            wanted = f"--cpus-per-trial {self.cpus:g}" + f" --gpus-per-trial {self.gpus:g}" * bool(self.gpus)
            raise HpoError(
                f"{wanted}: no node of the Ray cluster has so much (at most {cpus:g} CPUs, {gpus:g} GPUs).",
                _NO_GPU if self.gpus and not gpus else "Ask for less, or add a larger node to the cluster.",
            )
        return max(1, min(room if workers is None else workers, most))

    def close(self) -> None:
        """Disconnect; a Ray that was started for this run ends. What was connected before stays so."""
        if self._own:
            self._ray.shutdown()


class RayFactory:
    """The engine of --engine ray."""

    stacks = False
    device = "cpu"  # the supervisor's machine may have no GPU; each node checks its own

    def __init__(self, options: RunOptions) -> None:
        if options.workers == 0 or (options.stack or 1) > 1:
            option = "--workers 0" if options.workers == 0 else f"--stack {options.stack}"
            raise HpoError(f"{option}: is not for Ray, whose workers train one candidate each.", "Leave it out.")
        self._workers, self._worker_device = options.workers, options.device
        cpus = 1.0 if options.cpus_per_trial is None else options.cpus_per_trial
        self._options = RayOptions(options.address, cpus_per_trial=cpus, gpus_per_trial=options.gpus_per_trial)
        self._options.check()
        self._cluster: Cluster | None = None

    def connect(self) -> None:
        """Connect to the cluster, or start one."""
        self._cluster = Cluster(self._options, device=self._worker_device)

    def plan(self, devices: Sequence[str], *, most: int) -> WorkerPlan:  # noqa: ARG002 - those of this machine
        """As many workers as were asked for, or as fit on all nodes."""
        assert self._cluster is not None  # noqa: S101 - connect comes first
        chosen = (self._cluster.device,) * self._cluster.fit(self._workers, most=most)
        ranks = max(1, int(self._cluster.gpus))
        return WorkerPlan(chosen, max(1, cores() // len(chosen)), str(self._cluster), ranks)

    def start(self, plan: WorkerPlan, work: StudyWork, *, stack: int) -> RayActors:  # noqa: ARG002 - it is always 1
        """Start the actors; the models that networks start from go with them."""
        assert self._cluster is not None  # noqa: S101 - connect comes first
        spec, cluster = work.spec, self._cluster
        source = spec.model.from_model if isinstance(spec.model, TransferSpec) else ""
        name = source.removeprefix("models:/")
        models = {name: read_files(models_folder() / name)} if name else {}
        needs = WorkerSetup(spec.data, spec.split, work.data, models)
        return RayActors(needs, slots=len(plan.devices), cpus=cluster.cpus, gpus=cluster.gpus, notify=work.notify)

    def close(self) -> None:
        """Disconnect."""
        if self._cluster is not None:
            self._cluster.close()


def worker_count(node: Mapping[str, float], *, cpus: float, gpus: float) -> int:
    """The number of workers that fit on a node; a share of a GPU lies on one GPU."""
    count = int(node.get("CPU", 0.0) / cpus + 1e-6)
    if not gpus:
        return count
    there = node.get("GPU", 0.0)
    return min(count, int(there) * int(1 / gpus + 1e-6) if gpus < 1 else int(there / gpus + 1e-6))


def _connect(ray: Any, address: str) -> None:
    """Connect this process to the cluster, or start one, without output. Raises HpoError."""
    own = {"num_cpus": cores(), "include_dashboard": False} if address == "local" else {}
    try:
        with _own_signals():
            _silence_raylets(ray)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        where = "there is no Ray cluster on this machine" if address == "auto" else f"Ray did not connect: {lines[0]}"
        raise HpoError(f"--address {address}: {where}", _START) from None


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        raise HpoError(
            f"--address {address}: is not HOST:PORT.",
            "Run this on a machine of the cluster, and give the address of its head, such as 10.0.0.5:6379, or auto.",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT).close()
    except (OSError, OverflowError) as error:
        raise HpoError(f"--address {address}: no Ray cluster answers: {error}.", _START) from None


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Restore this process's SIGTERM handler, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _silence_raylets(ray: Any) -> None:
    """Keep the messages of raylets about dead workers from standard output, where --json is read by machines.

    Ray has no option for that.
    """
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *_arguments, **_options: None
