"""Studies on a cluster: `hpo begin`, `hpo worker`, `hpo manifest`, and `hpo run --engine slurm`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli import output
from hpo.cli.options import (
    AsEvents,
    AsJson,
    Debug,
    DeviceName,
    Extend,
    Fresh,
    GpusPerTrial,
    HomeFolder,
    KeepModels,
    PrecisionName,
    Quiet,
    RetryFailed,
    Settings,
    StackSize,
    Study,
    Timeout,
    Trials,
    Trust,
    Workers,
    home_flag,
    study_name,
)
from hpo.events import Event, Notice
from hpo.options import RunOptions

if TYPE_CHECKING:
    from hpo.cli.live import Watcher
    from hpo.spec.study import StudySpec


def run_slurm(spec: StudySpec, options: RunOptions, watcher: Watcher, *, as_json: bool) -> int:
    """Submit the study's workers, or print the script that does; returns the exit code."""
    from hpo.errors import HpoError

    if not options.workers:
        raise HpoError("--engine slurm: the number of jobs is missing.", "Give it: --workers 8")
    if options.print_script:
        from hpo.cluster import read_settings, script

        flags, settings = options.of_worker().flags(), read_settings(options.slurm)
        output.print_text(script(spec.name, flags, workers=options.workers, settings=settings).rstrip())
        return 0
    with watcher as watch:
        from hpo.cluster.shared_study import Submitted, run_array

        done = run_array(spec, options, watch=watch)
    if not isinstance(done, Submitted):
        return watch.exit_code
    home = home_flag(options.home)
    if as_json:
        output.print_json({"event": "submitted", **output.plain(done)}, indent=None)
    else:
        output.print_message(f"Progress: hpo status {done.study}{home}; stop it: hpo stop {done.study}{home}")
    return 0


def begin(
    study: Study,
    trials: Trials = None,
    settings: Settings = None,
    trust: Trust = False,
    home: HomeFolder = None,
    fresh: Fresh = False,
    extend: Extend = False,
    retry_failed: RetryFailed = False,
    keep_models: KeepModels = None,
    precision: PrecisionName = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Create a study on a shared storage, for `hpo worker` to join: check its data, but train nothing."""
    options = RunOptions.pick(locals())
    from hpo.spec.load import load_study

    spec = load_study(study, overrides=options.settings, trust=trust)
    from hpo.cluster.shared_study import begin_study

    opened = begin_study(spec, options, watch=None if as_json else _print_notice)
    title = opened.study.title
    if as_json:
        output.print_json(
            {"study": title, "budget": opened.budget, "finished": opened.finished, "data": opened.data.digest}
        )
        return
    output.print_message(f"{title} is ready for workers: {opened.finished} of {opened.budget} trials are done.")
    output.print_message(f"Join it on any machine that reaches the storage: hpo worker {spec.name}")


def _print_notice(event: Event) -> None:
    if isinstance(event, Notice) and not event.total:
        output.print_progress(event.text)


def manifest(
    study: Study,
    image: Annotated[
        str, typer.Option("--image", metavar="IMAGE", help="Container image of the workers: Containerfile.")
    ],
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Number of pods.")] = 4,
    cpus: Annotated[
        int, typer.Option(metavar="N", min=1, help="Cores of each pod; without a GPU also its workers.")
    ] = 4,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="Memory of each pod.")] = "8Gi",
    gpus: Annotated[int, typer.Option(metavar="N", min=0, help="GPUs of each pod.")] = 0,
    scratch: Annotated[str, typer.Option(metavar="SIZE", help="Disk of each pod, for images and work files.")] = "20Gi",
    secret: Annotated[
        str, typer.Option(metavar="NAME", help="Secret with HPO_STORAGE and MLFLOW_TRACKING_URI.")
    ] = "hpo-stores",  # noqa: S107 - its name
    device: DeviceName = "auto",
    trust: Trust = False,
    _debug: Debug = False,
) -> None:
    """Print a Kubernetes Job of workers, for kubectl apply. Create the study first: hpo begin."""
    from hpo.cluster import Pods
    from hpo.cluster import manifest as print_manifest

    pods = Pods(image, workers, cpus, memory, gpus, scratch, secret)
    flags = RunOptions(device=device, trust=trust).flags()
    output.print_text(print_manifest(study_name(study), pods, options=flags).rstrip())


def worker(
    study: Annotated[
        str, typer.Argument(metavar="STUDY", help="The name of a study in the storage.", show_default=False)
    ],
    workers: Workers = None,
    stack: StackSize = None,
    device: DeviceName = "auto",
    gpus_per_trial: GpusPerTrial = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="PLACE=VALUE", help="An entry that differs on this machine: data.path=/scratch/x.npz"
        ),
    ] = None,
    trust: Trust = False,
    home: HomeFolder = None,
    timeout: Timeout = None,
    as_json: AsEvents = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train trials of a study that runs on a shared storage, until its budget is spent.

    Start any number of workers, on any machine that reaches the storage (HPO_STORAGE, or hpo.toml). After Ctrl-C,
    SIGTERM or a kill another worker retries the interrupted trials. The images must be those of the study.
    """
    options = RunOptions.pick(locals())
    from hpo.cli.live import watcher
    from hpo.cli.run_summary import NextCommands

    commands = NextCommands("worker", study, options.to_resume(), RunOptions(home=home))
    with watcher(as_json=as_json, quiet=quiet)(commands, debug=debug) as watch:
        from hpo.cluster.shared_study import join_study

        join_study(study, options, watch=watch)
    raise typer.Exit(watch.exit_code)
