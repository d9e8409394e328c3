"""The benchmark of GPUs runs where there is none, so that its code is known to work before a GPU is at hand."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_the_benchmark_of_gpus_runs_on_the_cpu_and_writes_its_tables(tmp_path):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick"]
    command += ["--only", "stacks", "graphs", "convnet", "system_metrics"]
    environment = {**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    written = (tmp_path / "gpu.md").read_text()
    assert written.splitlines()[0] == done.stdout.splitlines()[0]
    assert "| 784-128-10 | 2 |" in written
    assert "graphs: only on CUDA" in written
    assert "| a sample of system metrics | milliseconds |" in written
    assert "Error" not in written
