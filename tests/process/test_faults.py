"""Bad data and bad numbers in training: left out, counted and told up to what the config allows,
never learned from."""

import json
import pathlib
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from common import ecg_config, tiny_config
from hypothesis import given, settings, strategies as st
from objective_cases import CASES, case, value_and_grad

from mmcl_jax import evaluate, train
from mmcl_jax.data import cohort as cohort_lib, pipeline
from mmcl_jax.errors import DamagedRecord, UserError
from mmcl_jax.projects.generation import tokenizer
from mmcl_jax.training import checkpoint, cohorts, metrics, monitor

BROKEN = 5  # record of the train split


def damage(cohort, to, split="train", record=BROKEN):
  """A copy of the cohort with 64 bytes of one record overwritten: no file changes its size."""
  shutil.copytree(cohort.path, to)
  wanted = cohort.splits[split][record]["ecg"].tobytes()[6000:6064]
  for file in sorted(pathlib.Path(to).glob(f"ecg_cmr/*/*-{split}.array_record*")):
    content = file.read_bytes()
    # compressed: an ECG hardly is, but not every stretch of it lies there as it was
    if (at := content.find(wanted)) < 0:
      continue
    file.write_bytes(content[:at] + bytes(64) + content[at + 64 :])
    return cohort_lib.load(str(to))
  pytest.skip("the record's bytes were not found in its file")


@pytest.fixture(scope="module")
def damaged(cohort, tmp_path_factory):
  return damage(cohort, tmp_path_factory.mktemp("damaged") / "cohort")


def test_a_damaged_chunk_is_one_record_and_named(cohort, damaged):
  with pytest.raises(
    UserError,
    match=f"record {BROKEN} of train in .* cannot be read .*hash mismatch.*prepare it again",
  ):
    damaged.splits["train"][BROKEN]
  for i in range(len(cohort.splits["train"])):
    if i != BROKEN:
      np.testing.assert_array_equal(
        damaged.splits["train"][i]["ecg"], cohort.splits["train"][i]["ecg"]
      )


@pytest.mark.parametrize("hosts", [1, 2])
def test_the_order_of_the_data_does_not_change_and_every_host_makes_the_same_of_it(
  cohort, damaged, hosts, capsys
):
  """Two epochs, side by side with the whole cohort: all rows equal but the damaged one, which is
  zeros with mask 0."""
  bad = tuple(cohort.splits["train"][BROKEN]["subject"])
  seen = 0
  for host in range(hosts):

    def read(source, host=host):
      return pipeline.train_batches(
        source, seed=3, batch=8, fields=("ed_es_volumes",), host=host, hosts=hosts
      )

    pairs = zip(
      read(cohort.splits["train"]),
      read(cohorts.tolerant(damaged, tiny_config(damaged.path)).splits["train"]),
    )
    for _, (whole, found) in zip(range(2 * len(cohort.splits["train"]) // 8), pairs):
      np.testing.assert_array_equal(found["index"], whole["index"])
      for i, subject in enumerate(whole["subject"]):
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(whole)):
          if tuple(subject) != bad:
            np.testing.assert_array_equal(x[i], y[i])
        if tuple(subject) == bad:
          seen += 1
          assert (
            not found["mask"][i]
            and not found["has_ecg"][i]
            and not found["ecg"][i].any()
            and not found["cmr"]["ed_es_volumes"][i].any()
          )
        else:
          assert found["mask"][i] == 1
  assert seen == 2
  # once, however often it is met
  assert capsys.readouterr().err.count("left out: record 5 of train") == hosts


def test_training_stops_at_a_bad_row_or_leaves_out_as_many_as_it_may(
  cohort, damaged, tmp_path, capsys
):
  config = ecg_config(damaged.path)
  config.steps, config.every.save = 5, 1  # 40 rows of 37 records: at least once
  with pytest.raises(
    UserError,
    match=r"step \d+: 1 rows were left out .*config.bad_rows is 0.*last good checkpoint is",
  ):
    train.train(config, str(tmp_path / "stops"))
  assert "left out: record 5 of train" in capsys.readouterr().err
  stopped = checkpoint.steps(str(tmp_path / "stops"))

  config.bad_rows = 2
  whole = jax.device_get(train.train(config, str(tmp_path / "goes on")))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(whole))
  left_out = [
    record["rows_left_out"]
    for record in metrics.read(tmp_path / "goes on/metrics.jsonl")
    if "loss" in record
  ]
  assert 1 <= sum(left_out) <= 2
  assert checkpoint.manifest(str(tmp_path / "goes on"), 5)["skipped"] == {
    "rows": sum(left_out),
    "steps": 0,
  }
  # nothing was saved with or after the bad row
  assert all(step < 1 + int(np.flatnonzero(left_out)[0]) for step in stopped)

  # The stopped run goes on with the limit raised, counts on, and ends where the other did.
  state = jax.device_get(train.train(config, str(tmp_path / "stops")))
  jax.tree.map(np.testing.assert_array_equal, state, whole)
  assert checkpoint.manifest(str(tmp_path / "stops"), 5)["skipped"] == {
    "rows": sum(left_out),
    "steps": 0,
  }


