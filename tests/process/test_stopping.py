"""Early stopping, the checkpoint that it keeps, and the read-outs of the network's own that such a
run is scored by."""

import json
import os
import shutil
import sys

import jax
import numpy as np
import pytest
from common import ROOT, only_evaluators
from hosts import launch, said, statuses
from scipy.special import expit
from sklearn.metrics import r2_score

from mmcl_jax import configuration, evaluate, evaluators, train
from mmcl_jax.data import cohort as cohort_lib
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import readouts
from mmcl_jax.evaluators.base import Result
from mmcl_jax.training import checkpoint, metrics, monitor, restore

NAN = float("nan")


# -- The rule --


@pytest.mark.parametrize(
  "losses, patience, best, end",
  [
    # equal is no better, NaN neither; never sees the 1.0
    ([3.0, 2.0, 2.5, 1.5, 1.5, NAN, 1.0], 2, (3, 1.5, 2), 5),
    ([3.0, 2.0, 2.5, 1.5, 1.5, NAN, 1.0], 3, (6, 1.0, 0), None),  # it does, one evaluation later
    ([3.0, 2.0, 2.5, 1.5, 1.5, NAN, 1.0], 0, (6, 1.0, 0), None),  # 0: never
    ([1.0, 2.0, 0.5], 1, (0, 1.0, 1), 1),
    # as of simsiam: lower, not nearer to 0
    ([-1.0, -2.0, -1.5], 1, (1, -2.0, 1), 2),
    ([NAN, float("inf"), NAN], 3, (None, None, 3), 2),
    ([float("inf"), NAN, 5.0, 6.0], 3, (2, 5.0, 1), None),
  ],
)
def test_where_a_sequence_of_losses_ends_and_is_best(losses, patience, best, end):
  found, ended = monitor.Best(), None
  for step, loss in enumerate(losses):
    found = monitor.update_best(found, step, loss)
    if monitor.stops(found, patience):
      ended = step
      break
  assert tuple(found) == best and ended == end


@pytest.mark.parametrize(
  "steps, keep, best, gone",
  [
    ([2, 4, 6], 2, None, [2]),
    ([2, 4, 6], 2, 2, []),
    ([2, 4, 6, 8], 1, 4, [2, 6]),
    ([6, 2, 4], 1, 6, [2, 4]),
    ([2], 3, 2, []),
  ],
)
def test_the_newest_and_the_best_are_kept(steps, keep, best, gone):
  assert checkpoint.surplus(steps, keep, best) == gone


@pytest.mark.parametrize(
  "changes, words",
  [
    (
      dict(stop_on="validation/r2/LVM"),
      "'validation/r2/LVM'; expected a loss .*validation/diseases, validation/phenotypes",
    ),
    (dict(stop_on=""), "stop_on is ''"),
    (
      dict(evaluators=dict(losses=dict(every=0), probes=dict(every=-1))),
      "'losses' computes while .* has probes with",
    ),
  ],
)
def test_what_there_is_not_to_stop_on_is_one_line(config, tmp_path, changes, words):
  c = tuning(config.data.cohort)
  c.update(changes)
  with pytest.raises(UserError, match=words):
    train.train(c, str(tmp_path / "w"))
  assert not (tmp_path / "w").exists()


# -- A run: its losses on validation are made up, so that it must end at step 12 with 8 as its best
# --

LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 1.5, 10: 1.5, 12: NAN, 14: 1.0}


def tuning(cohort_path):
  """An ECG encoder of 60 tokens with both kinds of read-out, as the recipe supervised builds
  them."""
  sys.path.insert(0, str(ROOT / "configs"))
  import supervised

  c = supervised.get_config("test,steps=20")
  c.data.cohort, c.data.targets = cohort_path, ("LVM", "LVEDV")
  c.model.classification = ("ecg",)
  c.objectives.diseases = supervised.get_config("test,task=diseases").objectives.diseases
  c.every.update(log=1, evaluate=2, save=100)
  c.keep, c.stop_after, c.evaluators.probes.every = 1, 2, 0
  return c


def made_up(context):
  return Result({"phenotypes": LOSSES[int(context.run.state.step)]})


@pytest.fixture
def scripted(monkeypatch):
  monkeypatch.setitem(evaluators.BUILT_IN, "losses", f"{__name__}:made_up")


@pytest.fixture(scope="module")
def stopped(cohort, tmp_path_factory):
  """The workdir of a run that ended early without a break, and its final state."""
  workdir = tmp_path_factory.mktemp("stopping") / "w"
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(evaluators.BUILT_IN, "losses", f"{__name__}:made_up")
    state = train.train(tuning(cohort.path), str(workdir))
  return workdir, jax.device_get(state)


