#!/usr/bin/env bash
# All that a GPU has to show, in at most 10 minutes: the suite gpu (4 minutes), then benchmarks/gpu.py (5 minutes).
#
#     bash benchmarks/gpu_round.sh            # with uv, or on a machine that has all packages
#     bash benchmarks/gpu_round.sh WHEELS     # without a network: wheels of hpo and of what is missing
#
# SUITE_SECONDS and BENCHMARK_SECONDS shorten the two.
# Writes gpu-suite.txt, gpu-suite.xml and gpu.md to $OUT (default: ./gpu-round). Its status is that of the suite.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/gpu-round} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HPO_DATA=$work/data
python=(python3)
if [ $# -gt 0 ]; then
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$1"/*.whl || exit
  export PYTHONPATH=$work/site PATH=$work/site/bin:$PATH
elif command -v uv >/dev/null; then
  python=(uv run python)
else
  export PYTHONPATH=$PWD/src
fi
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/tests/helpers:$PWD/benchmarks
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null | tee "$OUT/gpu-suite.txt"
# The options of pyproject.toml need plugins that such a machine may not have.
options=(-o addopts= -q --import-mode=importlib -p no:cacheprovider -m gpu --durations=10 --tb=short -p no:logging --junitxml "$OUT/gpu-suite.xml")
timeout -k 5 "${SUITE_SECONDS:-240}" "${python[@]}" -m pytest "${options[@]}" tests/gpu 2>&1 | tee -a "$OUT/gpu-suite.txt"
suite=${PIPESTATUS[0]}
timeout -k 5 "${BENCHMARK_SECONDS:-300}" "${python[@]}" benchmarks/gpu.py --seconds "$((${BENCHMARK_SECONDS:-300} - 30))"
exit "$suite"
