"""Each way in which a candidate fails has a kind, a reason and a traceback; memory that is short is made do with."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from deadly_jobs import await_end
from formula_study import formula, formula_spec
from hpo.errors import disk_full
from hpo.events import EpochEnded, TrialEnded
from hpo.execute.engines.base import WorkerLost
from hpo.execute.engines.in_process import InProcess
from hpo.execute.engines.local import LocalProcesses
from hpo.execute.run_study import run_study
from hpo.execute.stack_size import _ends
from hpo.execute.workers.task import Task, train_task
from hpo.home import Home
from hpo.records import Candidate, FailureKind, StudyResult, Trial, TrialResult, TrialState
from hpo.report.summary import failure_lines
from hpo.spec.load import load_study
from hpo.spec.models import CnnSpec, MlpSpec, OwnModelSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec, StudySpec
from hpo.spec.training import OptimizerSpec, TrainingSpec
from hpo.tracking.store import connect


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def _task(card, tmp_path, model, *, split=None, **training):
    options = {"epochs": 2, "batch_size": 32, "precision": "float32", **training}
    setup = Setup(
        data=DataSpec(name="digits"),
        split=split or SplitSpec(kind="holdout"),
        model=model,
        training=TrainingSpec(**options),
    )
    return Task(0, setup, 7, card, str(tmp_path / "left"))


def _own(name, **options):
    return OwnModelSpec(kind=f"troubled_nets:{name}", options=options)


def _hungry(tmp_path, room, error="gpu"):
    return _own("hungry", room=room, note=str(tmp_path / "seen"), error=error)


def _run(task):
    training = train_task(task, "cpu")
    message, epochs = next(training), []
    while isinstance(message, EpochEnded):
        epochs.append(message.epoch)
        message = training.send(True)
    return epochs, message.result


@pytest.mark.parametrize("error", ["gpu", "cpu", "python"])
def test_out_of_memory_goes_on_with_half_as_many_images_at_once(card, tmp_path, error):
    epochs, result = _run(_task(card, tmp_path, _hungry(tmp_path, 16, error)))
    assert result.state is TrialState.COMPLETE
    assert result.failure is None
    assert result.settings["micro_batch"] == "16"
    assert [epoch.number for epoch in epochs] == [1, 2]
    seen = (tmp_path / "seen").read_text().split()
    assert seen[:3] == ["32", "16", "16"]


def test_the_effective_batch_stays(card, tmp_path):
    whole, _ = _run(_task(card, tmp_path, _hungry(tmp_path, 32)))
    pieces, result = _run(_task(card, tmp_path, _hungry(tmp_path, 8)))
    assert result.settings["micro_batch"] == "8"
    losses = [[epoch.scores["train_loss"] for epoch in epochs] for epochs in (whole, pieces)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_after_two_halvings_the_candidate_is_infeasible(card, tmp_path):
    epochs, result = _run(_task(card, tmp_path, _hungry(tmp_path, 4)))
    assert epochs == []
    assert (tmp_path / "seen").read_text().split() == ["32", "16", "8"]
    assert (result.state, result.feasible) == (TrialState.PRUNED, False)
    assert result.failure is FailureKind.OUT_OF_MEMORY
    assert "8 images at once" in result.reason
    assert "2.00 GiB" in result.reason
    assert "OutOfMemoryError" in result.traceback


def test_a_single_image_cannot_be_halved(card, tmp_path):
    _, result = _run(_task(card, tmp_path, _hungry(tmp_path, 0), batch_size=2))
    assert (tmp_path / "seen").read_text().split() == ["2", "1"]
    assert result.failure is FailureKind.OUT_OF_MEMORY


DIVERGING = {"optimizer": OptimizerSpec(name="sgd", lr=100.0, momentum=0.99)}
CASES = {
    "not_finite": (MlpSpec(kind="mlp", hidden=[64, 64, 64]), DIVERGING),
    "setup": (CnnSpec(kind="cnn", kernel=9, padding="valid"), {}),
    "exception": (_own("raising"), {}),
    "exception in the function": (_own("unbuilt"), {}),
    "data": (_own("raising"), {"split": SplitSpec(kind="official")}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_failure_has_its_kind_its_reason_and_its_traceback(card, tmp_path, case):
    model, training = CASES[case]
    _, result = _run(_task(card, tmp_path, model, **training))
    assert result.state is TrialState.FAILED
    assert result.failure == case.split()[0]
    assert result.reason
    assert "Traceback" in result.traceback
    assert TrialResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_records_of_earlier_and_later_versions_still_load():
    assert TrialResult.from_json({"number": 1, "state": "failed"}).failure is None
    assert TrialResult.from_json({"number": 1, "state": "failed", "failure": "new kind"}).failure is None


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0",
        "PytorchStreamWriter failed writing file data/0: file write failed",
    ],
)
def test_a_full_disk_is_known_by_torchs_words_too(words):
    assert disk_full(RuntimeError(words))
    assert not disk_full(RuntimeError("unexpected pos 64 vs 0"))


@pytest.fixture(scope="module")
def engine():
    engine = LocalProcesses(["cpu"], threads=1)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("how", "signal"), [("abort", "SIGABRT"), ("segfault", "SIGSEGV"), ("kill", "SIGKILL"), ("exit", "exit code 3")]
)
def test_a_crash_in_native_code_says_which_signal_and_where(engine, card, tmp_path, how, signal):
    engine.submit(0, _task(card, tmp_path, _own("crashing", how=how)))
    deadline = time.monotonic() + 60
    lost = None
    while lost is None and time.monotonic() < deadline:
        lost = next((message for _, message in engine.poll(0.5)), None)
    assert isinstance(lost, WorkerLost)
    assert signal in lost.cause
    # A kill and an exit leave no time for last words.
    assert ("troubled_nets.py" in lost.traceback) == (how in ("abort", "segfault"))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks /proc who is alive")
def test_a_worker_that_is_killed_while_its_child_holds_the_pipe_is_lost_at_once_and_so_is_the_child(
    engine, card, tmp_path
):
    child = tmp_path / "child"
    engine.submit(0, _task(card, tmp_path, _own("crashing", how=f"orphan:{child}")))
    ends, messages = time.monotonic() + 60, []
    while not messages and time.monotonic() < ends:
        messages = engine.poll(0.5)
    assert [message.cause for _, message in messages] == [
        "signal 9, SIGKILL: often the system's answer when memory is short"
    ]
    assert await_end(int(child.read_text()))


def test_what_a_network_prints_in_this_process_goes_to_standard_error(card, tmp_path, capsys):
    trainer = InProcess()
    trainer.submit(0, _task(card, tmp_path, _own("talking"), epochs=1))
    while not isinstance(trainer.poll(0.5)[0][1], TrialEnded):
        pass
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "my own words\n")


def test_a_study_whose_candidates_all_crash_stops_and_says_why(run_formula, card, tmp_path):
    class Deadly:
        slots = 1

        def accepts(self, slot):
            return True

        def submit(self, slot, task):
            self.task = task

        def poll(self, timeout):
            return [(0, WorkerLost(-11, "Fatal Python error: in my.py"))]

        def close(self):
            pass

    run = run_formula(formula_spec(trials=50), engine=Deadly())
    assert run.reason == "failing"
    study = run.study.result()
    failed = [trial.result for trial in study.trials if trial.state is TrialState.FAILED]
    assert len(failed) == 5
    assert all(result.failure is FailureKind.WORKER_DIED and "my.py" in result.traceback for result in failed)
    assert len(study.trials) == 15
    first, second = failure_lines(study)
    assert first == "5 worker_died"
    assert "SIGSEGV" in second
    assert "4 more" in second
    assert ("end", (study.trials[-1].number, TrialState.FAILED)) in run.tracker.calls


def test_a_study_for_which_memory_never_suffices_stops(run_formula):
    def starving(task, device):
        reason, kind = f"out of memory: {task.number} GiB", FailureKind.OUT_OF_MEMORY
        yield TrialEnded(TrialResult(task.number, TrialState.PRUNED, reason=reason, failure=kind, feasible=False))

    run = run_formula(formula_spec(trials=50), trainer=starving)
    assert run.reason == "failing"
    assert [trial.state for trial in run.trials] == [TrialState.PRUNED] * 5
    assert not any(trial.result.feasible for trial in run.trials)


def test_infeasible_candidates_among_good_ones_stop_nothing_and_are_never_best(run_formula):
    def sometimes(task, device):
        if task.setup.model.hidden > 500:
            kind = FailureKind.OUT_OF_MEMORY
            yield TrialEnded(TrialResult(task.number, TrialState.PRUNED, reason="!", failure=kind, feasible=False))
        else:
            yield from formula(task, device)

    run = run_formula(formula_spec(trials=12, sampler="tpe"), trainer=sometimes)
    assert run.reason == "budget"
    assert {trial.state for trial in run.trials} == {TrialState.PRUNED, TrialState.COMPLETE}
    assert run.study.result().best.result.feasible


@pytest.mark.slow
def test_kind_reason_and_traceback_are_on_the_trial_and_on_its_run(tmp_path, card, monkeypatch):
    from mlflow.artifacts import load_text

    monkeypatch.setenv("HPO_DATA", str(Path(card.folder).parents[2]))
    path = tmp_path / "crash.yaml"
    path.write_text(
        "data: {name: digits}\nsplit: {kind: holdout}\n"
        "model: {kind: 'troubled_nets:crashing', options: {how: never}}\n"
        "training: {epochs: 1, precision: float32}\nkeep: {models: none}\n"
        "search: {trials: 2, sampler: grid, space: {model.options.how: {choice: [never, segfault]}}}\n"
    )
    study = run_study(load_study(path, trust=True), workers=1, home=tmp_path)
    by_state = {trial.state: trial for trial in study.trials}
    assert by_state.keys() == {TrialState.COMPLETE, TrialState.STOPPED, TrialState.FAILED}
    failed = by_state[TrialState.FAILED].result
    assert failed.failure is FailureKind.WORKER_DIED
    assert "SIGSEGV" in failed.reason
    assert "troubled_nets.py" in failed.traceback
    client = connect(Home.find(tmp_path))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`hpo.failure` = 'worker_died'")
    run = next(run for run in runs if run.data.tags["hpo.trial"] == str(failed.number))
    assert (run.info.status, run.data.tags["hpo.state"]) == ("FAILED", "failed")
    assert "SIGSEGV" in run.data.tags["hpo.reason"]
    assert "troubled_nets.py" in load_text(f"{run.info.artifact_uri}/traceback.txt")
    assert len(runs) == 3


def test_an_interrupted_trial_has_its_kind(run_formula):
    interrupted = threading.Event()
    run = run_formula(
        formula_spec(), watch=lambda event: isinstance(event, EpochEnded) and interrupted.set(), interrupted=interrupted
    )
    assert run.trials[0].result.failure is FailureKind.INTERRUPTED


def test_commonest_reason_counts_reasons_that_differ_in_numbers_as_one():
    reasons = ["epoch 1: train_loss nan.", "does not fit", "epoch 12: train_loss nan."]
    trials = [
        Trial(
            Candidate(number, number, {}, 0),
            TrialState.FAILED,
            TrialResult(number, TrialState.FAILED, reason=reason, failure=FailureKind.NOT_FINITE),
        )
        for number, reason in enumerate(reasons)
    ]
    study = StudyResult("s", 1, "maximize", "valid_accuracy", tuple(trials))
    assert failure_lines(study) == [
        "3 not_finite",
        "epoch 12: train_loss nan. (trial 2, and 1 more so)",
    ]
    assert failure_lines(StudyResult("s", 1, "maximize", "valid_accuracy")) == []


MISFIT = {"model.filters": {"choice": [[4, 4], [4, 4, 4]]}, "model.padding": {"choice": ["same", ["same", "same"]]}}


def _with_misfit() -> StudySpec:
    plain = formula_spec(space={"model.hidden": {"choice": [1]}}, sampler="grid", trials=4).model_dump()
    plain["model"], plain["search"]["space"] = {"kind": "convnet", "depth": 2}, MISFIT
    return StudySpec.model_validate(plain)


def test_values_that_fit_the_spec_but_not_each_other_are_infeasible_and_the_study_goes_on(run_formula):
    run = run_formula(_with_misfit())
    for trial in run.trials:
        values = trial.candidate.parameters
        fits = len(values["model.filters"]) == 2 or values["model.padding"] == "same"
        assert (trial.state, trial.result.feasible) == (
            (TrialState.COMPLETE, True) if fits else (TrialState.PRUNED, False)
        )
    (misfit,) = [trial for trial in run.trials if not trial.result.feasible]
    assert "padding lists 2 blocks of 3" in misfit.result.reason
    assert run.reason == "budget"
    assert ("start", misfit.number) in run.tracker.calls
    assert ("end", (misfit.number, TrialState.PRUNED)) in run.tracker.calls


def test_values_that_do_not_fit_each_other_are_no_reason_to_measure_no_stack():
    assert _ends(_with_misfit()) == [_with_misfit().with_values({"model.filters": [4, 4], "model.padding": "same"})]
