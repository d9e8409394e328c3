"""Open the sealed test part for a model: the one way to it, by which every look is written down before it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.home import Home
from hpo.tracking.ledger import Opening, announce_opening, complete_opening, name_images, openings
from hpo.tracking.registry import add_scores

if TYPE_CHECKING:
    from hpo.data.test_set import Measured
    from hpo.jobs.shared.model_reference import ModelReference
    from hpo.predict import Classifier


@dataclass(frozen=True)
class Measurement:
    """Test scores (test_accuracy, ...) of a model. opened is False where they were remembered.

    opening is the ledger's record of the look, None where only the registry remembers it.
    """

    scores: Mapping[str, float]
    opened: bool
    opening: Opening | None


def open_sealed(home: Home, entrant: ModelReference, model: Classifier, *, purpose: str) -> tuple[Measured, Opening]:
    """Open the test part for a loaded model. Whatever stops the process once it has begun, the opening is on record.

    purpose is the command that asks. Raises DataError, StoreError.
    """
    from hpo.data.overview import development_digests
    from hpo.data.test_set import digests_of_test, ledger_folder, open_test

    version, number = entrant.kept("the test part asks for it"), entrant.trial.number
    cache = ledger_folder(entrant.card)
    opening = announce_opening(home, entrant.study, model=version, trial=number, purpose=purpose, cache=cache)
    tested, trained = digests_of_test(entrant.card), development_digests(entrant.card)
    opening = name_images(home, entrant.study, opening, tested, trained=trained, cache=cache)
    further = [*entrant.setup.training.scores, entrant.setup.training.monitor]
    measured = open_test(entrant.card, model.predict_levels, further=further)
    return measured, complete_opening(home, entrant.study, opening, measured.scores, cache=cache)


def count_test_images(entrants: Sequence[ModelReference]) -> tuple[list[int], int]:
    """How many test images each model has, and how many of them all have. Only the numbers leave; this is no opening.

    Raises DataError.
    """
    from hpo.data.test_set import digests_of_test

    digests = [digests_of_test(entrant.card) for entrant in entrants]
    return list(map(len, digests)), len(set.intersection(*map(set, digests)))


def measure(home: Home, entrant: ModelReference, *, purpose: str) -> Measurement:
    """The test scores of a model; the test part is opened only where nobody has measured it yet. Raises HpoError."""
    version = entrant.kept("the test part asks for it")
    looks = [look for look in openings(home, entrant.study) if look.trial == entrant.trial.number and look.scores]
    known = test_scores(version.scores)
    if looks or known:
        earlier = looks[-1] if looks else None
        result = Measurement(earlier.scores if earlier else known, False, earlier)
    else:
        from hpo.predict import load_model

        measured, opening = open_sealed(home, entrant, load_model(version.model_uri, home=home), purpose=purpose)
        result = Measurement(measured.scores, True, opening)
    if version.version and not known:
        add_scores(home, version, result.scores)
    return result


def test_scores(scores: Mapping[str, float]) -> dict[str, float]:
    """Those of the scores that are of the test part."""
    return {name: value for name, value in scores.items() if name.startswith("test_")}
