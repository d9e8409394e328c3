"""The number of trainings that each worker does at once, in one computation."""

from __future__ import annotations

from dataclasses import dataclass

from hpo.errors import HpoError, SpecError
from hpo.records import DataCard
from hpo.spec.study import Setup, StudySpec

# At most a fifth of the remaining trials run at a time: samplers that learn need results before they propose.
_IN_FLIGHT = 5


@dataclass(frozen=True)
class StackSize:
    """The number of trainings in each worker at once; reason says why it is 1, "" where a number was asked for."""

    count: int
    reason: str = ""


def largest_stack(spec: StudySpec, *, left: int, workers: int, by_default: bool) -> int:
    """The most trainings that a worker should do at once, with `left` trials to go.

    by_default: the user asked for no number of workers. One worker that was asked for trains one candidate at a time,
    so that its results do not depend on a measurement.
    """
    if (workers == 1 and not by_default) or spec.search.thaw is not None:
        return 1  # trials that may be paused train alone
    from hpo.search.samplers import sampler_entry

    samplers = [spec.search.sampler, *(stage.sampler for stage in spec.search.stages if stage.sampler)]
    if not any(sampler_entry(sampler).learns for sampler in samplers):
        return max(1, left // workers)
    return max(1, left // _IN_FLIGHT // workers)


def measure_stack_size(spec: StudySpec, card: DataCard, device_name: str, *, threads: int, most: int) -> StackSize:
    """The number at which the smallest and the largest candidates, together, train fastest; run in the job process."""
    if most < 2:
        return StackSize(1, "one worker was asked for, or few trials are left")
    from hpo.training.device import free_memory
    from hpo.training.device import threads as with_threads
    from hpo.training.preflight import choose_places
    from hpo.training.trial import trial_data

    try:
        with with_threads(threads):
            return StackSize(*choose_places(_ends(spec), card, device_name=device_name, most=most))
    except (HpoError, RuntimeError, MemoryError) as error:  # the trials will fail with it, if it matters
        return StackSize(1, (str(error).splitlines() or [type(error).__name__])[0])
    finally:
        trial_data.cache_clear()  # the workers need the memory
        free_memory()


def _ends(spec: StudySpec) -> list[Setup]:
    """The candidates at both ends of the space, as far as they are valid; else the spec without a search."""
    found = []
    for end in (0, -1):
        try:
            found.append(spec.with_values({path: part.ends()[end] for path, part in spec.search.whole_space.items()}))
        except SpecError:
            continue
    return found or [spec.setup]
