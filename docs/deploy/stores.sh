#!/usr/bin/env bash
# PostgreSQL and an MLflow server for a team, on one machine, without root and without systemd.
#
#   bash stores.sh start FOLDER     make what is not there yet, start both, say how to reach them
#   bash stores.sh status FOLDER
#   bash stores.sh stop FOLDER
#
# Needs PostgreSQL (Debian: apt-get install postgresql) and mlflow with psycopg (pip install "hpo-studies[postgres]").
# For artifacts in a bucket boto3, too.
# HPO_HOST is the name or address that other machines reach this one by (default: only this machine does);
# HPO_PGPORT (5432) and HPO_MLFLOW_PORT (5000) are the ports, HPO_MLFLOW_WORKERS (2) MLflow's processes; HPO_ARTIFACTS is
# where models and pictures go (a folder, or an address such as s3://bucket/hpo, whose keys MLflow takes from the
# environment as boto3 does).
set -euo pipefail

action=${1:-} folder=${2:-}
case $action in start | stop | status) ;; *) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
[ -n "$folder" ] || { echo "stores.sh $action: name the folder" >&2; exit 2; }
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
host=${HPO_HOST:-127.0.0.1} pg_port=${HPO_PGPORT:-5432} mlflow_port=${HPO_MLFLOW_PORT:-5000}
artifacts=${HPO_ARTIFACTS:-$folder/artifacts}
data=$folder/postgres password=$folder/password pid=$folder/mlflow.pid

bin=$(dirname "$(command -v initdb || ls -d /usr/lib/postgresql/*/bin/initdb 2>/dev/null | sort -V | tail -1 || true)")
[ -x "$bin/initdb" ] || { echo "PostgreSQL is not installed: apt-get install postgresql" >&2; exit 1; }
command -v mlflow >/dev/null || [ "$action" != start ] || {
  echo "mlflow is not in PATH: source .venv/bin/activate, or pip install 'hpo-studies[postgres]'" >&2; exit 1
}
pg() { # PostgreSQL refuses to run as root
  if [ "$(id -u)" = 0 ]; then (cd / && runuser -u postgres -- "$bin/$@"); else "$bin/$@"; fi
}
alive() { [ -f "$pid" ] && kill -0 "$(cat "$pid")" 2>/dev/null; }
answers() { # MLflow, or whatever else has its port
  python3 -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$mlflow_port/health', timeout=2).close()" 2>/dev/null
}

case $action in
start)
  if [ ! -f "$password" ]; then
    (umask 077 && python3 -c 'import secrets; print(secrets.token_urlsafe(24))' >"$password")
  fi
  if [ ! -d "$data" ]; then
    if [ "$(id -u)" = 0 ]; then
      chmod 755 "$folder"
      install -d -o postgres -m 700 "$data"
      install -o postgres -m 600 "$password" "$data.word"
    else
      install -m 600 "$password" "$data.word"
    fi
    pg initdb -D "$data" -U hpo -A scram-sha-256 --pwfile "$data.word" >/dev/null
    rm "$data.word"
    # Only with a password, from wherever the network lets them come.
    echo "host all all all scram-sha-256" >>"$data/pg_hba.conf"
  fi
  listen=127.0.0.1
  [ "$host" = 127.0.0.1 ] || listen='*'
  pg pg_ctl -D "$data" status >/dev/null ||
    pg pg_ctl -D "$data" -l "$data/log" -w start -o "-p $pg_port -c listen_addresses=$listen \
      -c unix_socket_directories= -c max_connections=500" >/dev/null
  export PGPASSWORD PGHOST=127.0.0.1 PGPORT=$pg_port PGUSER=hpo
  PGPASSWORD=$(cat "$password")
  for database in hpo mlflow; do # two: Optuna and MLflow cannot share one
    psql -d postgres -tAc "SELECT 1 FROM pg_database WHERE datname = '$database'" | grep -q 1 ||
      psql -d postgres -qc "CREATE DATABASE $database"
  done
  if ! alive; then
    ! answers || { echo "port $mlflow_port is taken: choose another, HPO_MLFLOW_PORT=5001" >&2; exit 1; }
    # The password is in the environment, where psycopg finds it, and not in the list of processes.
    MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true nohup mlflow server \
      --backend-store-uri "postgresql+psycopg://hpo@127.0.0.1:$pg_port/mlflow" --artifacts-destination "$artifacts" \
      --host "$([ "$listen" = '*' ] && echo 0.0.0.0 || echo 127.0.0.1)" --port "$mlflow_port" --workers "${HPO_MLFLOW_WORKERS:-2}" \
      --allowed-hosts "$host:$mlflow_port,127.0.0.1:$mlflow_port,localhost:$mlflow_port" >"$folder/mlflow.log" 2>&1 &
    echo $! >"$pid"
  fi
  for _ in $(seq 180); do
    ! answers || break
    alive || break
    sleep 1
  done
  { alive && answers; } || { echo "MLflow does not answer; the end of $folder/mlflow.log:" >&2; tail -5 "$folder/mlflow.log" >&2; exit 1; }
  cat <<TEXT
Both run. On every machine, in the folder where you work, a file hpo.toml:

    storage = "postgresql://hpo@$host:$pg_port/hpo"
    tracking = "http://$host:$mlflow_port"

and the password, which is in $password, in ~/.pgpass (chmod 600):

    $host:$pg_port:*:hpo:PASSWORD

MLflow asks nobody for a password: let only your own network reach port $mlflow_port.
TEXT
  ;;
stop)
  alive && pkill -TERM -P "$(cat "$pid")" || true
  alive && kill "$(cat "$pid")" || true
  rm -f "$pid"
  pg pg_ctl -D "$data" -m fast -w stop >/dev/null 2>&1 || true
  ;;
status)
  well=0
  pg pg_ctl -D "$data" status >/dev/null 2>&1 && echo "PostgreSQL runs" || { echo "PostgreSQL does not run"; well=1; }
  alive && answers && echo "MLflow runs" || { echo "MLflow does not run"; well=1; }
  exit $well
  ;;
esac
