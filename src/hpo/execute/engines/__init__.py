"""Engines: where workers live. A new one is a file here with an EngineFactory, and one entry in ENGINES."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.execute.engines.base import EngineFactory
    from hpo.options import RunOptions

# Name -> module:class of its factory, imported on use. SLURM is none of these: it starts whole supervisors
# (hpo.cluster), each with an engine of its own.
ENGINES = {
    "processes": "hpo.execute.engines.local:ProcessesFactory",
    "in_process": "hpo.execute.engines.in_process:InProcessFactory",
    "ray": "hpo.execute.engines.ray_cluster:RayFactory",
}


def engine_factory(options: RunOptions) -> EngineFactory:
    """The factory of the engine that the options ask for. Raises HpoError where it cannot serve them."""
    from hpo.errors import HpoError

    name = "in_process" if options.engine == "processes" and options.workers == 0 else options.engine
    if name not in ENGINES:
        raise HpoError(f"--engine {name}: there is no such engine.", f"Choose one of: {', '.join(ENGINES)}.")
    module, _, factory = ENGINES[name].partition(":")
    made: EngineFactory = getattr(import_module(module), factory)(options)
    return made
