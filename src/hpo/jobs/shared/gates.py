"""What a challenger must show before the sealed test part is opened for it: four gates, each with what it measured."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpo.errors import HpoError
from hpo.execute.finals import finalist_key
from hpo.home import Home
from hpo.jobs.shared.model_reference import ModelReference
from hpo.metrics import METRICS, direction_of, find_metric, name_of
from hpo.records import FINAL, ModelVersion, Trial, TrialResult, unpack_classes
from hpo.report.ensembles import score_of
from hpo.report.statistics import Ints, mean_lead

if TYPE_CHECKING:
    from hpo.data.overview import Part
    from hpo.predict import Classifier

# How far probabilities may lie from the trial's, and for which share of the images they may lie further or be answered
# differently. A logged model computes in float32 on the CPU: what was trained in coarser numbers cannot agree to the
# last digit. Of seven models trained in bfloat16 the worst differed by 0.027, and in 0.23 % of the answers; of an
# eighth, one image of 1,712 lay between two classes and differed by 0.056.
_PARITY = {"float32": (1e-4, 0.0), "tf32": (0.01, 0.002), "bfloat16": (0.05, 0.01)}
_REPEATS = 30


@dataclass(frozen=True)
class Verdict:
    """What one gate found: what was measured, and what it should have been, in words."""

    name: str
    passed: bool
    measured: str
    limit: str

    def __str__(self) -> str:
        return f"{self.name}: {self.measured} (wanted: {self.limit})"


def verdicts(
    home: Home,
    new: ModelReference,
    model: Classifier,
    champion: ModelVersion | None,
    old: ModelReference | None,
    why: str,
) -> Iterator[Verdict]:
    """The verdicts on a challenger in order, the ones on its champion first; without a champion they are skipped.

    model is the challenger as fetched from MLflow just now. old is the champion's training, None where it cannot be
    found, which why explains. Only development images are looked at. Raises HpoError.
    """
    if champion is not None:
        yield beats_champion(home, new, champion, old, why)
    yield parity(home, new, model)
    if champion is not None:
        yield same_signature(home, model, champion)
    yield from limits(home, new, model)


def beats_champion(
    home: Home, new: ModelReference, champion: ModelVersion, old: ModelReference | None, why: str
) -> Verdict:
    """The gate that the challenger is better, beyond chance, on validation images that neither was trained on.

    The score is the objective where it can be counted from classes, else accuracy; a candidate that a race trained
    with several seeds counts by their mean, and what validation images have chosen, members of an ensemble or views, is
    judged on images that have not. Where there are no such images, the objectives decide, without an interval.
    """
    objective = new.spec.search.judged_by
    several = new.card.several_labels or (old is not None and old.card.several_labels)
    if several:
        why = "images have several labels, of which no one class is resampled"
    part, note = (None, why) if old is None or several else _unseen(new, old)
    if old is None or part is None:
        return _by_objective(new, champion, old, why=note)
    if _is_ensemble(new) and not new.judged:
        return _not_judged("an interval above 0")
    names = new.card.class_names
    score = find_metric(name_of(objective), names)
    resampled = score is not None and score.from_counts is not None and score.direction == "maximize"
    score = score if score is not None and resampled else METRICS["accuracy"]
    first, second = (_predicted_classes(home, each, part, names) for each in (new, old))
    lead = mean_lead(part.labels, first, second, score=score, classes=len(names), seed=new.spec.seed)
    points = f"{100 * lead.value:+.2f} points of {score.label} over version {champion.version}"
    counts = [1 if _is_ensemble(each) else len(found) for each, found in ((new, first), (old, second))]
    seeds = f", seeds: {counts[0]} against {counts[1]}" if sum(counts) > 2 else ""
    seeds += ", members chosen on others of them" if new.judged else ""
    return Verdict(
        "beats the champion",
        lead.low > 0,
        f"{points} (95 % interval {100 * lead.low:.2f} to {100 * lead.high:.2f}; {len(part.labels):,} validation "
        f"images{seeds}{note})",
        "an interval above 0",
    )


def _by_objective(new: ModelReference, champion: ModelVersion, old: ModelReference | None, *, why: str) -> Verdict:
    objective = new.spec.search.judged_by
    new.kept("it is to be promoted")
    # Of the networks: temperature and views of a program were chosen on these images.
    ours, theirs = _network_score(new, objective), champion.scores.get(objective)
    if old is not None and (found := _network_score(old, objective)) is not None:
        theirs = found
    wanted = f"a better {objective}"
    if _is_ensemble(new) and (ours := _judged_score(new, objective)) is None:
        return _not_judged(wanted)
    if ours is None or theirs is None:
        return Verdict("beats the champion", False, f"only one of the two has a {objective}; {why}", wanted)
    better = ours > theirs if direction_of(objective) == "maximize" else ours < theirs
    shown = f"{objective} {ours:.4f} against {theirs:.4f} of version {champion.version}, without an interval: {why}"
    return Verdict("beats the champion", better, shown, wanted)


def _network_score(entrant: ModelReference, objective: str) -> float | None:
    result = entrant.trial.result
    if result is None:
        return None
    only = entrant.spec.search.objective == objective and not entrant.spec.search.objectives
    return result.scores.get(objective, result.value if only else None)


def _is_ensemble(entrant: ModelReference) -> bool:
    return entrant.trial.result is not None and bool(entrant.trial.result.members)


def _judged_score(entrant: ModelReference, objective: str) -> float | None:
    """The objective of an ensemble by members that other images chose; None where classes do not give it."""
    from hpo.data.overview import validation_part

    names = entrant.card.class_names
    score = find_metric(name_of(objective), names)
    if score is None or score.from_counts is None or not entrant.judged:
        return None
    labels = validation_part(entrant.card, entrant.setup.split).labels
    return float(np.mean([score_of(score, labels, each, len(names)) for each in entrant.judged]))


def _not_judged(wanted: str) -> Verdict:
    found = "not known: its members were chosen on the validation images, and no judgement on other images was recorded"
    return Verdict("beats the champion", False, found, wanted)


def _unseen(new: ModelReference, old: ModelReference) -> tuple[Part | None, str]:
    """The challenger's validation images that the champion was not trained on, and a remark; None with the reason."""
    from hpo.data.overview import Part, rows_unseen, validation_part

    here, there = new.setup.split, old.setup.split
    if here.kind in ("none", "kfold"):
        return None, "the challenger has no validation images of its own"
    if new.card.image_shape != old.card.image_shape or set(new.card.class_names) != set(old.card.class_names):
        return None, "the champion has other images or classes"
    part = validation_part(new.card, here)
    if (new.card.digest, here) == (old.card.digest, there):
        return part, ""
    if there.kind == "kfold":
        return None, "the champion was cross-validated, so it has no single model"
    rows = rows_unseen(part, old.card, there)
    if not len(rows):
        return None, "the champion was trained on all validation images of the challenger"
    less = (
        "" if len(rows) == len(part.labels) else f", those of {len(part.labels):,} that the champion was not trained on"
    )
    return Part(part.images[rows], part.labels[rows]), less


