"""Jobs of the job process that make ensembles and soups, and measure how long a model takes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from hpo.execute.workers.job_process import finish_trial
from hpo.records import DataCard, TrialResult
from hpo.spec.outcome import PredictSpec
from hpo.spec.study import Setup

if TYPE_CHECKING:
    from hpo.report.ensembles import Gain, Limits, Pool


def finish_ensemble(
    result: TrialResult,
    members: Sequence[tuple[str, int, Path]],
    rows: Any,
    labels: Any,
    probabilities: Any,
    setup: Setup,
    data: DataCard,
    predict: PredictSpec,
    most_ms: float,
) -> TrialResult:
    """Make an ensemble in result.folder, and finish it as a trial; see hpo.training.validation.leave_ensemble."""
    from hpo.training.validation import leave_ensemble

    shutil.rmtree(result.folder, ignore_errors=True)
    left = leave_ensemble(
        result, members, rows=rows, labels=labels, probabilities=probabilities, setup=setup, card=data
    )
    return _with_latency(left, data, predict, most_ms)


def _with_latency(left: TrialResult, data: DataCard, predict: PredictSpec, most_ms: float) -> TrialResult:
    """Export what an ensemble has left; its result with the time of one image. Without views where they take longer."""
    (latency,) = measure_latency([finish_trial(left, data, predict)])
    if latency > most_ms and predict.views != "off":
        (latency,) = measure_latency([finish_trial(left, data, predict.model_copy(update={"views": "off"}))])
    return replace(left, scores={**left.scores, "latency_ms": latency}, ended=time.time())


def build_soup(
    result: TrialResult,
    members: Sequence[tuple[str, int, Path]],
    pool: Pool,
    limits: Limits,
    rows: Any,
    setup: Setup,
    data: DataCard,
    objective: str,
    predict: PredictSpec,
) -> tuple[TrialResult, Gain | None]:
    """Average the weights of the best of these trials in result.folder; the result without members where none mix.

    members are candidates, best first; pool has their probabilities on the validation images in these rows.
    """
    import numpy as np

    from hpo.models.soup import Soup
    from hpo.report.ensembles import counted_score, estimate_soup
    from hpo.training.device import use_threads
    from hpo.training.validation import leave_scored

    use_threads(1)
    soup = Soup([folder for _, _, folder in members])
    alike = np.array(soup.alike)
    if len(alike) < 2:
        return result, None
    images = np.load(Path(data.folder) / "development_images.npy", mmap_mode="r", allow_pickle=False)[rows]
    pool = replace(pool, probabilities=pool.probabilities[alike])
    chosen, gain = estimate_soup(
        pool,
        lambda some: soup.probabilities(alike[list(some)].tolist(), images),
        limits,
        score=counted_score(objective, data.class_names),
        seed=0,
    )
    if len(chosen) < 2:
        return result, gain
    places = alike[chosen].tolist()
    shutil.rmtree(result.folder, ignore_errors=True)
    soup.save(places, [members[place][0] for place in places], Path(result.folder))
    left = leave_scored(
        replace(result, members={members[place][0]: 1 for place in places}, judged=gain.judged),
        rows=rows,
        labels=pool.labels,
        probabilities=soup.probabilities(places, images),
        setup=setup,
        card=data,
    )
    return _with_latency(left, data, predict, limits.latency_ms), gain


def measure_latency(folders: Sequence[Path], *, repeats: int = 30) -> list[float]:
    """Milliseconds for one image of the program in each folder, on one thread of this CPU; medians."""
    import numpy as np

    from hpo.models.safe_loader import Program, read_config
    from hpo.training.device import use_threads

    use_threads(1)
    medians = []
    for folder in folders:
        program, shape = Program(folder / "net.pt2"), read_config(folder / "config.json")["image_shape"]
        seconds = []
        for _ in range(3 + repeats):  # the first three warm up
            started = time.perf_counter()
            program.predict(np.zeros((1, *shape), np.uint8))
            seconds.append(time.perf_counter() - started)
        medians.append(1000 * median(seconds[3:]))
    return medians
