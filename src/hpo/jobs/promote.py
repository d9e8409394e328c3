"""Promote a challenger to champion of its study, after gates and the test part; copy a champion to another store."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpo.errors import HpoError, ModelError, shown_address
from hpo.home import Home
from hpo.jobs.shared.gates import Verdict, same_signature, verdicts
from hpo.jobs.shared.image_history import base_verdict, image_history
from hpo.jobs.shared.model_reference import ModelReference, find_model
from hpo.jobs.shared.test_set_access import measure, test_scores
from hpo.records import ModelVersion
from hpo.spec.load import parse_study
from hpo.storage.reader import read_study
from hpo.tracking.champions import record_champion
from hpo.tracking.ledger import Opening, openings
from hpo.tracking.registry import resolve, set_alias, versions
from hpo.tracking.transfer.import_runs import copy_version


@dataclass(frozen=True)
class Promotion:
    """What promote decided and why.

    gates are the verdicts on the challenger, none where it is the champion already; forced says that the alias was
    moved although one of them refused. scores are test scores (test_accuracy, ...), empty where the test part was not
    opened; openings counts the looks at the study's test part so far. history has sentences on its images: the models
    of any study that they have measured, and the trainings that have seen them.
    """

    promoted: bool
    reason: str
    challenger: ModelVersion
    champion: ModelVersion | None
    scores: Mapping[str, float]
    champion_scores: Mapping[str, float] = field(default_factory=dict)
    openings: int = 0
    gates: tuple[Verdict, ...] = ()
    forced: bool = False
    history: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether a gate kept the challenger from becoming champion."""
        return not self.promoted and not all(gate.passed for gate in self.gates)


def promote(study: str, *, home: str | Path | None = None, force: bool = False, trust: bool = False) -> Promotion:
    """Let the challenger of a study pass the gates, measure it on the test part, and point `champion` at it.

    The gates (see hpo.jobs.shared.gates) use development images only: the test part measures a choice that was made
    before, and stays closed if a gate refuses. One gate counts the test images that a base of the challenger has seen.
    force=True promotes it nevertheless, which the registry records. A model that was measured is not measured again,
    so nothing is gained by asking twice. trust allows a data function from outside the working directory. Raises
    ModelError where there is no challenger, DataError where the data is not the study's, StoreError for a ledger with a
    damaged line.
    """
    from hpo.predict import load_model

    place = Home.find(home)
    record = read_study(place, study)
    name = parse_study(record.spec, trust=trust).name
    by_alias = {alias: version for version in versions(place, name) for alias in version.aliases}
    champion = by_alias.get("champion")
    challenger = by_alias.get("challenger", champion)
    if challenger is None:
        raise ModelError(f"{name}: there is no challenger.", f"Run the study to its end: hpo run {name}")
    count = len(openings(place, record))  # a damaged ledger ends here, before any gate
    if champion is not None and champion.version == challenger.version:
        known = test_scores(champion.scores)
        return Promotion(
            False, "there is no other challenger: it is the champion already", challenger, champion, known, known, count
        )
    new = find_model(place, f"{name}/{challenger.version}", trust=trust)
    old, why = _trained(place, champion, trust=trust)
    model = load_model(challenger.model_uri, home=place)
    gates = (*base_verdict(place, new), *verdicts(place, new, model, champion, old, why))
    failed = [gate for gate in gates if not gate.passed]
    reason = "; ".join(map(str, failed)) or _why(champion, gates)
    before: Mapping[str, float] = test_scores(champion.scores) if champion is not None else {}
    if failed and not force:
        known, count = test_scores(challenger.scores), len(openings(place, new.study))
        told = image_history(place, new).sentences
        return Promotion(False, reason, challenger, champion, known, before, count, gates, history=told)
    scores = measure(place, new, purpose="promote").scores
    if old is not None and old.card.digest == new.card.digest:
        with contextlib.suppress(ModelError):  # its files may be gone, which is no reason to keep it
            before = measure(place, old, purpose="promote").scores
    reason = f"forced, although: {reason}" if failed else reason
    record_champion(place, name, challenger.version, why=reason, forced=bool(failed))
    tags = {"hpo.promoted_because": reason}
    challenger = set_alias(place, name, "champion", challenger.version, tags=tags)
    champion = resolve(place, f"{name}/{champion.version}") if champion is not None else None
    count, told = len(openings(place, new.study)), image_history(place, new).sentences
    return Promotion(True, reason, challenger, champion, scores, before, count, gates, bool(failed), told)


def _trained(home: Home, champion: ModelVersion | None, *, trust: bool) -> tuple[ModelReference | None, str]:
    """The champion's training; None where there is no champion, or where it cannot be found: why not."""
    if champion is None:
        return None, ""
    try:
        return find_model(home, f"{champion.name}/{champion.version}", trust=trust), ""
    except HpoError as error:
        return None, f"the champion's training is not at hand: {error.message}"


def _why(champion: ModelVersion | None, gates: tuple[Verdict, ...]) -> str:
    if champion is None:
        return "there was no champion before"
    return next(gate.measured for gate in gates if gate.name == "beats the champion")


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
    store = shown_address(str(to))
    if refusal is not None and not force:
        return Copied(version, None, store, refusal)
    copy = copy_version(place, version, target, openings=_openings(place, version))
    if there is None or there.version != copy.version:
        why = f"copied: version {version.version} of {shown_address(place.tracking_uri)}"
        record_champion(target, copy.name, copy.version, why=why, forced=refusal is not None)
        copy = set_alias(target, copy.name, "champion", copy.version)
    return Copied(version, copy, store, refusal, forced=refusal is not None)


def find_store(to: str | Path, home: Home) -> Home:
    """The stores of a project's folder, or those of `home` with tracking at an MLflow URI. Raises HpoError."""
    text = str(to)
    if text.startswith("sqlite:///") and text.endswith("/mlruns/mlflow.db"):
        text = str(Path(text.removeprefix("sqlite:///")).parents[1])
    target = replace(home, tracking_uri=text) if "://" in text else Home.at(text).create()
    if target.tracking_uri == home.tracking_uri:
        raise HpoError(f"--to {shown_address(text)}: that is the store that the model is in.", "Name another one.")
    return target


def _openings(home: Home, version: ModelVersion) -> list[Opening]:
    """The openings that measured it; none where its study is gone."""
    with contextlib.suppress(HpoError):
        study = read_study(home, version.generation) if not version.origin else None
        return [each for each in openings(home, study) if each.trial == version.trial] if study else []
    return []
