"""The loop: golden step, exact resume, checkpoints that can be trusted, and what stops it."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from common import ROOT, tiny_config

from mmcl_jax import configuration, train
from mmcl_jax.data import builder, cohort as cohort_lib
from mmcl_jax.data.sources import synthetic as synthetic_source
from mmcl_jax.errors import UserError
from mmcl_jax.training import checkpoint, cohorts, metrics, people, restore

# Loss and gradient norm of step 1 of the tiny config on the tiny cohort. If you meant to change the
# model, the objectives, the augmentation, the data order or the synthetic heart, replace them by
# what the failing test prints.
GOLDEN = {"loss": 3.27849, "gradient_norm": 0.67407}


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
  """A workdir trained to step 6 without a break, and its final state."""
  return shutil.copytree(trained[0], tmp_path_factory.mktemp("run") / "w"), trained[1]


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_golden_first_step(finished):
  first = metrics.read(finished[0] / "metrics.jsonl")[0]
  assert {name: first[name] for name in GOLDEN} == pytest.approx(GOLDEN, rel=2e-4), (
    "the first step changed; if that was meant, set GOLDEN to the numbers above"
  )


def test_total_is_the_weighted_sum_of_the_objectives(finished):
  for record in metrics.read(finished[0] / "metrics.jsonl"):
    if "loss" in record:
      parts = sum(
        record[f"{name}/loss"] * record[f"{name}/weight"]
        for name in ("reconstruction", "dual_phase")
      )
      assert record["loss"] == pytest.approx(parts, rel=1e-5)


def test_training_changes_every_parameter(finished):
  run = restore.load_run(str(finished[0]))
  unchanged = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for (path, before), after in zip(
      jax.tree_util.tree_leaves_with_path(jax.device_get(restore.untrained(run)["params"])),
      jax.tree.leaves(finished[1].params),
    )
    if np.array_equal(before, after)
  ]
  assert unchanged == []


def test_interrupted_and_resumed_equals_uninterrupted(finished, cohort, tmp_path, monkeypatch):
  """Killed in step 5, after the checkpoint of step 3; bit for bit the same state and the same
  log."""
  calls = []

  class Killed(Exception):
    pass

  def dying(batch, mesh, real=train.parallel.to_global):
    calls.append(1)
    if len(calls) == 5:
      raise Killed
    return real(batch, mesh)

  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(train.parallel, "to_global", dying)
    train.train(tiny_config(cohort.path), str(tmp_path))
  assert checkpoint.latest(str(tmp_path)) in (None, 3)
  state = train.train(tiny_config(cohort.path), str(tmp_path))
  same(jax.device_get(state), finished[1])
  assert (tmp_path / "metrics.jsonl").read_text() == (finished[0] / "metrics.jsonl").read_text()


def without_cmr(config):
  """The config with its ECG tower alone."""
  del config.model.towers.ed, config.model.towers.es
  return config


@pytest.mark.parametrize(
  "change, words",
  [
    (
      lambda c, p: c.data.update(mix=((p, 1.0),)),
      r"mix\[0\]\[1\] is 1.0; expected a number above 0 and below 1",
    ),
    (lambda c, p: c.data.update(mix=((p, 0.5), (p, 0.5))), "shares"),
    (lambda c, p: c.data.update(mix=(("/nowhere", 0.5),)), "no cohort at '/nowhere'"),
    (lambda c, p: c.data.update(mix=("ptbxl", 0.5)), "expected pairs of a cohort and its share"),
    (lambda c, p: without_cmr(c).data.update(cohort=p), "no val split"),
    (
      lambda c, p: setattr(c, "evaluators", {}) or c.data.update(cohort=p),
      "has no CMR to train on; take a recipe without",
    ),
  ],
)
def test_cohorts_that_do_not_fit_are_refused_before_anything_is_made(
  cohort, ecg_only, tmp_path, change, words
):
  config = tiny_config(cohort.path)
  change(config, ecg_only.path)
  with pytest.raises(UserError, match=words):
    train.train(config, str(tmp_path / "w"))
  assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def all_in_train(tmp_path_factory):
  """A cohort of the same people as `cohort`, all of them in train."""
  plan = synthetic_source.plan(types.SimpleNamespace(subjects=64, seed=7))
  return builder.build(
    str(tmp_path_factory.mktemp("all") / "c"),
    plan,
    shares=(1, 0, 0),
    profile="minimal",
    processes=1,
  )


def test_people_held_out_do_not_come_back_through_a_mixed_cohort(cohort, all_in_train, tmp_path):
  again = pathlib.Path(shutil.copytree(all_in_train.path, tmp_path / "c"))
  config = tiny_config(cohort.path)
  config.data.mix = ((str(again), 0.5),)
  test, val = (cohort.info["counts"][split] for split in ("test", "val"))
  with pytest.raises(
    UserError,
    match=f"^{test} of {test} test people and {val} of {val} val people .* are in the train split of {again}",
  ):
    train.train(config, str(tmp_path / "w"))
  description = tmp_path / "c/cohort.json"
  description.write_text(json.dumps(json.loads(description.read_text()) | {"salt_tag": "another"}))
  with pytest.raises(UserError, match="prepared with different salts"):
    train.train(config, str(tmp_path / "w"))


@pytest.mark.reported("people that an earlier stage had trained on came back as test people")
def test_people_of_an_earlier_stage_are_not_held_out_in_a_later_one(
  finished, cohort, all_in_train, tmp_path, capsys
):
  """Stages on one cohort go on without a word; here the first one had learned from everybody."""
  earlier, config = tmp_path / "earlier", tiny_config(cohort.path)

  def run():
    return cohorts.people_of(cohort, [], config, str(tmp_path / "w"), 0)

  config.init_from.ecg = str(finished[0])
  assert (
    len(run().train["synthetic"]) == cohort.info["counts"]["train"]
    and capsys.readouterr().out == ""
  )
  shutil.copytree(finished[0] / "checkpoints/6", earlier / "checkpoints/6")
  shutil.copy(finished[0] / "config.json", earlier)
  np.savez(earlier / "checkpoints/6/people.npz", **people.as_arrays(people.of_cohort(all_in_train)))
  config.init_from.ecg = str(earlier)
  test = cohort.info["counts"]["test"]
  with pytest.raises(
    UserError,
    match=f"^{test} of {test} test people .* of {earlier} .* or --config.data.allow_seen=True",
  ):
    train.train(config, str(tmp_path / "w"))
  assert not (tmp_path / "w").exists()
  config.data.allow_seen = True
  assert (
    len(run().train["synthetic"]) == 64
    and f"{test} of {test} test people" in capsys.readouterr().out
  )


def test_a_checkpoint_tells_whom_it_learned_from(finished, cohort):
  assert (
    people.of_run(str(finished[0]), 3).train["synthetic"].tolist()
    == people.hashes(cohort)["train"].tolist()
  )
  assert "people.npz" in checkpoint.manifest(str(finished[0]), 3)["files"]


def test_a_finished_run_resumes_to_itself(finished, cohort):
  before = (finished[0] / "metrics.jsonl").read_text()
  state = train.train(tiny_config(cohort.path), str(finished[0]))
  same(jax.device_get(state), finished[1])
  assert (finished[0] / "metrics.jsonl").read_text() == before


def test_checkpoint_says_what_it_is(finished, cohort):
  assert checkpoint.steps(str(finished[0])) == [3, 6]
  manifest = checkpoint.manifest(str(finished[0]), 6)
  assert manifest["cohort"] == cohort.fingerprint and manifest["format"] == "mmcl_jax/5"
  assert any(name.startswith("state/") for name in manifest["files"])


@pytest.fixture
def copy(finished, tmp_path):
  shutil.copytree(finished[0], tmp_path / "w")
  return tmp_path / "w"


def array_file(workdir, step):
  """The largest file of the saved arrays."""
  return max(
    (f for f in (workdir / f"checkpoints/{step}/state").rglob("*") if f.is_file()),
    key=lambda f: f.stat().st_size,
  )


def damage(kind, workdir):
  file = array_file(workdir, 6)
  content = bytearray(file.read_bytes())
  if kind == "flipped":
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)
  elif kind == "truncated":
    file.write_bytes(content[: len(content) // 2])
  elif kind == "missing":
    file.unlink()
  elif kind == "foreign":
    manifest = workdir / "checkpoints/6/meta/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": "other/2"}))
  elif kind == "garbled":
    (workdir / "checkpoints/6/meta/manifest.json").write_text("{")


@pytest.mark.parametrize(
  "kind, words",
  [
    ("flipped", "damaged"),
    ("truncated", "damaged"),
    ("missing", "missing"),
    ("foreign", "format 'other/2'"),
    ("garbled", "not readable"),
  ],
)
def test_a_damaged_checkpoint_is_refused_with_a_way_out(copy, kind, words):
  damage(kind, copy)
  with pytest.raises(
    UserError, match=f"checkpoints/6.*{words}.*remove .*checkpoints/6 to use step 3"
  ):
    restore.load_run(str(copy))
  assert restore.load_run(str(copy), 3).step == 3


def test_a_workdir_belongs_to_one_config(copy, cohort):
  other = tiny_config(cohort.path)
  other.optimizer.learning_rate = 1.0
  with pytest.raises(
    UserError, match="belongs to another config: optimizer.learning_rate was 0.001, now 1.0"
  ):
    train.train(other, str(copy))
  free = tiny_config(cohort.path)
  free.every.log, free.loader.threads = 2, 1
  configuration.check_workdir(free, str(copy))


@pytest.mark.reported(
  "a run could not go on when its cohort was moved, or was named with a slash at the end"
)
@pytest.mark.parametrize("begun", [True, False])
def test_paths_of_a_config_are_free_and_what_else_stands_beside_them_is_not(
  tmp_path, monkeypatch, begun
):
  def config_of(cohort="c", mix=(("m", 0.3),), ecg="e"):
    config = tiny_config(cohort)
    config.data.mix, config.init_from.ecg = mix, ecg
    return config

  monkeypatch.chdir(tmp_path)
  (tmp_path / "w/checkpoints/3").mkdir(parents=True) if begun else (tmp_path / "w").mkdir()
  configuration.save(config_of(), "w")
  for free in (
    dict(cohort="c/"),
    dict(cohort="./c"),
    dict(cohort=str(tmp_path / "c")),
    dict(mix=(("/elsewhere/m", 0.3),)),
    dict(ecg="e/"),
    dict(ecg=f"{tmp_path}/e"),
  ):
    configuration.check_workdir(config_of(**free), "w")
  for other, words in (
    (dict(mix=(("m", 0.4),)), "data.mix was"),
    (dict(mix=()), "data.mix was"),
    (dict(ecg=""), "init_from.ecg was 'e'"),
  ):
    with pytest.raises(UserError, match=words):
      configuration.check_workdir(config_of(**other), "w")
  if begun:  # by its path; see the next test
    configuration.check_workdir(config_of(ecg="elsewhere"), "w")
  else:
    with pytest.raises(UserError, match="init_from.ecg was 'e', now 'elsewhere'"):
      configuration.check_workdir(config_of(ecg="elsewhere"), "w")


def test_an_earlier_stage_is_known_by_the_name_of_its_run(finished, copy, tmp_path):
  config = tiny_config("c")
  config.init_from.ecg = str(finished[0])
  stages = cohorts.stages_of(config, str(tmp_path), 0)
  assert stages == {"ecg": checkpoint.run_name(str(finished[0]))} and len(stages["ecg"]) > 8
  for kept, start in ((stages, 6), ({"ecg": "another"}, 3), ({}, 3)):
    checkpoint.sign(
      copy / f"checkpoints/{start}", checkpoint.manifest(str(copy), start) | {"stages": kept}
    )
    if kept.get("ecg") == "another":
      with pytest.raises(
        UserError,
        match=f"config.init_from.ecg is {finished[0]}, and {copy} started from another run",
      ):
        cohorts.stages_of(config, str(copy), start)
    else:
      assert cohorts.stages_of(config, str(copy), start) == kept
  config.init_from.ecg = "/gone"
  assert cohorts.stages_of(config, str(copy), 6) == stages


def test_an_objective_without_its_output_is_found_before_compiling(cohort, tmp_path):
  c = tiny_config(cohort.path)
  without_cmr(c)
  with pytest.raises(
    UserError,
    match="objectives.dual_phase asks for 'cmr'.*outputs are .*ecg_projection.*reconstruction",
  ):
    train.train(c, str(tmp_path / "w"))
  assert not (tmp_path / "w").exists()


def test_broken_cohorts_are_told_apart(cohort, tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="holds no cohort.json"):
    cohort_lib.load(str(tmp_path / "empty"))
  other = tmp_path / "other"
  shutil.copytree(cohort.path, other)
  info = json.loads((other / "cohort.json").read_text())
  (other / "cohort.json").write_text(json.dumps(info | {"schema_version": 99}))
  with pytest.raises(UserError, match="schema version 99, this program reads 1"):
    cohort_lib.load(str(other))
  (other / "cohort.json").write_text(json.dumps(info))
  shard = next(pathlib.Path(other).rglob("*train.array_record*"))
  shard.unlink()
  with pytest.raises(UserError, match="prepare the cohort again"):
    cohort_lib.load(str(other))


def test_a_run_that_ends_before_its_first_number_prints_nothing_more(tmp_path):
  """TensorBoard's writer starts a thread to say that it ends, which Python 3.12 answers with a
  trace where nothing was written."""
  code = (
    "from mmcl_jax.training import metrics; "
    f"writer = metrics.TensorBoardWriter({str(tmp_path)!r}, 0); "
    "raise SystemExit(2)"
  )
  ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
  assert ended.returncode == 2 and ended.stderr == "" and not (tmp_path / "tensorboard").exists()
  writers = configuration.defaults(8, 6).writers
  writer = metrics.create_writer(writers, str(tmp_path), 0, just_logging=False)
  writer.write_scalars(1, {"loss": 2.0})
  writer.close()
  assert list((tmp_path / "tensorboard").iterdir()) and metrics.read(
    tmp_path / "metrics.jsonl"
  ) == [{"step": 1, "loss": 2.0}]


@pytest.mark.reported("a run at its end did not say how to train longer")
def test_more_steps_are_refused_with_the_way_to_train_longer(tmp_path):
  (tmp_path / "w").mkdir()
  flags = [f"--config={ROOT}/configs/joint.py:test", f"--workdir={tmp_path / 'w'}"]
  configuration.save(
    configuration.from_flags("mmcl train", "", flags, {"workdir": ""})[0], tmp_path / "w"
  )
  with pytest.raises(
    UserError, match="steps was 6, now 9.* to train longer: another --workdir with "
  ) as refused:
    longer, _ = configuration.from_flags(
      "mmcl train", "", [*flags, "--config.steps=9"], {"workdir": ""}
    )
    configuration.check_workdir(longer, str(tmp_path / "w"))
  said = re.findall(r"--config\.init_from\.\w+=\S+", str(refused.value))
  # the flags are there
  config, _ = configuration.from_flags("mmcl train", "", [*flags, *said], {"workdir": ""})
  assert dict(config.init_from) == dict.fromkeys(("ecg", "cmr_ed", "cmr_es"), str(tmp_path / "w"))
