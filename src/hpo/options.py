"""The options of `hpo run`, as one record that goes from the command line to every place that runs a study."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hpo.errors import HpoError, SpecError

_MOST = {"trials": 10**9, "workers": 10_000, "stack": 10_000}  # what databases store, what no machine has


def _shown(number: float) -> str:
    return f"{number}" if abs(number) < 10**20 else f"{str(number)[:10]}..."


def check_minutes(minutes: float | None) -> None:
    """Refuse a budget that is no time, or endless; None is none. Raises HpoError."""
    if minutes is not None and not 0 < minutes <= _MOST["trials"]:
        raise HpoError(f"--minutes {minutes:g}: is no number of minutes.", "For example: --minutes 10")


def _option(default: Any, **metadata: Any) -> Any:
    """A field with its default.

    flag is its name on the command line where that is not the field's. once: it concerns one run only, and the printed
    command that resumes the study leaves it out. worker: the workers that a scheduler starts have it too. engine: it
    exists for that engine only; not_for: for all but that one.
    """
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a study is run. A new flag of `hpo run` is one field here and one option in cli/run.py, with the same name.

    settings are texts such as training.epochs=5 that override the study file; trust allows importing the functions that
    a study from elsewhere names. trials is the study's total. workers is the number of processes that train: None is
    one for each core or GPU, 0 trains in this process. stack is the number of trainings that a worker does at once, in
    one computation; None: by a short measurement, 1 where that does not pay, or where workers=1. device is auto, cpu,
    cuda, cuda:N or mps. home is the folder that holds mlruns. fresh starts a new generation of the study, extend goes
    on after its space has changed; retry_failed tries failed trials again. timeout is in seconds. minutes is the budget
    that trials and epochs are fitted to, or that a study of own images is made for. keep_models is all, none or best:K;
    precision auto, float32 or bfloat16. With profile trainings share nothing, and a StudyProfiled says where the time
    went. engine is a key of hpo.execute.engines.ENGINES, or slurm. address and cpus_per_trial are Ray's; slurm
    (KEY=VALUE), detach and print_script are SLURM's. gpus_per_trial is the number of GPUs that train a trial together;
    Ray also gives shares of one. Raises HpoError for values out of range.
    """

    settings: tuple[str, ...] = _option((), flag="--set")
    trust: bool = _option(False, worker=True)
    precision: str | None = _option(None)
    home: str | Path | None = _option(None)  # noqa: RUF009 - a field, whatever ruff makes of Path
    trials: int | None = _option(None)
    workers: int | None = _option(None)
    stack: int | None = _option(None, worker=True)
    device: str = _option("auto", worker=True)
    keep_models: str | None = _option(None)
    engine: str = _option("processes")
    address: str | None = _option(None, engine="ray")
    gpus_per_trial: float | None = _option(None, worker=True)
    cpus_per_trial: float | None = _option(None, engine="ray")
    slurm: tuple[str, ...] = _option((), engine="slurm")
    timeout: float | None = _option(None, once=True, not_for="slurm")
    minutes: float | None = _option(None, once=True, not_for="slurm")
    profile: bool = _option(False, once=True, not_for="slurm")
    fresh: bool = _option(False, once=True)
    extend: bool = _option(False, once=True)
    retry_failed: bool = _option(False, once=True)
    detach: bool = _option(False, once=True, engine="slurm")
    print_script: bool = _option(False, flag="--print", once=True, engine="slurm")

    def __post_init__(self) -> None:
        for name in ("settings", "slurm"):  # lists of the command line
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        for name, least, error, hint in (
            ("trials", 1, SpecError, "Give the study's total, such as --trials 50."),
            ("workers", 0, HpoError, "Give 1 or more, or 0 to train in this process."),
            ("stack", 1, HpoError, "Give 1 or more, or auto."),
        ):
            number, most = getattr(self, name), _MOST[name]
            if number is not None and not least <= number <= most:
                raise error(f"--{name} {_shown(number)}: is not between {least} and {most:,}.", hint)
        check_minutes(self.minutes)
        if self.fresh and self.extend:
            raise HpoError("--fresh and --extend: a new study has no trials to keep.", "Leave one of them out.")
        gpus = self.gpus_per_trial
        if self.engine != "ray" and gpus is not None and (not gpus >= 1 or gpus % 1):
            raise HpoError(
                f"--gpus-per-trial {gpus:g}: is not a whole number of GPUs.",
                "Give 1 or more; --engine ray also gives shares of one GPU, such as 0.5.",
            )
        if (self.stack or 1) > 1 and self.ranks > 1:
            both = f"--stack {self.stack} and --gpus-per-trial {self.ranks}"
            raise HpoError(f"{both}: a GPU trains several candidates, or several train one.", "Leave one of them out.")
        for part in self._given():
            flag, needed = _flag(part), part.metadata.get("engine", self.engine)
            if needed != self.engine:
                raise HpoError(f"{flag}: is only for --engine {needed}.", f"Add: --engine {needed}")
            if part.metadata.get("not_for") == self.engine:
                hint = "Leave it out; the time of a job: --slurm timeout_min=60"
                raise HpoError(f"{flag}: is not for --engine {self.engine}.", hint)

    @property
    def ranks(self) -> int:
        """The number of processes that train a trial together."""
        return int(max(1, self.gpus_per_trial or 1))

    @classmethod
    def pick(cls, given: Mapping[str, Any]) -> RunOptions:
        """The options among the arguments of a command; the others are the command's own."""
        return cls(**{part.name: given[part.name] for part in fields(cls) if part.name in given})

    def to_resume(self) -> RunOptions:
        """The options of the command that resumes the study: all but those that concern one run."""
        once: dict[str, Any] = {part.name: part.default for part in fields(self) if part.metadata.get("once")}
        return replace(self, **once)

    def of_worker(self) -> RunOptions:
        """The options that each `hpo worker` of a scheduler's jobs has too."""
        return RunOptions(
            **{part.name: getattr(self, part.name) for part in fields(self) if part.metadata.get("worker")}
        )

    def _given(self) -> Iterator[Field[Any]]:
        """The fields that differ from their default, in order."""
        return (part for part in fields(self) if getattr(self, part.name) != part.default)

    def flags(self) -> list[str]:
        """The words of a command line that parse to these options."""
        words: list[str] = []
        for part in self._given():
            flag, value = _flag(part), getattr(self, part.name)
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


def _flag(part: Field[Any]) -> str:
    return str(part.metadata.get("flag", f"--{part.name.replace('_', '-')}"))
