"""The model card of a registered version: on the version, in a folder for the Hugging Face Hub, and pushed if asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hpo.errors import HpoError, ModelError
from hpo.home import Home
from hpo.jobs.export_model import export_model
from hpo.jobs.report import gather
from hpo.records import ModelVersion
from hpo.report.card import model_card
from hpo.storage.reader import read_study
from hpo.tracking.ledger import openings


@dataclass(frozen=True)
class Card:
    """A card, its folder and its address, "" without any. described: its version in the registry has it."""

    model: ModelVersion
    text: str
    folder: str = ""
    address: str = ""
    described: bool = False


def write_card(
    model: str,
    *,
    out: str | Path | None = None,
    licence: str = "",
    push: str = "",
    home: str | Path | None = None,
    trust: bool = False,
) -> Card:
    """Write the card of a registered model from its record, and make it the description of its version.

    A description that a person wrote stays.

    out is a new folder for the Hugging Face Hub: the card as README.md, and the folder that MLflow loads. push is the
    repository OWNER/NAME to upload that folder to, private where it is new. licence is that of the model. Raises
    HpoError where there is no such model or study, where the folder exists, and where the Hub refuses.
    """
    from hpo.tracking.registry import describe, resolve

    if push and out is None:
        raise HpoError(f"--push {push}: uploads a folder.", "Name a new one, too: --out FOLDER")
    place = Home.find(home)
    version = resolve(place, model)
    if version.origin:
        raise ModelError(f"{model}: it was copied from {version.origin}, which has its study.", "Write the card there.")
    study = read_study(place, version.generation)
    openings(place, study)  # a ledger that cannot be read would be one without openings
    findings = gather(place, study, model=version)
    text = model_card(findings, licence=licence)
    folder = ""
    if out is not None:
        exported = export_model(model, form="mlflow", out=out, home=home, trust=trust)
        (exported.folder / "README.md").write_text(text, encoding="utf-8")
        folder = str(exported.folder)
    described = False
    if version.version:
        described = describe(place, version, text.partition("---\n")[2].partition("---\n")[2].strip())
    return Card(version, text, folder, _pushed(Path(folder), push) if push else "", described)


def _pushed(folder: Path, repository: str) -> str:
    """The address of the repository, once the folder is uploaded."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model and card by hpo")
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        hint = f"{folder} is complete: log in with hf auth login, then hf upload {repository} {folder}"
        raise HpoError(f"--push {repository}: the Hub refuses: {reason}.", hint) from error
    return str(address)
