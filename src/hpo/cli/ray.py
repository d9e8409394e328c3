"""The options of `hpo run` that choose where its workers live."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hpo.execute.engines.ray_cluster import RayOptions


class EngineName(StrEnum):
    """Where workers live."""

    PROCESSES = "processes"
    RAY = "ray"
    SLURM = "slurm"
    KUBERNETES = "kubernetes"  # which says where else to look


Engine = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        metavar="processes|ray|slurm",
        help="Processes of this machine, actors of a Ray cluster, or jobs of a SLURM array.",
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT", help="The Ray cluster.", show_default="$RAY_ADDRESS, or a Ray of this run's own"
    ),
]
GpusPerTrial = Annotated[
    float | None,
    typer.Option(metavar="N", help="GPUs of a Ray worker, such as 0.25.", show_default="1 if the cluster has any"),
]
CpusPerTrial = Annotated[float | None, typer.Option(metavar="N", help="CPU cores of a Ray worker.", show_default="1")]


def read_ray(
    engine: EngineName, *, address: str | None, gpus_per_trial: float | None, cpus_per_trial: float | None
) -> tuple[RayOptions | None, list[str]]:
    """What these options say of Ray, None where it is another engine; and the options that say it again."""
    given = {"--address": address, "--gpus-per-trial": gpus_per_trial, "--cpus-per-trial": cpus_per_trial}
    said = {option: value for option, value in given.items() if value is not None}
    if engine is not EngineName.RAY:
        for option in said:
            raise typer.BadParameter("is for --engine ray only", param_hint=option)
        return None, []
    from hpo.execute.engines.ray_cluster import RayOptions

    words = [word for option, value in said.items() for word in (option, str(value))]
    cpus = 1.0 if cpus_per_trial is None else cpus_per_trial
    return RayOptions(address, cpus_per_trial=cpus, gpus_per_trial=gpus_per_trial), ["--engine", "ray", *words]
