"""Draw all pictures of a finished study and its report, side by side in two processes, and say how long that takes.

OMP_NUM_THREADS=1 uv run python benchmarks/figures.py bloodmnist-mlp
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from hpo.data.prepare import prepared
from hpo.execute.workers.job_process import draw_study, draw_trial
from hpo.home import Home
from hpo.jobs.report import write_report
from hpo.relocation import local_path
from hpo.storage.reader import read_study
from hpo.tracking.runs import TRIAL, children, find_parent
from hpo.tracking.store import connect


def draw_pictures(study: str, folder: str) -> int:
    """The pictures that an `hpo run` draws: of the study, and of every trial whose validation answers are kept."""
    home = Home.find()
    record = read_study(home, study)
    data = prepared(record.data_digest)
    parent = find_parent(connect(home), record)
    if data is None or parent is None:
        raise SystemExit(f"{study}: its data or its runs are not here.")
    drawn = len(draw_study(record, Path(folder) / "study"))
    results = {trial.number: trial.result for trial in record.trials}
    for run in children(connect(home), parent):
        place = local_path(run.info.artifact_uri)
        result = results[int(run.data.tags[TRIAL])]
        if place is not None and result is not None and (place / "report" / "validation.npz").is_file():
            result = replace(result, folder=str(place / "report"))
            drawn += len(draw_trial(result, data, Path(folder) / str(result.number)))
    return drawn


def main() -> None:
    """Print seconds and counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    study = parser.parse_args().study
    # From a fresh process each: imports count.
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        began = time.perf_counter()
        pictures = pool.submit(draw_pictures, study, folder)
        page = pool.submit(write_report, study, out=Path(folder) / "page.html")
        page.result()
        page_seconds = time.perf_counter() - began
        count = pictures.result()
        seconds = time.perf_counter() - began
    print(f"{study}: {count} pictures and the report in {seconds:.1f} s; the report alone {page_seconds:.1f} s")


if __name__ == "__main__":
    main()