def _predicted_classes(home: Home, entrant: ModelReference, part: Part, class_names: tuple[str, ...]) -> Ints:
    """(seeds, n) the classes that each training of a candidate predicts for the images, as indices into class_names.

    Recorded predictions where the candidate was validated on all of these images; else those of the kept model, except
    of images that have chosen its members or views.
    """
    from hpo.data.overview import shared_rows, validation_part
    from hpo.predict import load_model

    indices = np.array([class_names.index(name) for name in entrant.card.class_names])
    split, judged = entrant.setup.split, _judged(home, entrant)
    shared = rows = np.array([], np.int64)
    recorded = judged
    if split.kind not in ("none", "kfold"):
        own = validation_part(entrant.card, split)
        shared, rows = shared_rows([part.images, own.images])
        # What a trial records are the answers of its network, without the views that its program may have.
        found = judged or ([] if _may_have_views(entrant, len(own.labels)) else list(map(_recorded, _seeds(entrant))))
        recorded = [each for each in found if len(each) == len(own.labels)]
    if recorded and len(shared) == len(part.labels):
        predicted = np.empty((len(recorded), len(part.labels)), np.int64)
    else:
        model = load_model(entrant.kept("its predictions are needed").model_uri, home=home)
        recorded = recorded if judged else []
        answers = indices[model.predict_levels(part.images).argmax(1)]
        predicted = np.tile(answers, (max(1, len(recorded)), 1))
    for answers, classes in zip(predicted, recorded, strict=False):
        answers[shared] = indices[classes[rows]]
    return predicted


