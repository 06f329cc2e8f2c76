"""Disks that are full, read-only or gone, damaged checkpoints, two runs in one workdir: one line
each, and no wrong restore.

Disks are real ones (tmpfs) where this user may mount; those tests skip elsewhere.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import wfdb

from common import ROOT, tiny_config, tiny_flags
from mmcl_jax import train
from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.support import locks
from mmcl_jax.training import checkpoint, restore


def start(verb, *args, **kwargs):
  return subprocess.Popen(
    [sys.executable, "-m", f"mmcl_jax.{verb}", *map(str, args)],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    **kwargs,
  )


def refused(process, status=2) -> str:
  """The one line of a program that ends with `status`; no stack trace beside it."""
  out, err = process.communicate(timeout=600)
  assert process.returncode == status, (out[-500:], err[-2000:])
  lines = [line for line in err.splitlines() if line.startswith("mmcl: ")]
  assert len(lines) == 1, err[-2000:]
  return lines[0]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
  """A finished run of 6 steps with checkpoints at 3 and 6, and its final state."""
  return shutil.copytree(trained[0], tmp_path_factory.mktemp("run") / "w"), trained[1]


@pytest.fixture
def disk(tmp_path):
  """mount(size) gives a small disk."""
  where = tmp_path / "disk"
  where.mkdir()

  def mount(size):
    if subprocess.run(
      ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], capture_output=True
    ).returncode:
      pytest.skip("this user may not mount")
    return where

  yield mount
  if os.path.ismount(where):
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk_stops_training_and_with_more_room_it_ends_the_same(cohort, whole, disk):
  where = disk("20m")
  shutil.copytree(whole[0], where / "w")
  shutil.rmtree(where / "w/checkpoints/6")
  # a checkpoint takes 700 to 1,200 kB: orbax's files differ from save to save
  left = shutil.disk_usage(where).free - 300_000
  (where / "filler").write_bytes(bytes(left))
  line = refused(start("train", *tiny_flags(cohort.path, where / "w")))
  assert (
    "cannot save" in line
    and "No space left on device" in line
    and "goes on from the last checkpoint" in line
  )
  assert checkpoint.steps(str(where / "w")) == [3]
  (where / "filler").unlink()
  state = jax.device_get(train.train(tiny_config(cohort.path), str(where / "w")))
  jax.tree.map(np.testing.assert_array_equal, state, whole[1])
  # and nothing half-written beside
  assert sorted(os.listdir(where / "w/checkpoints")) == ["3", "6"]


@pytest.mark.parametrize("verb", ["prepare", "embed", "export"])
def test_a_full_disk_is_one_line_for_every_program_and_leaves_nothing_that_looks_whole(
  verb, cohort, whole, disk, tmp_path
):
  where = disk("400k" if verb == "prepare" else "20k")
  args = {
    "prepare": ("synthetic", "--subjects=60", f"--out={where / 'c'}", "--processes=1"),
    "embed": (f"--workdir={whole[0]}", f"--input={tmp_path / 'ecg'}", f"--out={where / 'out'}"),
    "export": (f"--workdir={whole[0]}", f"--out={where / 'encoder'}"),
  }[verb]
  if verb == "embed":
    (tmp_path / "ecg").mkdir()
    record = cohort.splits["train"][0]
    wfdb.wrsamp(
      "r",
      fs=500,
      units=["mV"] * 12,
      sig_name=list(schema.LEADS),
      fmt=["16"] * 12,
      write_dir=str(tmp_path / "ecg"),
      p_signal=(record["ecg"] * record["ecg_scale"]).T.astype(float),
    )
    with open(where / "filler", "wb") as f:
      f.write(bytes(20_480))
  line = refused(start(verb, *args))
  assert "No space left" in line
  left = [str(file.relative_to(where)) for file in where.rglob("*") if file.is_file()]
  whole_names = {"prepare": "c/cohort.json", "embed": ".parquet", "export": "encoder/export.json"}
  assert not [name for name in left if name.endswith(whole_names[verb])]


def test_a_read_only_disk_is_one_line(cohort, disk):
  where = disk("20m")
  subprocess.run(["mount", "-o", "remount,ro", str(where)], check=True)
  assert (
    "cannot write to" in (line := refused(start("train", *tiny_flags(cohort.path, where / "w"))))
    and "Read-only" in line
  )


def test_a_workdir_that_vanishes_is_one_line(cohort, tmp_path):
  process = start(
    "train", *tiny_flags(cohort.path, tmp_path / "w"), "--config.steps=400", "--config.every.save=2"
  )
  while not (tmp_path / "w/checkpoints/4").is_dir():
    assert process.poll() is None, process.stderr.read()[-2000:]
    time.sleep(0.05)
  (tmp_path / "w").rename(tmp_path / "elsewhere")
  line = refused(process)
  assert str(tmp_path / "w") in line and ("not there any more" in line or "No such file" in line)
  steps = checkpoint.steps(str(tmp_path / "elsewhere"))
  # what was saved is whole
  assert steps and restore.load_run(str(tmp_path / "elsewhere")).step == max(steps)
  with pytest.raises(UserError, match="no config.json|no checkpoint|holds no"):
    restore.load_run(str(tmp_path / "w"))  # whatever a late thread has put there


def test_a_folder_made_anew_in_place_of_one_that_vanished_does_not_count(tmp_path):
  """As where the workdir goes between two calls of orbax, which makes what is missing."""
  workdir = tmp_path / "w"
  workdir.mkdir()
  (workdir / "config.json").write_text("{}")
  saved = checkpoint.Checkpoints(str(workdir), keep=1)
  saved.save(1, {"a": np.zeros(1)}, {}, {})
  saved.manager.wait_until_finished()
  workdir.rename(tmp_path / "elsewhere")
  shutil.copytree(tmp_path / "elsewhere/checkpoints", workdir / "checkpoints")
  with pytest.raises(UserError, match="w/checkpoints is not there any more"):
    saved.finish()
  with pytest.raises(UserError, match="w/checkpoints is not there any more"):
    saved.save(2, {"a": np.zeros(1)}, {}, {})
  assert checkpoint.steps(str(workdir)) == [] and not (workdir / "checkpoints/2").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else")
@pytest.mark.skipif(
  not all(
    folder.stat().st_mode & 0o5 == 0o5
    for top in (ROOT, pathlib.Path(sys.prefix))
    for folder in (top, *top.parents)
  ),
  reason="somebody else may not read this checkout",
)
def test_a_workdir_of_somebody_else_is_one_line(cohort, whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "w")
  shutil.rmtree(tmp_path / "w/checkpoints/6")
  for folder in (tmp_path, *tmp_path.parents):
    if folder.stat().st_uid == 0 and folder != pathlib.Path("/"):
      folder.chmod(folder.stat().st_mode | 0o055)
  # What is imported later than the program itself: Python may lie where only root can read.
  code = (
    "import encodings.cp437, os, sys, matplotlib.style; "
    "from mmcl_jax import cli, configuration, evaluators, train; "
    "from mmcl_jax.data import cohort; "
    "evaluators.build(configuration.recipe('joint', 'test')); os.setgroups([]); os.setgid(65534); "
    "os.setuid(65534); cli.run(train.main, sys.argv[1:])"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", code, *tiny_flags(cohort.path, tmp_path / "w")],
    cwd=ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  assert "cannot write" in (line := refused(process)) and "Permission denied" in line
  assert checkpoint.steps(str(tmp_path / "w")) == [3]


def test_every_file_of_a_checkpoint_is_missed_and_every_flipped_bit_is_found(
  cohort, whole, tmp_path
):
  """Each file of the newest step is flipped in one bit, cut and removed in turn; a restore is
  refused and names it."""
  shutil.copytree(whole[0], tmp_path / "w")
  step = tmp_path / "w/checkpoints/6"
  rng, tried = np.random.default_rng(0), 0
  # 20 to 40: orbax's differ from save to save
  files = [file for file in sorted(step.rglob("*")) if file.is_file()]
  for file in files:
    content = file.read_bytes()
    flipped = bytearray(content)
    if content:
      flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    for kind, damaged in (
      ("flipped", bytes(flipped)),
      ("cut", content[: len(content) // 2]),
      ("removed", None),
    ):
      if damaged == content:
        continue
      file.unlink()
      if damaged is not None:
        file.write_bytes(damaged)
      tried += 1
      if file.name == "manifest.json" and kind == "removed":
        assert checkpoint.latest(str(tmp_path / "w")) == 3  # the step before counts
      else:
        with pytest.raises(UserError, match="remove .*/6 to use step 3") as error:
          checkpoint.check_files(str(tmp_path / "w"), 6)
        assert str(file) in str(error.value) or file.name == "manifest.json"
      file.write_bytes(content)
  checkpoint.check_files(str(tmp_path / "w"), 6)
  assert tried == sum(3 if file.stat().st_size else 1 for file in files) > 30


def test_a_changed_config_is_not_restored_as_if_it_were_the_run_s(whole, tmp_path):
  shutil.copytree(whole[0], tmp_path / "w")
  config = json.loads((tmp_path / "w/config.json").read_text())
  config["model"]["towers"]["ecg"]["mask_ratio"] = 0.5
  (tmp_path / "w/config.json").write_text(json.dumps(config))
  with pytest.raises(
    UserError, match="config.json .* it is not the one that step 6 was trained with"
  ):
    restore.load_run(str(tmp_path / "w"))


def exchange(folder, *others):
  (folder / "6").rename(folder / "x")
  (folder / "3").rename(folder / "6")
  (folder / "x").rename(folder / "3")


def rename(folder, *others):
  (folder / "6").rename(folder / "9")


def copy_in(folder, other):
  shutil.rmtree(folder / "6")
  shutil.copytree(other / "checkpoints/6", folder / "6")


@pytest.mark.reported(
  "two steps of a run that were exchanged were restored without a word",
  "a step that was copied from another run was restored without a word",
)
@pytest.mark.parametrize(
  "change, words",
  [
    (exchange, "6/meta/manifest.json is of step 3: its folder was renamed or exchanged"),
    (rename, "9/meta/manifest.json is of step 6"),
    (copy_in, "copied from another run"),
  ],
)
def test_a_step_stays_in_its_place_and_run(cohort, config, whole, tmp_path, change, words):
  """Every program that takes the newest step, before any work; a whole workdir may be copied and
  moved."""
  shutil.copytree(whole[0], tmp_path / "w")
  restore.choose(str(tmp_path / "w"))
  other = shutil.copytree(whole[0], tmp_path / "other")
  (other / "run").unlink()
  for step in checkpoint.steps(str(other)):  # as another run would have signed them
    about = checkpoint.manifest(str(other), step)
    checkpoint.sign(
      other / "checkpoints" / str(step),
      {name: x for name, x in about.items() if name != "sha256"} | {"run": "another"},
    )
  checkpoint.check_files(str(other), 6)
  change(tmp_path / "w/checkpoints", other)
  for run in (
    lambda: restore.choose(str(tmp_path / "w")),
    lambda: restore.load_run(str(tmp_path / "w")),
    lambda: train.train(config, str(tmp_path / "w")),
  ):
    with pytest.raises(UserError, match=words) as refused:
      run()
    assert "remove " in str(refused.value) and "\n" not in str(refused.value)


def test_a_stranger_s_workdir_runs_no_code(whole, tmp_path, monkeypatch):
  """Objectives of a config.json may name any module; only training, by the user's own recipe, looks
  for it."""
  (tmp_path / "hostile.py").write_text(
    f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\ndef loss(outputs, batch): "
    "pass\n"
  )
  monkeypatch.syspath_prepend(str(tmp_path))
  shutil.copytree(whole[0], tmp_path / "w")
  config = json.loads((tmp_path / "w/config.json").read_text())
  config["objectives"] = {"x": {"fn": "hostile:loss", "weight": 1.0}}
  (tmp_path / "w/config.json").write_text(json.dumps(config))
  about, step = checkpoint.manifest(str(tmp_path / "w"), 6), tmp_path / "w/checkpoints/6"
  for file, known in (
    (
      step / "_CHECKPOINT_METADATA",
      "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler",
    ),
    (step / "state/_METADATA", "jax.Array"),
  ):
    assert known in (text := file.read_text())
    file.write_text(text.replace(known, "hostile.loss", 1))
  checkpoint.sign(
    step, {name: x for name, x in about.items() if name != "sha256"} | {"config": config}
  )
  assert restore.load_run(str(tmp_path / "w")).step == 6
  assert not (tmp_path / "ran").exists()


# -- Two runs --


def test_a_second_run_is_refused_and_told_who_holds_the_workdir(cohort, tmp_path):
  first = start("train", *tiny_flags(cohort.path, tmp_path / "w"), "--config.steps=5000")
  while not (tmp_path / "w/config.json").exists():
    assert first.poll() is None, first.stderr.read()[-2000:]
    time.sleep(0.05)
  line = refused(start("train", *tiny_flags(cohort.path, tmp_path / "w"), "--config.steps=5000"))
  assert "another run is training in" in line and f"process {first.pid}, since" in line
  # Ctrl-C saves and leaves, like SIGTERM.
  asked = time.monotonic()
  first.send_signal(signal.SIGINT)
  out, err = first.communicate(timeout=600)
  assert (
    first.returncode == os.EX_TEMPFAIL
    and "asked to stop: saved" in out
    and "Ctrl-C again ends at once" in err
  )
  assert checkpoint.latest(str(tmp_path / "w")) and not (tmp_path / "w/lock").exists()
  print(f"left {time.monotonic() - asked:.1f} s after Ctrl-C")


def test_the_lock_is_free_after_a_kill_and_what_was_made_for_nothing_goes(tmp_path):
  code = "import sys, time; from mmcl_jax.support import locks\nwith locks.workdir_held(sys.argv[1]): print('held', flush=True); time.sleep(60)"
  holder = subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path / "a/w")], stdout=subprocess.PIPE, text=True, cwd=ROOT
  )
  assert holder.stdout.readline() == "held\n"
  with (
    pytest.raises(UserError, match=f"another run .*process {holder.pid}"),
    locks.workdir_held(str(tmp_path / "a/w")),
  ):
    pass
  holder.kill()
  holder.wait()
  assert (tmp_path / "a/w/lock").exists()
  with locks.workdir_held(str(tmp_path / "a/w")):
    (tmp_path / "a/w/kept").touch()
  assert os.listdir(tmp_path / "a/w") == ["kept"]
  with locks.workdir_held(str(tmp_path / "b/c")):
    pass
  assert not (tmp_path / "b").exists()