def test_a_damaged_record_of_test_stops_an_evaluation_with_its_name(cohort, tmp_path):
  """Scores of fewer people than said would be worse than none."""
  bad = damage(cohort, tmp_path / "c", split="test", record=2)
  config = ecg_config(cohort.path)
  config.steps = config.every.save = 1
  train.train(config, str(tmp_path / "w"))
  with pytest.raises(UserError, match="record 2 of test in .* cannot be read"):
    evaluate.evaluate(str(tmp_path / "w"), cohort_path=bad.path)
  # tried before the work
  assert [file.name for file in (tmp_path / "w/evaluation").iterdir()] == ["scored.jsonl"]
  assert not (tmp_path / "w/evaluation/scored.jsonl").read_bytes()


GOOD = dict(
  has_ecg=1,
  ecg_scale=np.float32(1e-3),
  ecg=np.arange(24).reshape(2, 12),
  has_cmr=1,
  ed_es_volumes=np.arange(8, dtype=np.uint8),
  phenotypes=np.float32([1, np.nan]),
  covariates=np.float32([np.nan, 2]),
)


@pytest.mark.parametrize(
  "change, words",
  [
    ({}, None),
    ({"ecg": np.ones((2, 12), np.int16)}, "constant in every lead"),
    ({"ecg": np.stack([np.zeros(12), np.arange(12)])}, None),  # one lead that was off is no reason
    ({"ecg_scale": np.float32(np.nan)}, "scale nan"),
    ({"ecg_scale": np.float32(np.inf)}, "scale inf"),
    ({"ecg_scale": np.float32(0)}, "scale 0"),
    ({"has_ecg": 0, "ecg": np.zeros((2, 12))}, None),
    ({"ed_es_volumes": np.full(8, 7, np.uint8)}, "ed_es_volumes has the same grey value"),
    ({"has_cmr": 0, "ed_es_volumes": np.zeros(8, np.uint8)}, None),
    ({"phenotypes": np.float32([np.inf, 1])}, "phenotypes are infinite"),
    ({"covariates": np.float32([-np.inf, 1])}, "covariates are infinite"),
  ],
)
def test_what_is_no_record_to_learn_from(change, words):
  found = pipeline.why_unusable(GOOD | change, ("ecg", "ed_es_volumes"))
  assert found is None if words is None else words in found


def test_what_is_not_read_is_not_looked_at_and_a_lost_disk_is_no_bad_record():
  flat = GOOD | {"ecg": np.ones((2, 12), np.int16)}
  assert pipeline.why_unusable(flat, ("ed_es_volumes",)) is None and pipeline.why_unusable(
    flat, ("ecg",)
  )

  class Source:
    def __len__(self):
      return 2

    def __getitem__(self, i):
      raise RuntimeError(
        ["chunk data hash mismatch", "read() failed: Input/output error; reading /a"][i]
      )

  records = cohort_lib.Records.__new__(cohort_lib.Records)
  records.source, records.name = Source(), "train in c"
  records.described = types.SimpleNamespace(deserialize_example_np=dict)
  with pytest.raises(DamagedRecord, match="record 0 of train in c"):
    records[0]
  with pytest.raises(UserError, match="cannot be read now .*Input/output error") as lost:
    records[1]
  assert not isinstance(lost.value, DamagedRecord)
  with pytest.raises(UserError, match="cannot be read now"):
    pipeline.SkipBadRecords(records, "train in c", ("ecg",))[1]


def test_a_split_of_which_nothing_can_be_read_is_an_error():
  def refuse(i):
    raise DamagedRecord(f"record {i} cannot be read")

  broken = type(
    "Broken", (), {"__len__": lambda self: 3, "__getitem__": lambda self, i: refuse(i)}
  )()
  with pytest.raises(UserError, match="none of the first .* records of train in c can be read"):
    pipeline.SkipBadRecords(broken, "train in c", ("ecg",))[0]


# -- Numbers --


