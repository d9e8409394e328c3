"""Studies on a cluster: `hpo begin`, `hpo manifest`, and `hpo run --engine slurm`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.cli.display import output
from hpo.cli.options import (
    AsJson,
    Debug,
    DeviceName,
    Fresh,
    HomeFolder,
    KeepModels,
    PrecisionName,
    RetryFailed,
    Settings,
    Study,
    Trials,
    Trust,
    read_stack,
    study_name,
)
from hpo.records import Event, Notice

if TYPE_CHECKING:
    from pathlib import Path

    from hpo.cli.display.live import Watcher
    from hpo.spec.study import StudySpec

SlurmSettings = Annotated[
    list[str] | None,
    typer.Option("--slurm", metavar="KEY=VALUE", help="A parameter of submitit: partition=gpu, timeout_min=60, ..."),
]
Detach = Annotated[bool, typer.Option("--detach", help="Submit the jobs and return.")]
PrintScript = Annotated[bool, typer.Option("--print", help="Print a script for sbatch, and submit nothing.")]


def on_slurm(engine: str, study: str, *, alone: Mapping[str, object], never: Mapping[str, object]) -> bool:
    """Whether the study runs as jobs of an array.

    alone maps options that are for arrays only to what was given, never those that are not for them. Raises HpoError.
    """
    from hpo.errors import HpoError

    if engine == "kubernetes":
        raise HpoError(
            "--engine kubernetes: is a manifest.", f"Print it: hpo manifest {shlex.quote(study)} --image IMAGE"
        )
    array = engine == "slurm"
    for option in (name for name, given in (never if array else alone).items() if given):
        hint = "Leave it out; how long a job may take: --slurm timeout_min=60" if array else "Add: --engine slurm"
        raise HpoError(f"{option}: is {'not' if array else 'only'} for --engine slurm.", hint)
    return array


def engine_options(engine: str, workers: int | None, slurm: Sequence[str]) -> list[str]:
    """What says again where a study runs."""
    if engine != "slurm":
        return []
    return ["--engine", engine, "--workers", str(workers), *(part for text in slurm for part in ("--slurm", text))]


def run_slurm(
    spec: StudySpec,
    watcher: Watcher,
    *,
    workers: int | None,
    slurm: Sequence[str],
    options: Sequence[str],
    home: Path | None,
    detach: bool,
    printed: bool,
    as_json: bool,
    **begin: Any,
) -> int:
    """Submit the study's workers, or print the script that does; returns the exit code."""
    from hpo.cluster.slurm import read_settings, script
    from hpo.errors import HpoError

    if not workers:
        raise HpoError("--engine slurm: how many jobs?", "Say it: --workers 8")
    if printed:
        output.print_text(script(spec.name, options, workers=workers, settings=read_settings(slurm)).rstrip())
        return 0
    with watcher as watch:
        from hpo.cluster.submit import Submitted, run_array

        done = run_array(
            spec, workers=workers, settings=slurm, options=options, home=home, detach=detach, watch=watch, **begin
        )
    if not isinstance(done, Submitted):
        return watch.exit_code
    place = f" --home {shlex.quote(str(home))}" if home else ""
    if as_json:
        output.print_json({"event": "submitted", **output.plain(done)}, indent=None)
    else:
        output.print_text(f"Look: hpo status {done.study}{place}; end it: hpo stop {done.study}{place}")
    return 0


def begin(
    study: Study,
    trials: Trials = None,
    settings: Settings = None,
    trust: Trust = False,
    home: HomeFolder = None,
    fresh: Fresh = False,
    retry_failed: RetryFailed = False,
    keep_models: KeepModels = None,
    precision: PrecisionName = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Begin a study on a shared storage, for `hpo worker` to join: check its data, write its record, train nothing."""
    from hpo.spec.load import load_study

    spec = load_study(study, overrides=settings or [], trust=trust)
    from hpo.cluster.begin import begin_study

    opened = begin_study(
        spec,
        trials=trials,
        home=home,
        fresh=fresh,
        retry_failed=retry_failed,
        keep_models=keep_models,
        precision=precision,
        watch=None if as_json else _say,
    )
    title = opened.study.title
    if as_json:
        output.print_json(
            {"study": title, "budget": opened.budget, "finished": opened.finished, "data": opened.data.digest}
        )
        return
    output.print_text(f"{title} has begun: {opened.finished} of {opened.budget} trials are done.")
    output.print_text(f"Take part, on any machine that reaches the storage: hpo worker {spec.name}")


def _say(event: Event) -> None:
    if isinstance(event, Notice) and not event.total:
        typer.echo(event.text, err=True)


def manifest(
    study: Study,
    image: Annotated[str, typer.Option("--image", metavar="IMAGE", help="Container image with hpo[postgres] in it.")],
    workers: Annotated[int, typer.Option(min=1, help="Pods.")] = 4,
    cpus: Annotated[int, typer.Option(min=1, help="Cores of each, and workers without a GPU.")] = 4,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of each.")] = "8Gi",
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each.")] = 0,
    scratch: Annotated[str, typer.Option(metavar="SIZE", help="Disk of each, for images and work.")] = "20Gi",
    secret: Annotated[
        str, typer.Option(metavar="NAME", help="Secret with HPO_STORAGE and MLFLOW_TRACKING_URI.")
    ] = "hpo-stores",  # noqa: S107 - its name
    device: DeviceName = "auto",
    trust: Trust = False,
    _debug: Debug = False,
) -> None:
    """Print a Kubernetes Job of workers for a study that has begun (hpo begin), for kubectl apply."""
    from hpo.cluster.kubernetes import Pods
    from hpo.cluster.kubernetes import manifest as print_manifest

    pods = Pods(image, workers, cpus, memory, gpus, scratch, secret)
    output.print_text(
        print_manifest(
            study_name(study), pods, options=worker_options(device=device, stack="auto", trust=trust)
        ).rstrip()
    )


def worker_options(*, device: str, stack: str, trust: bool) -> list[str]:
    """What of the command line `hpo worker` is to be told."""
    read_stack(stack)
    said = ["--device", device] if device != "auto" else []
    return said + (["--stack", stack] if stack != "auto" else []) + ["--trust"] * trust
