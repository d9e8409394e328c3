"""The options that commands share, and one place that prints errors."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hpo.cli import output
from hpo.cli.commands import find
from hpo.cli.completion import complete_device, complete_model, complete_setting, complete_study
from hpo.cli.silence import announced


def _shown_argument(parameter: Any) -> str:
    """STUDY, [STUDY] where it may be left out, IMAGE... where there may be several."""
    name = (parameter.metavar or parameter.name).upper().removesuffix("...")
    return f"{name if parameter.required else f'[{name}]'}{'' if parameter.nargs == 1 else '...'}"


def write_options(command: Any, ctx: Any, formatter: Any) -> None:
    """The arguments and options of a command's --help, in the sections that they name, without rich."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        if record := parameter.get_help_record(ctx):
            argument = parameter.param_type_name == "argument"
            section = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or "Options"
            name = _shown_argument(parameter) if argument else record[0]
            sections.setdefault(section, []).append((name, record[1]))
    for section, records in sections.items():
        with formatter.section(section):
            formatter.write_dl(records)


def _doing(ctx: Any) -> str:
    """What a command, or the group above it, does while it is silent."""
    listed = find(ctx.info_name) or find(ctx.parent.info_name if ctx.parent else "")
    return listed.doing if listed else ""


class Command(TyperCommand):
    """A command whose errors are printed in one place, and whose options are listed in sections."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The usage line, whose arguments are plain words: typer puts them in braces, which look like a template."""
        arguments = [part for part in self.get_params(ctx) if part.param_type_name == "argument"]
        return [str(self.options_metavar), *map(_shown_argument, arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The arguments and options, in sections."""
        write_options(self, ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an exception becomes one message and an exit code."""
        try:
            quiet = ctx.params.get("as_json") or ctx.params.get("quiet")
            with announced("" if quiet else _doing(ctx)):
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - all errors are printed here
            debug = ctx.params.get("debug") or ctx.params.get("_debug") or ctx.find_root().params.get("debug")
            raise typer.Exit(output.fail(error, as_json=bool(ctx.params.get("as_json")), debug=bool(debug))) from None


def read_duration(text: str) -> float:
    """The seconds in the text of an option."""
    try:
        return output.parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def read_engine(text: str) -> str:
    """The text of --engine, which must be an engine or a scheduler."""
    from hpo.execute.engines import ENGINES

    if text not in (*ENGINES, "slurm", "kubernetes"):
        raise typer.BadParameter(f"{text}: choose one of processes, ray, slurm", param_hint="--engine")
    return text


def read_stack(text: str) -> int | None:
    """The number in the text of --stack, or None for auto."""
    if text != "auto" and not text.isdecimal():
        raise typer.BadParameter(f"{text}: write auto, or a number from 1", param_hint="--stack")
    return None if text == "auto" else int(text)


def outside_stores(file: Path | None) -> Path | None:
    """The file that an option names for output, which would replace what is there: none of a home's own."""
    if file is None:
        return None
    from hpo.home import is_store

    above = file.expanduser().resolve().parents
    for folder in above:
        if is_store(folder) and folder / "reports" not in above:
            raise typer.BadParameter(f"{file}: is among the files that hpo keeps there. Write to another folder.")
    return file


COMPUTE, CLUSTER, OUTPUT = "Compute", "Cluster", "Output"  # sections of --help

Study = Annotated[
    str,
    typer.Argument(
        metavar="STUDY",
        help="A study's name, or the path of its YAML file.",
        autocompletion=complete_study,
        show_default=False,
    ),
]
AStudy = Annotated[
    str | None,
    typer.Argument(metavar="STUDY", help="Only this study.", autocompletion=complete_study, show_default="all"),
]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="digits-mlp, digits-mlp@champion, or digits-mlp/3: version 3.",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PLACE=VALUE",
        help="Override an entry of the study file: training.epochs=5",
        autocompletion=complete_setting,
    ),
]
DataSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PLACE=VALUE",
        help="What the data are, where the images do not say: data.label='([a-z]+)_[0-9]+'",
        autocompletion=complete_setting,
    ),
]
Trials = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Total number of trials of the study, over all runs.", show_default="the study's"
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Number of processes that train.",
        show_default="one a core or GPU",
        rich_help_panel=COMPUTE,
    ),
]
StackSize = Annotated[
    int | None,
    typer.Option(
        parser=read_stack,
        metavar="auto|N",
        help="Number of small networks that a worker trains together.",
        show_default="auto",
        rich_help_panel=COMPUTE,
    ),
]
Timeout = Annotated[
    float | None, typer.Option(parser=read_duration, metavar="TIME", help="Stop cleanly after 90, 30m or 1h.")
]
DataPath = Annotated[
    Path | None, typer.Option("--path", metavar="PATH", help="Your own file or folder instead of a download.")
]
ImageSide = Annotated[int | None, typer.Option(metavar="N", min=1, max=1024, help="Side of the images in pixels.")]
Minutes = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        help="Fit trials, and where needed epochs, to so many minutes of this machine, and end then.",
        show_default="no limit; your own images: the preset's",
    ),
]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset",
        metavar="quick|good|best",
        help="Your own images: how much is tried, and in 3, 10 or 60 minutes unless --minutes says otherwise.",
    ),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="NAME=FILE",
        help="Your own images: weights of a pretrained network, such as mobilenet_v2=FILE; none uses none.",
        show_default="those in the caches",
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        parser=read_engine,
        metavar="processes|ray|slurm",
        help="Where workers run: on this machine, on a Ray cluster, or as SLURM jobs.",
        rich_help_panel=CLUSTER,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT",
        help="Address of the Ray cluster.",
        show_default="$RAY_ADDRESS, or a local Ray",
        rich_help_panel=CLUSTER,
    ),
]
GpusPerTrial = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        help="GPUs for each trial; with Ray also a share, such as 0.25.",
        show_default="1",
        rich_help_panel=COMPUTE,
    ),
]
CpusPerTrial = Annotated[
    float | None,
    typer.Option(metavar="N", help="CPU cores of a Ray worker.", show_default="1", rich_help_panel=CLUSTER),
]
SlurmSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm",
        metavar="KEY=VALUE",
        help="A parameter of submitit: partition=gpu, timeout_min=60, ...",
        rich_help_panel=CLUSTER,
    ),
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start a new study; the old one is kept.")]
Extend = Annotated[
    bool, typer.Option("--extend", help="Go on after the search space has changed: old trials count where they fit.")
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Retry failed trials.")]
KeepModels = Annotated[
    str | None,
    typer.Option(
        metavar="all|best:K|none", help="The trials whose models are kept.", show_default="the study's, best:10"
    ),
]
AsEvents = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object for each event; the last is the result.", rich_help_panel=OUTPUT
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the final result.", rich_help_panel=OUTPUT)]
DeviceName = Annotated[
    str,
    # Typer 0.27 would call it --DEVICE without this name, as it does each option that is spelled like its metavar.
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto, cpu, cuda, cuda:N or mps.",
        autocompletion=complete_device,
        rich_help_panel=COMPUTE,
    ),
]
PrecisionName = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="auto|float32|bfloat16",
        help="Precision of the training.",
        show_default="the study's",
        rich_help_panel=COMPUTE,
    ),
]
HomeFolder = Annotated[
    Path | None,
    typer.Option(
        "--home",
        metavar="DIR",
        help="The folder that holds mlruns.",
        show_default="$HPO_HOME, or the working directory",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Allow a study from elsewhere to import functions. Read them first.")
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Load a model that can run its author's code. Only if you trust the author."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.", rich_help_panel=OUTPUT)]


def home_flag(home: str | Path | None) -> str:
    """The end of a command line that names the home: " --home DIR", or "" for the usual one."""
    return f" --home {shlex.quote(str(home))}" if home else ""


def study_name(study: str) -> str:
    """The name of a study given by its name or its file; with the name, a study can be read after its file is gone."""
    if not study.endswith((".yaml", ".yml")):
        return study
    from hpo.spec.load import load_study

    return load_study(study, trust=True).name
