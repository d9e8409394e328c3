"""What the commands share: their options, and one place that tells errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from hpo.cli.display import output


class Command(TyperCommand):
    """A command whose errors are told in one place."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what it raises becomes one message and an exit code."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - all errors are told here
            debug = ctx.params.get("debug") or ctx.params.get("_debug") or ctx.find_root().params.get("debug")
            raise typer.Exit(output.fail(error, as_json=bool(ctx.params.get("as_json")), debug=bool(debug))) from None


def complete_study(incomplete: str) -> list[str]:
    """Names of studies that begin so, for the shell."""
    from hpo.spec.load import study_files

    return [name for name in study_files() if name.startswith(incomplete)]


def read_duration(text: str) -> float:
    """Seconds in the text of an option."""
    try:
        return output.parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def read_stack(text: str) -> int | None:
    """The number in the text of --stack, or None for auto."""
    if text != "auto" and not text.isdecimal():
        raise typer.BadParameter(f"{text}: write auto, or a number from 1", param_hint="--stack")
    return None if text == "auto" else int(text)


Study = Annotated[
    str,
    typer.Argument(
        help="A study's name, or the path of its YAML file.", autocompletion=complete_study, show_default=False
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PLACE=VALUE", help="Override a place of the study file: training.epochs=5"),
]
Trials = Annotated[
    int | None, typer.Option(min=1, help="The study's total, all runs together.", show_default="the study's")
]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that train.", show_default="one a core or GPU")]
StackSize = Annotated[
    str, typer.Option(metavar="auto|N", help="Small networks that a worker trains side by side, in one computation.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start anew, beside what there is.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try failed trials again.")]
KeepModels = Annotated[
    str | None,
    typer.Option(metavar="all|best:K|none", help="Whose models stay on disk.", show_default="the study's, best:10"),
]
AsEvents = Annotated[bool, typer.Option("--json", help="One JSON object an event a line; the last is the result.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the last word.")]
DeviceName = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps.")]
PrecisionName = Annotated[
    str | None,
    typer.Option("--precision", metavar="auto|float32|bfloat16", help="To compute with.", show_default="the study's"),
]
HomeFolder = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="The folder that holds mlruns.", show_default="$HPO_HOME, or here"),
]
Trust = Annotated[
    bool, typer.Option("--trust", help="Import the functions that a study from elsewhere names: read them first.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Load a model that can run code of its maker: only of those you trust.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def study_name(study: str) -> str:
    """The name of a study given by name or by its file; a study whose file is gone can still be looked at."""
    if not study.endswith((".yaml", ".yml")):
        return study
    from hpo.spec.load import load_study

    return load_study(study, trust=True).name
