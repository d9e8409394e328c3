"""Train candidates of a study on a part of its images, epoch by epoch: the learning curves of benchmarks of searches.

    OMP_NUM_THREADS=1 python curves.py digits-mlp --candidates 300 --out own-digits.json.gz

writes a table for search_quality.py: random candidates in the ranges of the study's space (its choices, and what is
searched under a condition, stay at the study's own value), each trained to the end. The test part is never read.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hpo.data.prepare import TrialData, prepare
from hpo.errors import NotFiniteError
from hpo.metrics import direction_of
from hpo.records import DataCard
from hpo.spec.load import load_study
from hpo.spec.space import Choice, Int
from hpo.spec.study import Setup, StudySpec
from hpo.training.batches import stratified_order
from hpo.training.loop import train
from hpo.training.trial import build_full
from search_quality_tasks import Range, drawn


def part_of(data: TrialData, *, images: int | None, valid: int | None = None) -> TrialData:
    """At most so many training and validation images, drawn with equal class shares (None: all)."""
    limits = {"train": images, "valid": valid}
    kept = {
        name: rows[stratified_order(data.labels[rows], seed=0)[:limit]].sort().values
        for name, limit in limits.items()
        for rows in [getattr(data, name)]
        if limit is not None
    }
    return replace(data, **kept)


def curve(
    setup: Setup, card: DataCard, objective: str, *, seed: int, images: int | None, valid: int | None
) -> Iterator[float]:
    """The objective after each epoch; it ends early where a loss is not finite."""
    net, data = build_full(setup, card, seed=seed, device_name="cpu")
    training = setup.training.model_copy(update={"checkpoint": None, "patience": None})
    precision = "float32" if training.precision == "auto" else training.precision
    with contextlib.suppress(NotFiniteError):
        fit = train(net, part_of(data, images=images, valid=valid), training, seed=seed, precision=precision)
        yield from (epoch.scores[objective] for epoch in fit)


def loaded(study: str, places: list[str], **fixed: Any) -> tuple[StudySpec, DataCard]:
    """The study with these places set as "path=value" and these of its training, and its data; sets torch's threads."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    further = {f"training.{name}": value for name, value in fixed.items()}
    spec = load_study(study, overrides=dict(part.split("=", 1) for part in places) | further)
    return spec, prepare(spec.data, spec.split)


def arguments(text: str) -> argparse.ArgumentParser:
    """What every script on a part of a study's images takes."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--set", action="append", default=[], metavar="PLACE=VALUE", dest="places")
    parser.add_argument("--images", type=int, help="training images, drawn with equal class shares")
    parser.add_argument("--valid", type=int, help="validation images, likewise")
    return parser


def ranges_of(spec: StudySpec) -> dict[str, Range]:
    """The ranges of the study's space, by path."""
    return {
        path: Range(*found.ends(), log=found.log, whole=isinstance(found, Int))
        for path, found in spec.search.space.items()
        if not isinstance(found, Choice) and not found.when
    }


def candidates_of(spec: StudySpec, count: int) -> list[dict[str, Any]]:
    """Random candidates in these ranges, always the same ones."""
    return drawn(ranges_of(spec), np.random.default_rng(0), count)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--candidates", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    spec, card = loaded(asked.study, asked.places)
    rows = []
    for number, config in enumerate(candidates_of(spec, asked.candidates)):
        setup = spec.with_values(config)
        part = {"seed": 0, "images": asked.images, "valid": asked.valid}
        named = {path.replace(".", "_"): value for path, value in config.items()}
        rows.append({"hp": named, "values": list(curve(setup, card, spec.search.objective, **part))})
        print(f"{number + 1} of {asked.candidates}", end="\r", file=sys.stderr, flush=True)
    table = {
        "study": asked.study,
        "maximize": direction_of(spec.search.objective) == "maximize",
        "space": {path.replace(".", "_"): vars(found) for path, found in ranges_of(spec).items()},
        "rows": rows,
    }
    asked.out.write_bytes(gzip.compress(json.dumps(table).encode(), mtime=0))


if __name__ == "__main__":
    main()
