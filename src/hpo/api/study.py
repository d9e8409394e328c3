"""A study that has run, as an object for scripts and notebooks: data frames, the best model, figures, a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import HpoError, ModelError, StoreError
from hpo.home import Home
from hpo.metrics import label_of
from hpo.records import FINAL, StudyResult, Trial, TrialState

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from hpo.predict import Classifier

_SHOWN = 5  # trials in a notebook


def open_study(name: str, *, home: str | Path | Home | None = None) -> Study:
    """A study that has run or is running, as it is now, from the folder that holds its `mlruns`.

    name is a study's, or a title such as name~1 for its first generation. Raises StoreError where there is none.
    """
    from hpo.storage.reader import read_study

    place = home if isinstance(home, Home) else Home.find(home)
    return Study.of(read_study(place, name), place)


@dataclass(frozen=True, repr=False)
class Study(StudyResult):
    """A study's record with what one does with it. home is the folder that it is kept in.

    The names are Optuna's where Optuna has the same.
    """

    home: Home = field(default_factory=Home.find, compare=False)

    @classmethod
    def of(cls, result: StudyResult, home: Home) -> Study:
        """The same record with its home."""
        return cls(**{part.name: getattr(result, part.name) for part in fields(StudyResult)}, home=home)

    def __repr__(self) -> str:
        return f"<{self._summary()}>"

    def _repr_html_(self) -> str:
        from hpo.report.trials import trials_table

        question = self.spec.get("question")
        lines = [f"<b>{escape(self._summary())}</b>", *([escape(str(question))] if question else [])]
        return f"<p>{'<br>'.join(lines)}</p>{trials_table(self, most=_SHOWN) if self.trials else ''}"

    def _summary(self) -> str:
        ends = ", ".join(f"{self.count(state)} {state.value}" for state in TrialState if self.count(state))
        best = self.best
        found = f"; best {label_of(self.objective)} {best.value:.4f}, trial {best.number}" if best else ""
        return f"Study {self.title}: {ends or 'no trial'}{found}"

    @property
    def best_trial(self) -> Trial:
        """The complete trial of the search with the best objective. Raises StoreError where none is complete."""
        if self.best is None:
            raise StoreError(f"study {self.title}: no trial is complete.", f"Run it: hpo run {self.name}")
        return self.best

    @property
    def best_params(self) -> dict[str, Any]:
        """Dotted path -> value of the best trial."""
        return dict(self.best_trial.candidate.parameters)

    @property
    def best_value(self) -> float:
        """The objective of the best trial."""
        return float(self.best_trial.value or 0.0)

    def trials_dataframe(self) -> pd.DataFrame:
        """A row for each trial, with Optuna's columns: number, value, params_<path>, state, times; then scores.

        With several objectives values_0, values_1, ... A parameter that a trial lacks is missing there.
        """
        import pandas as pd

        return pd.DataFrame([_row(trial, len(self.objectives)) for trial in self.trials])

    to_dataframe = trials_dataframe

    def epochs_dataframe(self) -> pd.DataFrame:
        """A row for each epoch of each trial: trial, fold, epoch, scores, learning_rate, seconds."""
        import pandas as pd

        return pd.DataFrame(
            {
                "trial": trial.number,
                "fold": epoch.fold,
                "epoch": epoch.number,
                **epoch.scores,
                "learning_rate": epoch.learning_rate,
                "seconds": epoch.seconds,
            }
            for trial in self.trials
            for epoch in (trial.result.epochs if trial.result else ())
        )

    def best_model(self) -> Classifier:
        """The newest registered model of this study, ready to predict. Raises ModelError where there is none."""
        from hpo.predict import load_model
        from hpo.tracking.registry import versions

        own = [each for each in versions(self.home, self.name) if each.study == self.title and not each.origin]
        if not own:
            raise ModelError(
                f"study {self.title}: none of its models is registered.", f"Let it run to its end: hpo run {self.name}"
            )
        return load_model(f"{self.name}/{own[0].version}", home=self.home)

    @property
    def plot(self) -> Plots:
        """The figures of the study: plot.optimization_history(), plot.slice(), ..."""
        return Plots(self)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the page of `hpo report` and return its path."""
        from hpo.jobs.report import write_report

        return write_report(self.exact, home=self.home.root.parent, out=out)


