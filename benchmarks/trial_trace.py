"""Trace a study of three trials in one process: how many files and functions it passes through.

    python benchmarks/trial_trace.py

`hand-overs` are calls from one file of hpo to another. Only the main thread is traced; jobs and pictures run elsewhere.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import hpo

SOURCE = str(Path(hpo.__file__).parent)
QUICK = {"training.epochs": 2, "training.precision": "float32", "search.pruner": "median", "keep.models": "none"}


class Trace:
    """Calls between functions of hpo, and those within one `Study.ask`."""

    def __init__(self) -> None:
        self.functions: set[CodeType] = set()
        self.handovers = 0
        self.asks: list[Counter[str]] = []
        self._ask: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if not file.startswith(SOURCE):
            return
        if event == "call":
            self._called(frame, file)
        elif event == "return" and frame is self._ask:
            self._ask = None

    def _called(self, frame: FrameType, file: str) -> None:
        self.functions.add(frame.f_code)
        if self._ask is None and frame.f_code.co_qualname == "Study.ask":
            self._ask = frame
            self.asks.append(Counter())
        caller = frame.f_back
        switched = bool(caller) and caller.f_code.co_filename.startswith(SOURCE) and caller.f_code.co_filename != file
        self.handovers += switched
        if self._ask is not None:
            self.asks[-1].update(calls=1, handovers=int(switched), **{f"file {file}": 1})


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    trace = Trace()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HPO_DATA"] = folder
        spec = hpo.load_study("digits-mlp", overrides=QUICK)
        hpo.run_study(spec, trials=1, workers=0, home=folder)  # imports and the data are behind it
        sys.setprofile(trace)
        hpo.run_study(spec, trials=4, workers=0, home=folder)
        sys.setprofile(None)
    files = {code.co_filename for code in trace.functions}
    ask = max(trace.asks, key=lambda counts: counts["calls"])
    print(f"three trials: {len(files)} files, {len(trace.functions)} functions, {trace.handovers} hand-overs")
    asked = sum(key.startswith("file ") for key in ask)
    print(f"one Study.ask: {ask['calls']} calls, {asked} files, {ask['handovers']} hand-overs")


if __name__ == "__main__":
    main()
