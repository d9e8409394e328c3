"""The history of the images of a test part: which models they have measured, and which models have seen them before."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from hpo.errors import HpoError
from hpo.execute.bases import Overlap, overlaps, trained_of
from hpo.home import Home
from hpo.jobs.shared.gates import Verdict
from hpo.jobs.shared.model_reference import ModelReference
from hpo.records import DataCard, StudyResult
from hpo.report.text import times
from hpo.storage.reader import read_study
from hpo.tracking.ledger import Opening, count_set_aside, every_opening, image_digests, set_digest


@dataclass(frozen=True)
class ImageHistory:
    """What is known of the `images` (a count) of a test part.

    openings counts those of exactly these images, by `models` (titles of studies) and `users`. answered counts the
    images that were in another test part that was opened, `answered_openings` times by `answered_models`. trained has
    the development images of models that were measured before, own those of the study itself, base those of the models
    that it was transferred from. unknown are sentences on what could not be compared.
    """

    images: int
    openings: int = 0
    models: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    answered: int = 0
    answered_openings: int = 0
    answered_models: tuple[str, ...] = ()
    trained: tuple[Overlap, ...] = ()
    own: int = 0
    base: tuple[Overlap, ...] = ()
    unknown: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """The history in sentences; what is 0 is left out."""
        of = f"of {self.images:,} of these images"
        told = []
        if self.openings:
            users = f" (users: {', '.join(self.users)})" if len(self.users) > 1 else ""
            told.append(f"This test part: {times(self.openings)}, by {', '.join(self.models)}{users}.")
        if self.answered:
            by = f"{times(self.answered_openings)}, by {', '.join(self.answered_models)}"
            told.append(f"{self.answered:,} {of} have answered before, in other test parts: {by}.")
        if self.own:
            told.append(f"{self.own:,} {of} are also development images of this study.")
        told += [f"{each.count:,} {of} are development images of its base, {each.name}." for each in self.base]
        told += [
            f"{each.count:,} {of} are development images of {each.name}, measured before." for each in self.trained
        ]
        return (*told, *self.unknown)


def image_history(home: Home, model: ModelReference) -> ImageHistory:
    """The history of the test images of a model's study. Only counts leave; no model is measured. Raises HpoError."""
    base, unknown = base_overlaps(home, model)
    found = study_history(home, model.study, model.card)
    more = (f"It was not compared with its base: {unknown}",) if unknown else ()
    return replace(found, base=tuple(base), unknown=(*found.unknown, *more))


def study_history(home: Home, study: StudyResult, card: DataCard) -> ImageHistory:
    """The history of the test images of a study's data, without the bases of its models. Raises HpoError."""
    from hpo.data.overview import development_digests
    from hpo.data.test_set import digests_of_test, ledger_folder

    cache = ledger_folder(card)
    digests = digests_of_test(card)
    here, elsewhere = every_opening(home, cache=cache)
    known = [(_dated(home, each), each.study) for each in here]
    known += [(each, f"{each.study} (another home)") for each in elsewhere]
    images = set_digest(digests)
    same = [(each, name) for each, name in known if _is_same(each, study, card, images)]
    others = [(each, name) for each, name in known if (each, name) not in same and each.images]
    seen: set[bytes] = set()
    overlapping: list[tuple[Opening, str]] = []
    lost = 0
    for part in dict.fromkeys(each.images for each, _ in others):
        theirs = image_digests(home, part, cache=cache)
        looks = [(each, name) for each, name in others if each.images == part]
        if theirs is None:
            lost += len(looks)
        elif shared := theirs.intersection(digests):
            seen |= shared
            overlapping += looks
    unknown = (
        [f"{times(lost)} a test part was opened whose image digests are lost: it was not compared."] if lost else []
    )
    aside = count_set_aside(home.root) + count_set_aside(cache)
    trained, missing = _trained(home, known, card, digests)
    if missing:
        unknown.append(f"It was not compared with the training images of {', '.join(missing)}: they are not at hand.")
    unknown += (
        [f"Damaged lines of the ledger that were set aside, and may be openings of it: {aside}."] if aside else []
    )
    return ImageHistory(
        images=len(digests),
        openings=len(same),
        models=_names(same),
        users=tuple(dict.fromkeys(each.who for each, _ in same)),
        answered=_found(digests, seen),
        answered_openings=len(overlapping),
        answered_models=_names(overlapping),
        trained=trained,
        own=_found(digests, development_digests(card)),
        unknown=tuple(unknown),
    )


def base_overlaps(home: Home, model: ModelReference) -> tuple[list[Overlap], str]:
    """Of each model that this one builds on, directly or not, how many test images its study has seen; see overlaps.

    What it builds on its own files say, and where none are kept, the record of its study. Raises HpoError.
    """
    return overlaps(home, trained_of(home, model.version, lambda: model.setup), model.card)


def base_verdict(home: Home, model: ModelReference) -> Iterator[Verdict]:
    """The gate of a model that builds on others: they have seen no test image. Nothing for other models."""
    trained = trained_of(home, model.version, lambda: model.setup)
    if not any(each.bases for each in trained):
        return
    found, unknown = overlaps(home, trained, model.card)
    seen = "; ".join(f"{each.count:,} of {model.card.test_count:,} test images in {each.name}" for each in found)
    measured = "; ".join(filter(None, [seen, unknown])) or "0 test images among the development images of its base"
    yield Verdict("base has not seen the test part", not found, measured, "0 test images")


def _dated(home: Home, opening: Opening) -> Opening:
    """An opening of an earlier version of hpo with the data digest of its study, if that is in the storage."""
    if not opening.data:
        with contextlib.suppress(HpoError):
            title = opening.study if "~" in opening.study else f"{opening.study}~1"
            study = read_study(home, title)
            if study.created == opening.created:
                return replace(opening, data=study.data_digest)
    return opening


def _is_same(opening: Opening, study: StudyResult, card: DataCard, images: str) -> bool:
    if opening.images:
        return opening.images == images
    own = (opening.study, opening.created) == (study.title, study.created)
    return own or opening.data == card.digest


def _names(looks: Collection[tuple[Opening, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for _, name in looks))


def _trained(
    home: Home, known: Sequence[tuple[Opening, str]], card: DataCard, digests: Sequence[bytes]
) -> tuple[tuple[Overlap, ...], tuple[str, ...]]:
    """Test images among the training images of models that were measured before, on other data, and unknown models."""
    from hpo.data.overview import development_digests
    from hpo.data.prepare import prepared
    from hpo.data.test_set import ledger_folder

    by_data: dict[tuple[str, str], dict[str, None]] = {}
    for opening, name in known:
        if opening.data and opening.data != card.digest:
            by_data.setdefault((opening.data, opening.trained), {})[name] = None
    overlaps: list[Overlap] = []
    missing: dict[str, None] = {}
    for (data, trained), names in by_data.items():
        theirs = image_digests(home, trained, cache=ledger_folder(card)) if trained else None
        if theirs is None and (other := prepared(data)) is not None:
            theirs = development_digests(other) if other.image_shape == card.image_shape else frozenset()
        count = _found(digests, theirs or ())
        overlaps += [Overlap(", ".join(names), count)] if count else []
        missing |= names if theirs is None else {}
    return tuple(overlaps), tuple(missing)


def count_seen(card: DataCard, by: DataCard) -> int:
    """How many of the test images of card are among the development images of by."""
    from hpo.data.overview import count_test_images, development_digests

    return count_test_images(card, {"by": development_digests(by)})["by"]


def _found(digests: Sequence[bytes], others: Collection[bytes]) -> int:
    return sum(digest in others for digest in digests)