def _row(trial: Trial, aims: int) -> dict[str, Any]:
    result = trial.result
    values = (result.values if result else ()) or (trial.value,)
    begun = datetime.fromtimestamp(trial.started) if trial.started else None
    ended = datetime.fromtimestamp(trial.started + trial.run_seconds) if begun and trial.run_seconds else None
    row: dict[str, Any] = {"number": trial.number}
    row |= {f"values_{place}": value for place, value in enumerate(values)} if aims > 1 else {"value": trial.value}
    row |= {"datetime_start": begun, "datetime_complete": ended, "duration": ended - begun if begun and ended else None}
    row |= {f"params_{path}": value for path, value in trial.candidate.parameters.items()}
    row |= {"state": trial.state.name, "stage": trial.candidate.stage or ""}
    if result is not None:
        row |= {"best_epoch": result.best_epoch, "epochs": len(result.epochs), "seconds": result.seconds}
        row |= {"parameter_count": result.parameter_count, **result.scores}
    return row


@dataclass(frozen=True)
class Plots:
    """The figures of a study, as matplotlib figures, which notebooks show. Raises HpoError where there is nothing yet.

    They are those of `hpo report` and of the study's run in MLflow.
    """

    study: Study

    def optimization_history(self) -> Figure:
        """The objective of each trial, and the best so far."""
        from hpo.report.figures.study import optimisation_history

        return self._shown(optimisation_history)

    def learning_curves(self) -> Figure:
        """The objective over the epochs of each trial."""
        from hpo.report.figures.study import learning_curves

        return self._shown(learning_curves)

    def param_importances(self, *, fanova: bool = False) -> Figure:
        """The importance of each parameter, by PED-ANOVA and, if asked for, fANOVA."""
        from hpo.report.figures.study import importance_figure

        return self._shown(lambda _: importance_figure(self._importances(fanova=fanova)))

    def parallel_coordinate(self) -> Figure:
        """Each complete trial as a line across its parameters."""
        from hpo.report.figures.space import parallel_coordinates

        return self._shown(parallel_coordinates)

    def slice(self) -> Figure:
        """The objective over each parameter."""
        from hpo.report.figures.space import slices

        return self._shown(slices)

    def effects(self) -> Figure:
        """The mean objective at each value of each parameter."""
        from hpo.report.figures.space import effects

        return self._shown(effects)

    def contour(self) -> Figure:
        """The objective over the two most important numeric parameters."""
        from hpo.report.figures.pairs import contour

        stages = list(self._importances().values())
        shares = list(stages[-1].values())[-1] if stages else {}
        return self._shown(lambda study: contour(study, shares))

    def heat_map(self) -> Figure:
        """The mean objective in each cell of a grid of two parameters."""
        from hpo.report.figures.pairs import heat_map

        return self._shown(heat_map)

    def pareto_front(self) -> Figure:
        """Each pair of several objectives, with the Pareto front."""
        from hpo.report.figures.study import pareto_front

        return self._shown(pareto_front)

    def timeline(self) -> Figure:
        """The trials of each worker over time."""
        from hpo.report.figures.study import timeline

        return self._shown(timeline)

    def confusion_matrix(self) -> Figure:
        """True and predicted classes of the validation images, of the final training or the best trial."""
        from hpo.report.figures.classifier import confusion_figure

        best = next(iter([*self.study.ranked(FINAL), *self.study.ranked()]), None)
        counts = best.result.confusion if best is not None and best.result is not None else ()
        names = self._class_names(len(counts))
        return self._shown(lambda _: confusion_figure(counts, names) if counts else None)

    def _importances(self, *, fanova: bool = False) -> Mapping[str, Mapping[str, Mapping[str, float]]]:
        from hpo.search.importance import importances

        return importances(self.study, fanova=fanova)

    def _class_names(self, count: int) -> tuple[str, ...]:
        from hpo.data.prepare import prepared

        card = prepared(self.study.data_digest)
        return card.class_names if card is not None else tuple(map(str, range(count)))

    def _shown(self, draw: Callable[[StudyResult], Figure | None]) -> Figure:
        from hpo.report.figures import png_bytes

        figure = draw(self.study)
        if figure is None:
            raise HpoError(
                f"study {self.study.title}: there is nothing to draw in this figure.",
                "It needs more trials, or other parameters: see study.trials_dataframe()",
            )
        # IPython shows figures as pictures only where pyplot was imported, which these do without.
        figure._repr_png_ = lambda: png_bytes(figure)  # type: ignore[attr-defined]
        return figure