def _judged(home: Home, entrant: ModelReference) -> list[Ints]:
    """The classes (n,) of the entrant's validation images where they have chosen its members, or its views.

    Each image's are by members, or views, that other images chose; one array for each seed of a race that has them.
    """
    from hpo.tracking.registry import resolve
    from hpo.tracking.runs import validation_predictions
    from hpo.tracking.tracker import Tracker

    if _is_ensemble(entrant) or entrant.version is None:
        return entrant.judged
    runs, seeds = {entrant.trial.number: entrant.version.run_id}, _seeds(entrant)
    if len(seeds) > 1:
        uris = Tracker(home).kept_models(entrant.study)
        runs |= {each.number: resolve(home, uris[each.number]).run_id for each in seeds if each.number in uris}
    found = [validation_predictions(home, runs.get(each.number, "")) or {} for each in seeds]
    return [each["judged"] for each in found if "judged" in each]


def _may_have_views(entrant: ModelReference, images: int) -> bool:
    """Whether a model without a judgement by other images may average views: one of an earlier version may."""
    from hpo.models.calibration import FEWEST
    from hpo.models.views import candidates

    choices = candidates(entrant.setup.training.augment, entrant.card.image_shape)
    return entrant.spec.predict.views == "auto" and images >= FEWEST and bool(choices)


def _seeds(entrant: ModelReference) -> list[Trial]:
    """The trainings of the entrant's candidate in its race; only itself where it ran none."""
    mine = entrant.trial.candidate
    if mine.stage != FINAL:
        return [entrant.trial]
    key, finals = finalist_key(entrant.spec, mine), entrant.study.ranked(FINAL)
    return [trial for trial in finals if finalist_key(entrant.spec, trial.candidate) == key] or [entrant.trial]


def _recorded(trial: Trial) -> Ints:
    return np.array(unpack_classes(trial.result.predicted) if trial.result is not None else [], np.int64)


def parity(home: Home, new: ModelReference, model: Classifier) -> Verdict:
    """The gate that the logged model predicts as its trial did."""
    from hpo.tracking.runs import validation_predictions

    answers = validation_predictions(home, new.kept("it is to be promoted").run_id)
    if answers is None:
        return Verdict("reloads", True, "it loads; its trial recorded no predictions to compare with", "it loads")
    images = np.load(Path(new.card.folder) / "development_images.npy", mmap_mode="r", allow_pickle=False)
    ours, theirs = model.predict_levels(images[answers["rows"]]), answers["probabilities"]
    kind, several = _kind(new.trial.result), new.card.several_labels
    temperature = float(answers.get("temperature", 1.0))
    return parity_verdict(ours, theirs, kind=kind, several=several, origin="as in its trial", temperature=temperature)


