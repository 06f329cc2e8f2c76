"""The short form of kill.py: a run that trains and one that prepares, killed where it hurts."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

import kill


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("kill")
  kill.make_base(folder)
  return folder


@pytest.mark.parametrize("name, kills", [("train", 2), ("prepare", 2)])
def test_killed_programs_end_as_if_nothing_had_happened(base, name, kills):
  # at 0.4 and 0.3 of the usual time first
  found = kill.chain(name, kill.programs(base)[name], base, kills, seed=1)
  assert found["differs"] == [] and found["kills"] >= 1
  # a third checkpoint under way, and their sizes differ
  assert found["disk_of_usual"] < {"train": 3, "prepare": 2}[name]


def test_the_comparison_finds_what_differs(base, tmp_path):
  """A leftover file, another number in the log, another byte in an array."""
  import shutil
  import jax
  import orbax.checkpoint as ocp

  reference, other = tmp_path / "a", tmp_path / "b"
  for folder in (reference, other):
    shutil.copytree(base / "trained", folder / "w")
  assert kill.same_training(other, reference) == []
  (other / "w/checkpoints/7.partial").touch()
  assert kill.same_training(other, reference) == ["w/checkpoints/7.partial is left over"]
  (other / "w/checkpoints/7.partial").unlink()
  log = other / "w/metrics.jsonl"
  log.write_text(log.read_text().replace('"step": 2', '"step": 3', 1))
  state = other / "w/checkpoints/6/state"
  with ocp.StandardCheckpointer() as io:
    arrays = io.restore(state.absolute())
    path, leaf = jax.tree_util.tree_leaves_with_path(arrays["params"])[0]
    changed = jax.tree_util.tree_map_with_path(
      lambda p, x: x + 1e-6 if p == path else x, arrays["params"]
    )
    io.save(state.absolute(), arrays | {"params": changed}, force=True)
  found = kill.same_training(other, reference)
  assert "metrics.jsonl" in found and any(jax.tree_util.keystr(path) in line for line in found)


def test_a_program_that_leaves_a_process_behind_is_found(tmp_path, monkeypatch):
  monkeypatch.setattr(
    kill,
    "wait_for_sessions",
    lambda sessions, wait=kill.wait_for_sessions: wait(sessions, patience=1),
  )
  program = kill.Program(1, lambda folder: [["sh", "-c", "sleep 30 & sleep 30"]], None)
  with pytest.raises(RuntimeError, match="outlived the program"):
    kill.run(program, tmp_path / "x", 3, random.Random(0))


@pytest.mark.reported(
  "SIGHUP, SIGUSR1 and SIGUSR2 ended programs with workers left behind",
  "Ctrl-C twice in prepare printed tracebacks",
)
@pytest.mark.parametrize(
  "sent, status",
  [((signal.SIGTERM, signal.SIGHUP), os.EX_TEMPFAIL), ((signal.SIGINT, signal.SIGINT), 130)],
)
def test_signals_end_prepare_and_its_workers(tmp_path, sent, status):
  """To all of its processes, as a terminal and schedulers send them; what comes after the first
  finds it ending."""
  command = [
    sys.executable,
    "-m",
    "mmcl_jax.prepare",
    "synthetic",
    "--subjects=400",
    "--processes=2",
    f"--out={tmp_path / 'c'}",
  ]
  running = subprocess.Popen(
    command, cwd=kill.ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
  )
  while not list((tmp_path / "c.partial/shards").glob("*.tmp")):  # workers have begun
    assert running.poll() is None, running.stderr.read()[-2000:]
    time.sleep(0.05)
  for signum in sent:
    os.killpg(running.pid, signum)
  _, err = running.communicate(timeout=600)
  assert (
    running.returncode == status
    and "mmcl: interrupted; the same command goes on" in err
    and "Traceback" not in err
  ), err
  assert kill.wait_for_sessions([running.pid]) == []
