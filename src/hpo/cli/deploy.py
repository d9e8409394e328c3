"""Use models elsewhere: `hpo serve`, `hpo export-model` and `hpo card`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli import output
from hpo.cli.options import AllowPickle, AsJson, Debug, HomeFolder, Model, Trust
from hpo.cli.windows import open_browser


def serve(
    model: Model,
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Port.")] = 5001,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="127.0.0.1 is this machine only.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page in a browser, where there is a desktop.")] = True,
    home: HomeFolder = None,
    allow_pickle: AllowPickle = False,
    _debug: Debug = False,
) -> None:
    """Serve a model over HTTP, with a page to drop an image on.

    The page is at /, POST /image takes the bytes of an image file, and POST /invocations is MLflow's.
    """
    from hpo.predict import load_model
    from hpo.serve import serve as serve_until_the_end
    from hpo.tracking.ui import is_local, page_address

    loaded = load_model(model, home=home, allow_pickle=allow_pickle)
    address = page_address(host, port)
    if not is_local(host):
        output.print_warning(f"anyone who can reach {host}:{port} can ask the model: there is no password.")

    def ready() -> None:
        output.print_text(address)
        output.print_progress(f"{model} answers; Ctrl-C ends it.")
        if browser:
            open_browser(address)

    serve_until_the_end(loaded, title=model, host=host, port=port, ready=ready)


class Form(StrEnum):
    """What a model is written as; the formats of hpo.jobs.export_model."""

    ONNX = "onnx"
    PT2 = "pt2"
    SAFETENSORS = "safetensors"
    MLFLOW = "mlflow"


NewFolder = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FOLDER", help="The new folder.", show_default="NAME-VERSION-FORMAT"),
]


def export_model(
    model: Model,
    form: Annotated[
        Form, typer.Option("--format", metavar="onnx|pt2|safetensors|mlflow", help="Format of the files.")
    ] = Form.ONNX,
    target: NewFolder = None,
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Write a registered model as files for other programs, once they answer as it does.

    The files are loaded again and compared with the model on the study's validation images; where they answer
    otherwise, nothing is written. ONNX needs the extra onnx.
    """
    from hpo.jobs.export_model import export_model as write

    made = write(model, form=form.value, out=target, home=home, trust=trust)
    if as_json:
        output.print_json(made)
        return
    output.print_facts(
        [
            ("model", f"{made.model.name}, version {made.model.version}"),
            ("files", ", ".join(made.files)),
            ("parity", f"{made.parity.measured}; {made.images}"),
        ]
    )
    output.print_message(str(made.folder))


def card(
    model: Model,
    target: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="A new folder for the Hugging Face Hub: the card as README.md, and the model.",
            show_default="the card alone, in the terminal",
        ),
    ] = None,
    licence: Annotated[
        str, typer.Option(metavar="NAME", help="Licence of the model, such as MIT.", show_default="not stated")
    ] = "",
    push: Annotated[
        str, typer.Option(metavar="OWNER/NAME", help="Upload the folder to the Hub.", show_default="not uploaded")
    ] = "",
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Write the card of a registered model from its record, and put it on its version.

    It says how the model is used, its data, how it was made, its scores with intervals, its limits and licences. The
    test part is not opened.
    """
    from hpo.jobs.card import write_card

    made = write_card(model, out=target, licence=licence, push=push, home=home, trust=trust)
    if as_json:
        output.print_json(made)
        return
    if not made.folder:
        output.print_text(made.text.rstrip())
    else:
        where = "on it, and in" if made.described else "in"
        output.print_message(f"{made.model.name}, version {made.model.version}: the card is {where} {made.folder}")
    if made.model.version and not made.described:
        output.print_warning(f"{made.model.name}/{made.model.version} keeps the description that a person wrote.")
    if made.address:
        output.print_message(made.address)