def parity_verdict(
    ours: NDArray[np.floating],
    theirs: NDArray[np.floating],
    *,
    kind: str,
    several: bool,
    origin: str,
    after: str = "after reload",
    temperature: float = 1.0,
) -> Verdict:
    """Whether probabilities (n, classes) agree with those of origin, as far as numbers of that kind can.

    kind is float32, tf32 or bfloat16: what the model was trained in. after says what happened in between, and
    temperature is that of the program.
    """
    if ours.shape != theirs.shape:
        return Verdict("reloads", False, f"{ours.shape[1]} classes", f"{theirs.shape[1]} classes, {origin}")
    distances, differing = np.abs(ours - theirs).max(1), _differing(ours, theirs, several=several)
    most, share = _PARITY[kind]
    most *= max(1.0, 1 / temperature)  # below 1 it enlarges what logits differ by
    allowed, beyond = int(share * len(ours)), int((~(distances <= most)).sum())
    outcome = f"{differing} of {len(ours):,} predictions differ" if differing else "same predictions"
    further = f", {beyond} beyond it" if beyond else ""
    return Verdict(
        "reloads",
        beyond <= allowed and differing <= allowed,
        f"{outcome} {after} (largest difference {distances.max():.1g}; limit {most:.3g}{further})",
        f"{f'at most {allowed} other' if allowed else 'same'} predictions, trained in {kind}",
    )


def _differing(ours: NDArray[np.floating], theirs: NDArray[np.floating], *, several: bool) -> int:
    """How many images are answered differently: with another class, or with other labels above 1/2."""
    differs = ((ours > 0.5) != (theirs > 0.5)).any(1) if several else ours.argmax(1) != theirs.argmax(1)
    return int(differs.sum())


def _kind(result: TrialResult | None) -> str:
    settings = result.settings if result is not None else {}
    if settings.get("precision") == "bfloat16":
        return "bfloat16"
    return "float32" if settings.get("device", "cpu") == "cpu" else "tf32"


def same_signature(home: Home, model: Classifier, champion: ModelVersion) -> Verdict:
    """The gate that the challenger can replace the champion: same images in, same classes in one order."""
    from hpo.predict import load_model

    try:
        old = load_model(champion.model_uri, home=home)
    except HpoError as error:
        return Verdict("same signature", False, f"the champion cannot be loaded: {error.message}", "it loads")
    kinds = [f" of {each.input_kind}" if each.input_kind != "uint8" else "" for each in (model, old)]
    words = [
        f"{'x'.join(map(str, each.image_shape))}{kind}, {_shown(each.class_names)}"
        for each, kind in zip((model, old), kinds, strict=True)
    ]
    same = (model.image_shape, model.class_names, kinds[0]) == (old.image_shape, old.class_names, kinds[1])
    return Verdict("same signature", same, words[0], words[1])


def _shown(names: tuple[str, ...]) -> str:
    return f"{len(names)} classes: {', '.join(names)}"


def limits(home: Home, new: ModelReference, model: Classifier) -> Iterator[Verdict]:
    """The gates that the study declares: the constraints of its search, and `promote`."""
    from hpo.search.constraints import parse_constraint, violations
    from hpo.tracking.registry import fetch

    scores = new.trial.result.scores if new.trial.result is not None else {}
    for text, over in violations(new.spec, scores).items():
        name = parse_constraint(text).name
        measured = f"{name} {scores[name]:g}" if name in scores else f"{name} was not measured"
        yield Verdict("keeps its constraints", over <= 0, measured, text)
    asked = new.spec.promote
    if asked.latency_ms is not None:
        taken = latency_ms(model)
        yield Verdict("is fast", taken <= asked.latency_ms, f"{taken:.3g} ms an image", f"{asked.latency_ms:g} ms")
    if asked.size_mb is not None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = fetch(home, new.kept("its size is needed"), Path(scratch))
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        yield Verdict("is small", size <= asked.size_mb, f"{size:.3g} MB", f"{asked.size_mb:g} MB")


def latency_ms(model: Classifier, *, repeats: int = _REPEATS) -> float:
    """Milliseconds from one image to its probabilities by the logged program, here, now; median of `repeats` calls."""
    image = np.zeros((1, *model.image_shape), np.uint8)
    seconds = []
    for _ in range(3 + repeats):  # the first three warm up
        started = time.perf_counter()
        model.predict_levels(image)
        seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds[3:])
