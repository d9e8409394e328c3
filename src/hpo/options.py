"""The options of `hpo run`, as one record that goes from the command line to every place that runs a study."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hpo.errors import HpoError, SpecError


def _option(default: Any, flag: str = "", *, once: bool = False, worker: bool = False) -> Any:
    """A field with its default.

    flag is its name on the command line where that is not the field's. once: it concerns one run only, and the printed
    command that resumes the study leaves it out. worker: the workers that a scheduler starts have it too.
    """
    return field(default=default, metadata={"flag": flag, "once": once, "worker": worker})


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a study is run. A new flag of `hpo run` is one field here and one option in cli/run.py, with the same name.

    settings are texts such as training.epochs=5 that override the study file; trust allows importing the functions that
    a study from elsewhere names. trials is the study's total. workers is the number of processes that train: None is
    one for each core or GPU, 0 trains in this process. stack is the number of trainings that a worker does at once, in
    one computation; None: by a short measurement, 1 where that does not pay, or where workers=1. device is auto, cpu,
    cuda, cuda:N or mps. home is the folder that holds mlruns. fresh starts a new generation of the study; retry_failed
    tries failed trials again. timeout is in seconds. keep_models is all, none or best:K; precision auto, float32 or
    bfloat16. With profile trainings share nothing, and a StudyProfiled says where the time went. engine is a key of
    hpo.execute.engines.ENGINES, or slurm. address, gpus_per_trial and cpus_per_trial are Ray's; slurm (KEY=VALUE),
    detach and print_script are SLURM's. Raises HpoError for values out of range.
    """

    settings: tuple[str, ...] = _option((), "--set")
    trust: bool = _option(False, worker=True)
    precision: str | None = _option(None)
    home: str | Path | None = _option(None)
    trials: int | None = _option(None)
    workers: int | None = _option(None)
    stack: int | None = _option(None, worker=True)
    device: str = _option("auto", worker=True)
    keep_models: str | None = _option(None)
    engine: str = _option("processes")
    address: str | None = _option(None)
    gpus_per_trial: float | None = _option(None)
    cpus_per_trial: float | None = _option(None)
    slurm: tuple[str, ...] = _option(())
    timeout: float | None = _option(None, once=True)
    profile: bool = _option(False, once=True)
    fresh: bool = _option(False, once=True)
    retry_failed: bool = _option(False, once=True)
    detach: bool = _option(False, once=True)
    print_script: bool = _option(False, "--print", once=True)

    def __post_init__(self) -> None:
        for name in ("settings", "slurm"):  # lists of the command line
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.trials is not None and self.trials < 1:
            raise SpecError(f"--trials {self.trials}: is not positive.", "Give the study's total, such as --trials 50.")
        if self.workers is not None and self.workers < 0:
            raise HpoError(f"--workers {self.workers}: is negative.", "Give 1 or more, or 0 to train in this process.")
        if self.stack is not None and self.stack < 1:
            raise HpoError(f"--stack {self.stack}: is not positive.", "Give 1 or more, or auto.")

    @classmethod
    def pick(cls, given: Mapping[str, Any]) -> RunOptions:
        """The options among the arguments of a command; the others are the command's own."""
        return cls(**{part.name: given[part.name] for part in fields(cls) if part.name in given})

    def to_resume(self) -> RunOptions:
        """The options of the command that resumes the study: all but those that concern one run."""
        return replace(self, **{part.name: part.default for part in fields(self) if part.metadata["once"]})

    def of_worker(self) -> RunOptions:
        """The options that each `hpo worker` of a scheduler's jobs has too."""
        return RunOptions(**{part.name: getattr(self, part.name) for part in fields(self) if part.metadata["worker"]})

    def given(self) -> Iterator[tuple[str, Any]]:
        """(flag, value) of each option that differs from its default, in the order of the fields."""
        for part in fields(self):
            if (value := getattr(self, part.name)) != part.default:
                yield part.metadata["flag"] or f"--{part.name.replace('_', '-')}", value

    def flags(self) -> list[str]:
        """The words of a command line that parse to these options."""
        words: list[str] = []
        for flag, value in self.given():
            if value is True:
                words.append(flag)
            elif isinstance(value, tuple):
                words += [word for text in value for word in (flag, text)]
            else:
                words += [flag, str(value).removesuffix(".0") if isinstance(value, float) else str(value)]
        return words

    def command_line(self, command: str, study: str) -> str:
        """`hpo COMMAND STUDY` with these options, quoted for a shell."""
        return shlex.join(["hpo", command, study, *self.flags()])
