#!/usr/bin/env bash
# SLURM. Once, on a shared file system: bash launch/install.sh cuda. Then set the lines below and, with a task per GPU,
#   sbatch launch/slurm.sh train --config=configs/joint.py:base --workdir=W --config.data.cohort=DIR
# or, with a task per node that feeds all of its GPUs from one process (config.mesh.model above 1 needs that),
#   sbatch --ntasks-per-node=1 --cpus-per-task=32 launch/slurm.sh train ... --config.loader.threads=8
# The tasks of a node see all of its GPUs and share them; --gpus-per-task would hide the others from NCCL.
# Five minutes before the time limit all hosts save a checkpoint, exit with 75, and the job is queued again.
#SBATCH --job-name=mmcl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=mmcl-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?start it with sbatch}" || exit
source launch/env.sh || exit
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it over from sbatch

# Hosts end each other; srun must not, or the status would be that of its SIGKILL.
srun --kill-on-bad-exit=0 .venv/bin/mmcl "$@"
status=$?
case $status in
  75) echo "mmcl: stopped by SIGTERM, queued again"; scontrol requeue "$SLURM_JOB_ID" ;;
  134 | 137 | 139) echo "mmcl: a host was killed or lost (status $status), see above; sbatch the same command to go on from the last checkpoint" ;;
esac
exit "$status"