@pytest.fixture
def explosive(tmp_path, monkeypatch):
  """An objective that is NaN in one row of the steps named by `at` (positions in the data
  stream)."""
  (tmp_path / "breaking.py").write_text(
    "import jax.numpy as jnp\n"
    "from mmcl_jax.objectives import Loss\n"
    "def breaks(outputs, batch, at=()):\n"
    "  x = jnp.square(outputs['ecg_projection']).mean(axis=1)\n"
    "  return Loss(jnp.where(jnp.isin(batch['index'], jnp.asarray(at, jnp.uint32)), jnp.nan, x), "
    "batch['mask'], {})\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "breaking", raising=False)


def test_steps_that_are_not_finite_are_skipped_up_to_the_limit_and_name_their_subjects(
  cohort, tmp_path, explosive, capsys
):
  config = ecg_config(cohort.path)
  # rows of steps 2, 3 and 5
  config.objectives = dict(mine=dict(fn="breaking:breaks", weight=1.0, at=(9, 17, 34)))
  config.every.save, config.every.evaluate, config.bad_steps = 1, 100, 1
  config.evaluators = {}
  order = [
    row
    for batch, _ in zip(pipeline.train_batches(cohort.splits["train"], seed=0, batch=8), range(6))
    for row in batch["subject"]
  ]
  with pytest.raises(
    UserError, match="step 3: objective mine is not finite, as the 1 before"
  ) as stopped:
    train.train(config, str(tmp_path / "w"))
  assert monitor.names([order[17]]) in str(stopped.value) and "checkpoints/2;" in str(stopped.value)
  out = capsys.readouterr().out
  [line] = [line for line in out.splitlines() if "skipped" in line]
  assert (
    line.startswith("step 2 skipped, 1 in a row of 1 allowed: objective mine is not finite")
    and monitor.names([order[9]]) in line
  )
  assert checkpoint.manifest(str(tmp_path / "w"), 2)["skipped"] == {"rows": 0, "steps": 1}
  # a resumed run counts on: it does not get another chance by it
  with pytest.raises(UserError, match="step 3"):
    train.train(config, str(tmp_path / "w"))

  config.bad_steps = 2
  state = jax.device_get(train.train(config, str(tmp_path / "w")))
  assert int(state.step) == 3  # updates
  straight = jax.device_get(train.train(config, str(tmp_path / "straight")))
  jax.tree.map(np.testing.assert_array_equal, state, straight)
  losses = {
    r["step"]: r["loss"] for r in metrics.read(tmp_path / "straight/metrics.jsonl") if "loss" in r
  }
  assert [step for step, loss in losses.items() if np.isnan(loss)] == [2, 3, 5]
  assert "finite" not in json.dumps(metrics.read(tmp_path / "straight/metrics.jsonl")[0])


@pytest.mark.parametrize("name", ["bad_rows", "bad_steps"])
def test_limits_below_0_are_refused(cohort, tmp_path, name):
  config = tiny_config(cohort.path)
  config[name] = -1
  with pytest.raises(UserError, match=f"config.{name}|{name} -1"):
    train.train(config, str(tmp_path / "w"))
  assert not (tmp_path / "w").exists()


def test_spikes_stand_out_from_the_median():
  rng, spikes = np.random.default_rng(0), monitor.Spikes()
  worst = np.uint32([[1, 2], [1, 2], [3, 0]])
  told = [spikes.message(i, float(3 - i / 100 + 0.05 * rng.normal()), worst) for i in range(150)]
  assert told == [None] * 150  # a falling, noisy loss
  line = spikes.message(150, 6.0, worst)
  assert "0000000200000001, 0000000000000003" in line and line.startswith(
    "step 150: the loss 6 stands out"
  )
  assert spikes.message(151, 1.5, worst) is None
  assert spikes.message(152, float("nan"), worst) is None  # told as a step that is skipped
  assert monitor.Spikes().message(1, 1e9, worst) is None  # nothing to compare with


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.sampled_from([1e-12, 1e-4, 1.0, 1e3, 1e6]), st.floats(0, 1))
@pytest.mark.parametrize(
  "name",
  [name for name in CASES if name not in ("mae", "cmr_mae", "phenotype_regression", "vicreg")],
)
def test_objectives_stay_finite(name, seed, size, zeroed):
  """Embeddings of any size, some of them zero or the same: loss and gradient are finite for every
  objective of angles."""
  outputs, batch = case(seed=seed)
  rng = np.random.default_rng(seed)

  def change(x):
    if x.dtype != np.float32 or x.ndim < 2:
      return x
    x = x * np.float32(size)
    rows = x.reshape(-1, x.shape[-1])
    rows[rng.random(len(rows)) < zeroed / 2] = 0
    rows[rng.random(len(rows)) < zeroed / 2] = rows[0]
    return x

  outputs = jax.tree.map(change, outputs) | {"patch_mask": outputs["patch_mask"]}
  latent = outputs["tokenizer"]
  # as the model gives it
  latent["latent_log_variance"] = np.clip(latent["latent_log_variance"], *tokenizer.LOG_VARIANCE)
  value, grads = value_and_grad(name, outputs, batch)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