def same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_ends_where_nothing_is_gained_and_keeps_its_best(stopped):
  workdir, state = stopped
  assert int(state.step) == 12
  assert checkpoint.steps(str(workdir)) == [8, 12]  # keep=1: the newest, and the best
  assert checkpoint.manifest(str(workdir), 12)["best"] == {"step": 8, "loss": 1.5, "since": 2}
  assert checkpoint.chosen(str(workdir)) == 8 and checkpoint.latest(str(workdir)) == 12
  records = metrics.read(workdir / "metrics.jsonl")
  assert [r["step"] for r in records if "validation/phenotypes" in r] == [2, 4, 6, 8, 10, 12]


def test_programs_take_the_best_and_say_so(stopped, tmp_path, capsys):
  run = restore.load_run(str(stopped[0]))
  assert run.step == int(run.state.step) == 8
  assert f"{stopped[0]}: step 8, the best by validation/phenotypes" in capsys.readouterr().out
  # later stages
  same(restore.load_variables(str(stopped[0]))["params"], jax.device_get(run.state.params))
  capsys.readouterr()
  assert int(restore.load_run(str(stopped[0]), 12).state.step) == 12 and not capsys.readouterr().out
  shutil.copytree(stopped[0], tmp_path / "w")
  shutil.rmtree(tmp_path / "w/checkpoints/8")
  assert restore.choose(str(tmp_path / "w")) == 12
  assert "step 12, the last, for the best, 8, is not there any more" in capsys.readouterr().out


def test_interrupted_and_resumed_it_ends_at_the_same_step_with_the_same_best(
  stopped, cohort, tmp_path, monkeypatch, scripted
):
  """Asked to stop where an evaluation is due as well; killed as the best is about to be saved, and
  in the step after it."""

  class Killed(Exception):
    pass

  def killed_at(step):
    def batch_of(batch, mesh, real=train.parallel.to_global):
      if batch["index"].min() >= 8 * step:  # of 8 rows a batch
        raise Killed
      return real(batch, mesh)

    return batch_of

  def not_saved(self, step, *args, real=checkpoint.Checkpoints.save, **kwargs):
    if step == 8:
      raise Killed
    return real(self, step, *args, **kwargs)

  def go(**asked):
    return train.train(tuning(cohort.path), str(tmp_path), **asked)

  with pytest.raises(SystemExit) as stop:
    go(asked_to_stop=lambda: True)
  assert stop.value.code == os.EX_TEMPFAIL and checkpoint.latest(str(tmp_path)) == 2
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(checkpoint.Checkpoints, "save", not_saved)
    go()
  assert checkpoint.latest(str(tmp_path)) in (2, 4)  # 4 may not have been signed
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(train.parallel, "to_global", killed_at(9))
    go()
  assert checkpoint.latest(str(tmp_path)) in (2, 4, 8)
  state = go()
  same(jax.device_get(state), stopped[1])
  assert checkpoint.steps(str(tmp_path)) == [8, 12]
  assert (
    checkpoint.manifest(str(tmp_path), 12)["best"]
    == checkpoint.manifest(str(stopped[0]), 12)["best"]
  )
  same(
    *(jax.device_get(restore.load_run(str(workdir)).state) for workdir in (tmp_path, stopped[0]))
  )
  assert (tmp_path / "metrics.jsonl").read_text() == (stopped[0] / "metrics.jsonl").read_text()


def test_a_run_that_ended_early_stays_ended(stopped, cohort, scripted, capsys):
  before = (stopped[0] / "metrics.jsonl").read_text()
  state = train.train(tuning(cohort.path), str(stopped[0]))
  same(jax.device_get(state), stopped[1])
  assert (stopped[0] / "metrics.jsonl").read_text() == before
  assert (
    "trained to step 12 (of 20: no better validation/phenotypes in 2 evaluations)"
    in capsys.readouterr().out
  )


def test_evaluations_stay_where_they_decide_when_to_stop(stopped, cohort):
  now = tuning(cohort.path)
  now.every.evaluate += 1
  with pytest.raises(UserError, match="every.evaluate was"):
    configuration.check_workdir(now, str(stopped[0]))


@pytest.mark.parametrize("key", ["stop_on", "optimizer.ema", "data", "model"])
def test_a_workdir_of_another_version_is_refused(stopped, cohort, tmp_path, key):
  """Its config lacks a key: one line names it, whichever program opens the workdir."""
  shutil.copytree(stopped[0], tmp_path / "w")
  config = json.loads((tmp_path / "w/config.json").read_text())
  *group, name = key.split(".")
  (config[group[0]] if group else config).pop(name)
  (tmp_path / "w/config.json").write_text(json.dumps(config))
  for run in (
    lambda: train.train(tuning(cohort.path), str(tmp_path / "w")),
    lambda: restore.load_run(str(tmp_path / "w")),
  ):
    with pytest.raises(UserError, match=f"config.json has no {key}, so another version") as refused:
      run()
    assert "\n" not in str(refused.value)


