from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny_study as tiny
from hpo.home import Home
from hpo.predict import load_model
from hpo.records import TrialState
from hpo.tracking.ledger import announce_opening, complete_opening, openings
from hpo.tracking.reader import read_tracking
from hpo.tracking.registry import resolve
from hpo.tracking.tracker import Tracker


@pytest.mark.slow
def test_a_study_on_a_server_needs_no_local_artifacts(server: Home, folder: Path, tmp_path: Path) -> None:
    tracker = Tracker(server)
    tracker.open_study(tiny.study(), tiny.spec(), tiny.data(), tiny.split())
    for number in range(2):
        candidate = tiny.candidate(number)
        tracker.start_trial(candidate, tiny.spec().with_values(candidate.parameters), worker="w0")
        tracker.log_epochs(number, tiny.epochs(3))
        tracker.end_trial(tiny.result(number))
        tracker.keep_model(number, folder)
    tracker.drop_model(0)
    version = tracker.register(tiny.study(), 1)
    assert tracker.register(tiny.study(), 1) == version == resolve(server, "tiny")
    study = tiny.study(tiny.trial(0), tiny.trial(1), tiny.trial(2, TrialState.PRUNED))
    tracker.reconcile(study, tiny.spec())
    tracker.close_study(study, status="FINISHED", summary="# study")
    assert list(tracker.kept_models(study)) == [1]
    assert len(list((tmp_path / "server").rglob("net.pt2"))) == 1
    assert not [path for path in server.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
    database = read_tracking(replace(server, tracking_uri=f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}"))
    asked = read_tracking(server)
    assert database is not None
    assert asked is not None
    assert sorted(database.runs, key=lambda run: run.id) == sorted(asked.runs, key=lambda run: run.id)
    assert database.versions == asked.versions
    assert [model for model in database.models if not model.deleted] == list(asked.models)
    model = load_model("tiny", home=server)
    assert model.predict_proba(np.zeros((2, *tiny.SHAPE), np.uint8)).shape == (2, 3)
    announced = announce_opening(server, study, model=version, trial=1, purpose="promote")
    opening = complete_opening(server, study, announced, {"test_accuracy": 0.9})
    (server.root / "openings.jsonl").unlink()
    assert openings(server, study) == [opening]
