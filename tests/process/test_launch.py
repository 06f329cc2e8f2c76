"""The launch scripts, with stand-ins for srun, scontrol and gcloud that write down their arguments
and work on this machine."""

import os
import pathlib
import re
import shutil
import socket
import stat
import subprocess
import sys

import pytest
import yaml

from common import ROOT

SCRIPTS = sorted(ROOT.glob("launch/*.sh"))
SLURM = ROOT / "launch/slurm.sh"

# What the scripts start in place of mmcl: joins the others by whatever the script gives it, and
# ends with $STATUS.
HOSTS = f"""#!{sys.executable}
import os, sys
from mmcl_jax import cli
from mmcl_jax.training import distributed


def main(argv):
  distributed.check_same({{"argv": argv}})
  line = f"mmcl on host {{distributed.this_host.index}} of {{distributed.this_host.count}} {{' '.join(argv)}}\\n"
  os.write(1, line.encode())  # in one piece: the processes share a pipe, and print may write word by word
  raise SystemExit(int(os.environ.get("STATUS", 0)))

cli.run(main, hosts=True)
"""
# The same for one host alone, without Python's start: a line a start in the file `started`, 75 as
# often as `stops` says.
ALONE = """#!/usr/bin/env bash
echo "mmcl $*" >> started
[ "$(wc -l < started)" -gt "${STOPS:-0}" ] && exit "${STATUS:-0}"
exit 75
"""
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> calls
while [[ $1 == --* ]]; do shift; done
export SLURM_STEP_NUM_TASKS=$TASKS SLURM_NTASKS=$TASKS SLURM_STEP_NODELIST=127.0.0.1 SLURM_STEP_TASKS_PER_NODE=$TASKS SLURM_NODEID=0
pids=(); status=0
for ((i = 0; i < TASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
RECORD = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> calls
"""
GCLOUD = """#!/usr/bin/env bash
echo "gcloud $1 $2 $3 $4" >> calls
for argument; do case $argument in
  *.tar.gz) ;;
  --command=*) (cd "$WORKER" && bash -c "${argument#--command=}") ;;
  /*) cp "$argument" "$WORKER/mmcl_jax.tar.gz" ;;
esac; done
"""


def executable(file, text):
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text)
  file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def job(tmp_path):
  """A checkout to submit from, with mmcl in its environment and SLURM's commands on PATH."""
  executable(tmp_path / ".venv/bin/mmcl", ALONE)
  executable(tmp_path / "bin/srun", SRUN)
  for name in ("scontrol", "sbatch"):
    executable(tmp_path / f"bin/{name}", RECORD)
  executable(tmp_path / "bin/gcloud", GCLOUD)
  shutil.copytree(ROOT / "launch", tmp_path / "launch")
  return tmp_path


def run(script, folder, *args, **env):
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  env = {
    "PATH": f"{folder}/bin:{os.environ['PATH']}",
    "SLURM_SUBMIT_DIR": str(folder),
    "SLURM_JOB_ID": "41",
    "SLURM_CPUS_PER_TASK": "8",
    "TASKS": "1",
    "JAX_COORDINATOR_PORT": str(port),
    "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    "JAX_PLATFORMS": "cpu",
  } | env
  inherited = {name: x for name, x in os.environ.items() if not name.startswith("SLURM_")}
  return subprocess.run(
    ["bash", str(script), *args],
    cwd=folder,
    env=inherited | env,
    capture_output=True,
    text=True,
    timeout=600,
  )


def calls(folder):
  return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_bash(script):
  assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
  assert script.read_text().splitlines()[1].startswith("# ")  # says what it does
  if shutil.which("shellcheck"):
    found = subprocess.run(
      ["shellcheck", "--severity=warning", "--shell=bash", script], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


def test_flags_for_a_gpu_are_set_where_one_is_and_known_to_xla(job):
  """An unknown flag would end every program at its start; flags of one's own come last."""

  def flags(**env):
    done = run(job / "bin/env", job, XLA_FLAGS="--xla_dump_to=", **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()

  program = f"{sys.executable} -c 'import jax; jax.devices()'"
  executable(job / "bin/env", f'source launch/env.sh\necho "$XLA_FLAGS"\n{program}\n')
  assert flags() == ["--xla_dump_to="]
  executable(job / "bin/nvidia-smi", RECORD)
  *ours, last = flags()
  assert last == "--xla_dump_to="
  assert "--xla_gpu_enable_latency_hiding_scheduler=true" in ours
  assert all(flag.startswith("--xla_gpu_") for flag in ours)


def test_a_slurm_job_that_was_told_to_stop_is_queued_again(job):
  done = run(SLURM, job, "train", "--workdir=a b", STOPS="1")
  assert done.returncode == 75, done.stderr
  assert calls(job) == [
    "srun --kill-on-bad-exit=0 .venv/bin/mmcl train --workdir=a b",
    "scontrol requeue 41",
  ]


@pytest.mark.parametrize(
  "status, words", [(0, ""), (2, ""), (134, "a host was killed or lost (status 134)")]
)
def test_a_slurm_job_that_ended_is_not_queued_again(status, words, job):
  done = run(SLURM, job, "train", STATUS=str(status))
  assert done.returncode == status and words in done.stdout
  assert len(calls(job)) == 1


def test_the_slurm_script_asks_for_what_it_says():
  """SIGTERM to the steps (not B:, to the script), a task per GPU, and the command that overrides it
  for a task per node."""
  text = SLURM.read_text()
  asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.M))
  assert asked["signal"] == "TERM@300" and asked["ntasks-per-node"] == asked["gpus-per-node"]
  assert "gpus-per-task" not in asked and "gpu-bind" not in asked
  (overridden,) = re.findall(r"^#   sbatch (--.*) launch/slurm.sh", text, re.M)
  flags = dict(flag.removeprefix("--").split("=") for flag in overridden.split())
  assert flags.keys() <= asked.keys() and flags["ntasks-per-node"] == "1"


def test_tasks_of_srun_find_each_other_and_their_75_requeues(job):
  """The program's own way into SLURM, in two processes that a stand-in of srun starts."""
  executable(job / ".venv/bin/mmcl", HOSTS)
  done = run(SLURM, job, "train", TASKS="2", STATUS="75", PYTHONPATH=str(ROOT))
  assert sorted(line for line in done.stdout.splitlines() if line.startswith("mmcl on")) == [
    "mmcl on host 0 of 2 train",
    "mmcl on host 1 of 2 train",
  ], done.stderr
  assert done.returncode == 75 and calls(job)[-1] == "scontrol requeue 41"


def test_local_starts_the_hosts_of_one_run(job):
  executable(job / ".venv/bin/mmcl", ALONE)
  (job / ".venv/bin/python").symlink_to(sys.executable)
  done = run(job / "launch/local.sh", job, "3", "train", "--workdir=W", STATUS="3")
  started = sorted((job / "started").read_text().splitlines())
  address = started[0].split()[3]
  assert started == [
    f"mmcl train --workdir=W {address} --processes=3 --process={i}" for i in range(3)
  ]
  assert address.startswith("--coordinator=127.0.0.1:") and done.returncode == 3


def test_a_tpu_pod_gets_the_checkout_and_starts_again_after_75(job):
  """On one worker, whose install is a stand-in."""
  repository = job / "repository"
  shutil.copytree(ROOT / "launch", repository / "launch")
  executable(repository / "launch/install.sh", 'echo "install $*" >> started\n')
  executable(repository / ".venv/bin/mmcl", ALONE)
  git = ["git", "-C", repository, "-c", "user.name=x", "-c", "user.email=x@example.com"]
  subprocess.run([*git, "init", "-q"], check=True)
  subprocess.run([*git, "add", "-A", "-f"], check=True)
  executable(job / "bin/sleep", "#!/bin/sh\n")
  (job / "worker").mkdir()
  done = run(
    repository / "launch/tpu_pod.sh",
    job,
    "train",
    "--workdir=/a b",
    TPU="pod",
    ZONE="z",
    WORKER=str(job / "worker"),
    STOPS="2",
    STATUS="0",
  )
  assert done.returncode == 0, done.stderr
  started = (job / "worker/mmcl_jax/started").read_text().splitlines()
  assert started == ["install tpu"] + ["mmcl train --workdir=/a b"] * 2
  assert [line.split()[-1] for line in (repository / "calls").read_text().splitlines()] == [
    "scp",
    "ssh",
  ]


def test_the_jobset_starts_again_after_75_and_runs_one_process_a_host():
  whole = yaml.safe_load((ROOT / "launch/gke.yaml").read_text())
  job = whole["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert (
    job["parallelism"] == job["completions"] == 4
    and job["completionMode"] == "Indexed"
    and job["backoffLimit"] == 0
  )
  assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [os.EX_TEMPFAIL]
  assert whole["spec"]["failurePolicy"]["rules"] == [
    {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  pod = job["template"]["spec"]
  assert (
    pod["restartPolicy"] == "Never"
    and pathlib.PurePath(pod["containers"][0]["command"][0]).name == "mmcl"
  )
