"""The Ray cluster that a study trains on: found or started, and how many workers it has room for."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hpo.data.prepare import models_folder
from hpo.errors import HpoError
from hpo.execute.engines.ray import RayActors
from hpo.execute.process import cores
from hpo.execute.workers.ray_actor import Ground, read_files
from hpo.records import DataCard
from hpo.spec.pretrained import TransferSpec
from hpo.spec.study import StudySpec

_NO_GPU = "Add nodes with GPUs, or train on CPUs: leave --device and --gpus-per-trial out."
_KNOCK = 5.0  # seconds
_START = "Start one on the first machine: ray start --head --port 6379, and give its address: --address HOST:6379"


@dataclass(frozen=True)
class RayOptions:
    """How Ray is to place the workers.

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
    def place(self) -> str:
        """HOST:PORT, auto or local."""
        said = os.environ.get("RAY_ADDRESS")
        return (said or "auto") if self.address == "auto" else self.address or said or "local"

    def knock(self) -> None:
        """Raise HpoError where Ray is not installed or nothing answers at the address: Ray itself tries for minutes."""
        if importlib.util.find_spec("ray") is None:
            raise HpoError("Ray is not installed.", 'Install it: pip install "hpo[ray]"')
        if self.place not in ("auto", "local"):
            _knock(self.place)


class Cluster:
    """A cluster that this process is connected to. device is the kind of its workers' devices: cpu or cuda.

    Raises HpoError where Ray is not installed, or no cluster answers.
    """

    def __init__(self, options: RayOptions, *, device: str = "auto") -> None:
        if device not in ("auto", "cpu", "cuda"):
            raise HpoError(f"--device {device}: Ray chooses which GPU a worker has.", "Choose one of: auto, cpu, cuda.")
        options.knock()
        # Else, under `uv run`, Ray sends the working folder to every node, with its .venv, mlruns and whatever lies
        # there, and workers run what was sent, which is gone when a node is. It reads these when it is imported.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        self._ray, self._ours = ray, not ray.is_initialized()
        if self._ours:
            _connect(ray, options.place)
        try:
            self._nodes: list[Mapping[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self.cpus, self.gpus = options.cpus_per_trial, self._share_of_gpu(options.gpus_per_trial, device)
        except BaseException:
            self.close()
            raise
        self.device = "cuda" if self.gpus else "cpu"

    def _share_of_gpu(self, asked: float | None, device: str) -> float:
        here = any(node.get("GPU") for node in self._nodes)
        share = (1.0 if here and device != "cpu" else 0.0) if asked is None else asked
        if (device == "cpu" and share) or (device == "cuda" and asked == 0):
            raise HpoError(f"--device {device}: and --gpus-per-trial {share:g}.", "Leave one of them out.")
        if device == "cuda" and not share:
            raise HpoError("--device cuda: no node of the Ray cluster has a GPU.", _NO_GPU)
        return share

    def __str__(self) -> str:
        """cpu on 3 Ray nodes."""
        return f"{self.device} on {len(self._nodes)} Ray node{'s' if len(self._nodes) > 1 else ''}"

    def fit(self, workers: int | None, *, most: int) -> int:
        """`workers`, by default as many as all nodes have room for when they are empty; `most` at most.

        Raises HpoError where no node could ever hold one.
        """
        room = sum(_room(node, cpus=self.cpus, gpus=self.gpus) for node in self._nodes)
        if not room:
            cpus, gpus = (max(node.get(name, 0) for node in self._nodes) for name in ("CPU", "GPU"))
            wanted = f"--cpus-per-trial {self.cpus:g}" + f" --gpus-per-trial {self.gpus:g}" * bool(self.gpus)
            raise HpoError(
                f"{wanted}: no node of the Ray cluster has so much (at most {cpus:g} CPUs, {gpus:g} GPUs).",
                _NO_GPU if self.gpus and not gpus else "Ask for less, or add a larger node to the cluster.",
            )
        return max(1, min(room if workers is None else workers, most))

    def workers(self, spec: StudySpec, data: DataCard, *, slots: int, say: Callable[[str], None]) -> RayActors:
        """So many workers for a study; data is as the supervisor has it."""
        on = spec.model.from_model if isinstance(spec.model, TransferSpec) else ""
        name = on.removeprefix("models:/")
        models = {name: read_files(models_folder() / name)} if name else {}
        ground = Ground(spec.data, spec.split, data, models)
        return RayActors(ground, slots=slots, cpus=self.cpus, gpus=self.gpus, say=say)

    def close(self) -> None:
        """Disconnect; a Ray that was started for this run ends. What was connected before stays so."""
        if self._ours:
            self._ray.shutdown()


def _room(node: Mapping[str, float], *, cpus: float, gpus: float) -> int:
    """How many workers a node holds; shares of one GPU are never of two."""
    places = int(node.get("CPU", 0.0) / cpus + 1e-6)
    if not gpus:
        return places
    here = node.get("GPU", 0.0)
    return min(places, int(here) * int(1 / gpus + 1e-6) if gpus < 1 else int(here / gpus + 1e-6))


def _connect(ray: Any, place: str) -> None:
    """Connect this process to the cluster there, or start one; quietly. Raises HpoError."""
    own = {"num_cpus": cores(), "include_dashboard": False} if place == "local" else {}
    try:
        with _own_signals():
            _hush(ray)
            ray.init(address=place, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        where = "there is no Ray cluster on this machine" if place == "auto" else f"Ray did not connect: {said[0]}"
        raise HpoError(f"--address {place}: {where}", _START) from None


def _knock(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        raise HpoError(
            f"--address {address}: is not HOST:PORT.",
            "Run this on a machine of the cluster, and give the address of its head, such as 10.0.0.5:6379, or auto.",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK).close()
    except (OSError, OverflowError) as error:
        raise HpoError(f"--address {address}: no Ray cluster answers: {error}.", _START) from None


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray replaces what SIGTERM does to this process; afterwards it does what it did before."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _hush(ray: Any) -> None:
    """Keep what raylets say of dead workers from standard output: the supervisor tells it, and --json is for machines.

    Ray has no option for that.
    """
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *_arguments, **_options: None