TWO_HOSTS = """
import sys
import jax
from common import ROOT
from mmcl_jax import cli, train
from mmcl_jax import evaluators
from mmcl_jax.evaluators.base import Result
from test_stopping import LOSSES, tuning

def apart(context):
  step = int(context.run.state.step)
  return Result({"phenotypes": LOSSES[step] - 0.25 * step * jax.process_index()})

def main(argv):
  evaluators.BUILT_IN["losses"] = "__main__:apart"
  state = train.train(tuning(argv[0]), argv[1])
  print("ended at", int(jax.device_get(state.step)), flush=True)

cli.run(main, sys.argv[1:], hosts=True)
"""


def test_hosts_whose_losses_differ_end_together_by_the_word_of_the_first(stopped, cohort, tmp_path):
  """By its own losses, ever lower, the second host would go on."""
  found = launch(TWO_HOSTS, 2, 1, cohort.path, tmp_path / "w")
  assert statuses(found) == [0, 0], said(found)
  assert all("ended at 12" in out for _, out, _ in found)
  assert checkpoint.steps(str(tmp_path / "w")) == [8, 12]
  assert (
    checkpoint.manifest(str(tmp_path / "w"), 12)["best"]
    == checkpoint.manifest(str(stopped[0]), 12)["best"]
  )


# -- Scores by the network's own read-outs --


@pytest.fixture(scope="module")
def evaluated(stopped):
  """results.json and predictions.npz by the command line, of the best step."""
  with pytest.MonkeyPatch.context() as patch:
    only_evaluators(patch, "phenotypes", "diseases")
    evaluate.main([f"--workdir={stopped[0]}"])
  folder = stopped[0] / "evaluation/8"
  return (
    json.loads((folder / "results.json").read_text()),
    dict(np.load(folder / "predictions.npz")),
    folder,
  )


def test_the_own_head_is_the_read_out_of_the_embedding_in_physical_units(
  stopped, evaluated, cohort
):
  """Embeddings of whole recordings, by what mmcl embed uses, times the saved weights, in NumPy; ten
  windows a recording."""
  results, predictions, _ = evaluated
  run = restore.load_run(str(stopped[0]))
  rows = [cohort.splits["test"][i] for i in range(5)]
  x = restore.load_encoder(str(stopped[0])).embed(
    np.stack([row["ecg"] * np.float32(row["ecg_scale"]) for row in rows])
  )
  said = {
    kind: x @ w["kernel"] + w["bias"]
    for kind in ("regression", "classification")
    for w in [jax.device_get(run.state.params[f"{kind}_ecg"])]
  }
  names = list(cohort.info["phenotypes"])
  mean, sd = cohort_lib.train_statistics(cohort, "phenotypes")
  for k, name in enumerate(("LVM", "LVEDV")):
    column = names.index(name)
    expected = said["regression"][:, k] * sd[column] + mean[column]
    np.testing.assert_allclose(predictions["own_head"][:5, column], expected, rtol=1e-4)
  np.testing.assert_allclose(
    predictions["disease_own_head"][:5], expit(said["classification"]), rtol=1e-4
  )
  # those that it was not trained on
  others = [k for k, name in enumerate(names) if name not in ("LVM", "LVEDV")]
  assert (
    np.isnan(predictions["own_head"][:, others]).all()
    and results["readouts"]["own_head"][names[others[0]]]["r2"] is None
  )
  assert list(results["diseases"]["own_head"]) == list(cohort.info["diseases"])


def test_the_own_head_is_scored_beside_the_probe(evaluated):
  results, predictions, folder = evaluated
  k = list(results["phenotypes"]).index("LVM")
  y, own = results["readouts"]["own_head"]["LVM"], predictions["own_head"][:, k]
  assert y["r2"] == pytest.approx(r2_score(predictions["y_true"][:, k], own), abs=1e-9)
  assert y.keys() == results["phenotypes"]["LVM"].keys() - {
    "strength",
    "strength_at_edge",
    "coverage95",
  }
  assert y["units"] == "g"
  page, table = (folder / "report.html").read_text(), (folder / "results.csv").read_text()
  assert (
    "<th>own head</th>" in page and "<th>AUROC own head</th>" in page and "\nown_head,LVM," in table
  )


def test_the_own_head_s_columns_are_found_by_name():
  """A cohort in another order, without one phenotype that was learned, and with one that was
  not."""
  x = np.arange(6.0).reshape(3, 2)
  found = readouts.matched_columns(
    {"val": {"own_phenotypes": x[:1]}, "test": {"own_phenotypes": x}},
    "own_phenotypes",
    ("gone", "LVM"),
    ["new", "LVM"],
  )
  np.testing.assert_array_equal(found["test"], np.stack([np.full(3, np.nan), x[:, 1]], axis=1))
  assert found["val"].shape == (1, 2)
