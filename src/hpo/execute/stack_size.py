"""How many trainings each worker does side by side."""

from __future__ import annotations

from dataclasses import dataclass

from hpo.errors import HpoError, SpecError
from hpo.records import DataCard
from hpo.spec.study import Setup, StudySpec

# One in so many of the trials still to come may be under way at a time: samplers that learn from results need some.
_IN_FLIGHT = 5
_LEARNING = ("tpe", "cmaes", "gp")


@dataclass(frozen=True)
class Places:
    """What each worker does side by side, and why not more: "" where that was asked for."""

    count: int
    reason: str = ""


def most_places(spec: StudySpec, *, left: int, workers: int, by_default: bool) -> int:
    """The most trainings that a worker should have at a time, with so many trials left.

    by_default says that nobody asked for a number of workers. Who asks for one gets one training at a time, so that
    nothing depends on a clock.
    """
    if workers == 1 and not by_default:
        return 1
    samplers = [spec.search.sampler, *(stage.sampler for stage in spec.search.stages if stage.sampler)]
    if not any(sampler.name in _LEARNING for sampler in samplers):
        return max(1, left // workers)
    return max(1, left // _IN_FLIGHT // workers)


def measure_places(spec: StudySpec, card: DataCard, device_name: str, *, threads: int, most: int) -> Places:
    """The number at which the smallest and the largest candidates, together, train fastest; for the helper process."""
    if most < 2:
        return Places(1, "one worker was asked for, or few trials are left")
    from hpo.training.compute.device import free_memory
    from hpo.training.compute.device import threads as with_threads
    from hpo.training.stacking.choice import choose_places
    from hpo.training.trial import trial_data

    try:
        with with_threads(threads):
            return Places(*choose_places(_ends(spec), card, device_name=device_name, most=most))
    except (HpoError, RuntimeError, MemoryError) as error:  # the trials will tell
        return Places(1, (str(error).splitlines() or [type(error).__name__])[0])
    finally:
        trial_data.cache_clear()  # the workers are to have a GPU's memory
        free_memory()


def _ends(spec: StudySpec) -> list[Setup]:
    """The candidates at both ends of the space, where they are valid; else the spec as it is written."""
    found = []
    for end in (0, -1):
        try:
            found.append(spec.with_values({path: part.ends()[end] for path, part in spec.search.whole_space.items()}))
        except SpecError:
            continue
    return found or [spec.setup]
