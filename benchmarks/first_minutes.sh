#!/usr/bin/env bash
# A stranger's first minutes: README's commands as typed, in a terminal, from an empty folder and an empty HOME.
#
#     bash benchmarks/first_minutes.sh REPOSITORY > transcript.txt     # a path or an address for git clone
#
# Every line that they see is kept. `hpo ui` is ended as by Ctrl-C after a minute.
set -euo pipefail
repository=$(realpath -e "$1" 2>/dev/null || echo "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HOME=$folder/home TERM=xterm-256color COLUMNS=100
mkdir "$HOME" && cd "$folder"
cat > steps.sh <<STEPS
step() { printf '\n\$ %s\n' "\$*"; SECONDS=0; eval "\$*"; local code=\$?; printf '[%s s, exit code %s]\n' "\$SECONDS" "\$code"; }
stty cols 100
step git clone -q $repository hpo
step cd hpo
step python3 -m venv .venv
step source .venv/bin/activate
step pip install -q uv
step uv sync -q --inexact
step hpo run digits-mlp
step hpo trials digits-mlp
step hpo promote digits-mlp
step "python -c \"import mlflow, numpy; mlflow.set_tracking_uri('sqlite:///mlruns/mlflow.db'); print(mlflow.pyfunc.load_model('models:/digits-mlp@champion').predict(numpy.zeros((1, 8, 8, 1), 'uint8')).round(3).to_string())\""
step hpo report digits-mlp
step hpo models
step timeout --foreground -s INT 60 hpo ui digits-mlp --no-browser --port 5077
STEPS
script -qec "bash steps.sh" /dev/null
