#!/usr/bin/env bash
# TPU VM pod, from your machine (best inside tmux: the run ends with the connection):
#   TPU=my-pod ZONE=us-east5-b bash launch/tpu_pod.sh train --config=configs/joint.py:base --workdir=/shared/W --config.data.cohort=/shared/cohort
# Copies this checkout to ~/mmcl_jax of every worker, installs it there and starts the command on all. The workdir and the
# cohort must be on a file system that all workers share (Filestore, or a bucket mounted with gcsfuse).
# A worker starts again after status 75 (all saved on SIGTERM); after a preemption that took the machines, run this again.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${TPU:?the name of the TPU}" "${ZONE:?its zone}"
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git ls-files -z | tar --null --files-from=- --create --gzip --file="$archive"
gcloud compute tpus tpu-vm scp "$archive" "$TPU:mmcl_jax.tar.gz" --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
  mkdir -p mmcl_jax && tar --extract --gzip --file=mmcl_jax.tar.gz --directory=mmcl_jax && cd mmcl_jax && bash launch/install.sh tpu || exit
  while :; do .venv/bin/mmcl$(printf ' %q' "$@"); status=\$?; [ \$status = 75 ] || exit \$status; sleep 10; done"
