"""One worker with all cores against one worker a core: images a second, for each family of networks.

    uv run python benchmarks/threads.py [--batch 1024] [--only mlp] [--rounds 3]

A round trains each network for a few seconds both ways, one after the other, so that both meet the same machine; the
best round of each counts. Above 1, fewer workers with more threads would finish more trials in an hour.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from typing import Any

from hpo.training.device import use_threads
from hpo.training.loop import train
from roofline import FAMILIES, build, training

SECONDS = 4.0  # of training in one measurement


def main() -> None:
    """Measure, and print a line for each network and precision."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, help="instead of each family's own")
    parser.add_argument("--only", default="", help="families whose name holds this")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}; images/s")
    print(f"{'':34}{'batch':>6} {'':9}{cores} workers of 1{'1 worker of ' + str(cores):>16}{'ratio':>8}")
    for name in (name for name in FAMILIES if options.only in name):
        batch = options.batch or FAMILIES[name].batch
        for precision in ("float32", "bfloat16"):
            rounds = [
                (_rate(name, batch, precision, cores, 1), _rate(name, batch, precision, 1, cores))
                for _ in range(options.rounds)
            ]
            apart, together = (max(rates) for rates in zip(*rounds, strict=True))
            print(f"{name:34}{batch:6} {precision:9}{apart:14.0f}{together:16.0f}{together / apart:8.2f}", flush=True)


def _rate(name: str, batch: int, precision: str, workers: int, threads: int) -> float:
    """Images a second of so many processes that train at the same time, together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["roofline"])
    ready, rates = context.Barrier(workers), context.SimpleQueue()
    arguments = (name, batch, precision, threads, ready, rates)
    processes = [context.Process(target=_train, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(rates.get() for _ in processes)


def _train(name: str, batch: int, precision: str, threads: int, ready: Barrier, rates: Any) -> None:
    use_threads(threads)
    net, data = build(FAMILIES[name], "cpu", batch)
    epochs = train(net, data, training(batch, 10_000), seed=0, precision=precision)
    images = batch * FAMILIES[name].steps
    next(epochs)  # chooses kernels
    ready.wait()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < SECONDS:
        next(epochs)
        done += images
    rates.put(done / (time.perf_counter() - began))


if __name__ == "__main__":
    main()
