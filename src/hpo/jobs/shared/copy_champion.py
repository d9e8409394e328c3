"""Carry a champion to another store: another project's folder, or an MLflow server."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from hpo.database import sqlite_file
from hpo.errors import HpoError
from hpo.home import Home
from hpo.jobs.shared.gates import Verdict, same_signature
from hpo.records import ModelVersion
from hpo.tracking.champions import record_champion
from hpo.tracking.ledger import Opening, openings
from hpo.tracking.registry import resolve, set_alias, versions
from hpo.tracking.store import shown
from hpo.tracking.transfer.copy_version import copy_version


@dataclass(frozen=True)
class Copied:
    """A version and its copy, champion there; copy None where `refusal` kept it out. forced: it did not."""

    source: ModelVersion
    copy: ModelVersion | None
    store: str
    refusal: Verdict | None = None
    forced: bool = False


def copy_champion(model: str, *, to: str | Path, home: str | Path | None = None, force: bool = False) -> Copied:
    """Copy a version to another store and make it champion there; what is there already is not copied again.

    model is NAME (its champion), NAME@ALIAS or NAME/VERSION; `to` is a project's folder or an MLflow URI. A champion
    there that takes other images or answers with other classes refuses it, unless force. Raises HpoError.
    """
    from hpo.predict import load_model

    place = Home.find(home)
    target = find_store(to, place)
    version = resolve(place, model if "@" in model or "/" in model else f"{model}@champion")
    there = next((each for each in versions(target, version.name) if "champion" in each.aliases), None)
    refusal = None
    if there is not None:
        verdict = same_signature(target, load_model(version.model_uri, home=place), there)
        refusal = None if verdict.passed else verdict
    store = shown(str(to))
    if refusal is not None and not force:
        return Copied(version, None, store, refusal)
    copy = copy_version(place, version, target, looks=_looks(place, version))
    if there is None or there.version != copy.version:
        why = f"copied: version {version.version} of {shown(place.tracking_uri)}"
        record_champion(target, copy.name, copy.version, why=why, forced=refusal is not None)
        copy = set_alias(target, copy.name, "champion", copy.version)
    return Copied(version, copy, store, refusal, forced=refusal is not None)


def find_store(to: str | Path, home: Home) -> Home:
    """The stores of a project's folder, or those of `home` with tracking at an MLflow URI. Raises HpoError."""
    text = str(to)
    file = sqlite_file(text)
    if file is not None and file.parts[-2:] == ("mlruns", "mlflow.db"):
        text = str(file.parents[1])
    target = replace(home, tracking_uri=text) if "://" in text else Home.at(text).create()
    if target.tracking_uri == home.tracking_uri:
        raise HpoError(f"--to {shown(text)}: that is the store that the model is in.", "Name another one.")
    return target


def _looks(home: Home, version: ModelVersion) -> list[Opening]:
    """The openings that measured it; none where its study is gone."""
    from hpo.storage.optuna_storage import read_study

    with contextlib.suppress(HpoError):
        study = read_study(home, version.generation) if not version.origin else None
        return [look for look in openings(home, study) if look.trial == version.trial] if study else []
    return []
