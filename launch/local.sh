#!/usr/bin/env bash
# Several processes on this machine as several hosts: to try such a run, or one process per GPU (process I has GPU I).
#   bash launch/local.sh 2 train --config=joint:demo --workdir=W --config.data.cohort=demo/cohort
# Ctrl-C and SIGTERM reach all of them: training saves a checkpoint and exits with 75, the same command goes on.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
source "$root/launch/env.sh"
count=$1; shift
port=$("$root/.venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=()
for ((i = 0; i < count; i++)); do
  CUDA_VISIBLE_DEVICES=$i "$root/.venv/bin/mmcl" "$@" --coordinator="127.0.0.1:$port" --processes="$count" --process="$i" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2> /dev/null' INT TERM

status=0
for pid in "${pids[@]}"; do
  while kill -0 "$pid" 2> /dev/null; do wait "$pid"; done  # a signal ends one wait, not the process
  wait "$pid"
  code=$?
  ((code > status)) && status=$code
done
exit "$status"
