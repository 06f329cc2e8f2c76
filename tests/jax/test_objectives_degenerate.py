"""Every objective where its input is degenerate, on rows that do not count, and with parameters
that make no sense."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import CASES, B, case, counts, value_and_grad

from mmcl_jax import objectives
from mmcl_jax.objectives import contrastive


def entropy(p):
  return -np.sum(p * np.log(p))


def relations(batch, sigma=0.7):
  """Mean over rows of log(number of others) - entropy of p: KL from p to an even q."""
  d = np.sqrt(np.square(batch["targets"][:, None] - batch["targets"][None]).mean(axis=2))
  return np.mean(
    [
      np.log(B - 1) - entropy(np.exp(-x / sigma) / np.exp(-x / sigma).sum())
      for x in (np.delete(row, i) for i, row in enumerate(d))
    ]
  )


def even(batch, weight):
  """Mean over rows of log(1 + weight of the others): InfoNCE where every similarity is the same."""
  d = np.square(batch["targets"][:, None] - batch["targets"][None]).mean(axis=2)
  return np.mean([np.log(1 + weight(np.delete(row, i)).sum()) for i, row in enumerate(d)])


SAME = {  # all projections are one vector: the expected loss, of the batch
  "dual_phase": lambda b: np.log(B),
  "clip": lambda b: np.log(B),
  "nt_xent": lambda b: np.log(2 * B - 1),
  "siglip": lambda b: np.log1p(np.exp(-7)) + (B - 1) * np.log1p(np.exp(7)),  # 1 / 0.1 - 3
  "phenotype_weighted": lambda b: even(b, lambda d: 1 - np.exp(-d / 1.5**2)),
  "soft_positive": lambda b: np.log(B),
  "false_negative_removal": lambda b: even(b, lambda d: np.sqrt(d) >= 1.3),
  "relational": relations,
  "vicreg": lambda b: 25 * 2 * 0.99,
  "simsiam": lambda b: -1.0,
}
ZERO = SAME | {
  "siglip": lambda b: np.log1p(np.exp(3)) + (B - 1) * np.log1p(np.exp(-3)),
  "simsiam": lambda b: 0.0,
  "disease_classification": lambda b: np.log(2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fill", [1.0, 0.0])
def test_identical_embeddings_and_zero_vectors(name, fill):
  outputs, batch = case(whole=True)
  same = jax.tree.map(lambda x: np.full_like(x, fill), outputs) | {
    "patch_mask": outputs["patch_mask"]
  }
  same["cmr"]["sax"]["patch_mask"] = outputs["cmr"]["sax"]["patch_mask"]
  value, grads = value_and_grad(name, same, batch)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  expected = (SAME if fill else ZERO).get(name)
  if expected:
    np.testing.assert_allclose(value, expected(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_one_subject_all_over_the_batch(name):
  outputs, batch = case(whole=True)
  apart, _ = value_and_grad(name, outputs, batch)
  value, grads = value_and_grad(name, outputs, batch | {"subject": np.ones_like(batch["subject"])})
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  if name == "siglip":  # only the question whether a pair is one

    def unit(z):
      return z / np.linalg.norm(z, axis=1, keepdims=True)

    cos = (unit(outputs["ecg_projection"]) * unit(outputs["cmr"]["image"]["projection"])).sum(
      axis=1
    )
    np.testing.assert_allclose(value, np.log1p(np.exp(-(cos / 0.1 - 3))).mean(), rtol=1e-5)
  elif name in SAME and name not in ("vicreg", "simsiam"):  # nobody to compare with
    assert abs(value) < 1e-5 and apart > 0.1
  else:
    assert value == apart


def test_a_dead_row_pulls_a_thousand_times_at_most():
  np.testing.assert_allclose(
    jax.jacrev(contrastive.normalise)(jnp.zeros(4)), 1000 * np.eye(4), rtol=1e-6
  )
  unit = contrastive.normalise(np.float32([[3, 4], [0.03, 0.04]]))
  np.testing.assert_allclose(unit, [[0.6, 0.8], [0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize(
  "name", ["dual_phase", "clip", "nt_xent", "phenotype_weighted", "soft_positive"]
)
def test_what_is_hidden_stays_hidden_at_the_lowest_temperature(name):
  """Two views as far apart as can be, at scale 100 (model.max_scale): own logit -100, and nobody to
  compare with."""
  outputs, batch = case(whole=True)
  z = outputs["ecg_projection"]
  outputs["cmr"] = {which: {"projection": -z} for which in ("ed", "es", "image")}
  outputs["again"] = {"cmr": {"image": {"projection": z}}}
  outputs["log_scale"] = np.log(np.float32(100))
  loss = objectives.find(name, "")(
    outputs, batch | {"subject": np.ones_like(batch["subject"])}, **CASES[name][0]
  )
  np.testing.assert_allclose(loss.values, 0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("left_out", ["mask", "has"])
def test_a_batch_without_a_row_that_counts_costs_nothing(name, left_out):
  outputs, batch = case()
  for field in ("mask",) if left_out == "mask" else CASES[name][1]:
    batch[field] = np.zeros_like(batch[field])
  value, grads = value_and_grad(name, outputs, batch)
  assert value == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", CASES)
def test_unknown_targets(name):
  outputs, batch = case()
  unknown = {label: np.full_like(batch[label], np.nan) for label in ("targets", "diseases")}
  value, grads = value_and_grad(name, outputs, batch | unknown)
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  if name in ("relational", "phenotype_regression", "disease_classification"):
    assert value == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))
  if name in ("phenotype_weighted", "soft_positive", "false_negative_removal"):
    temperature = 0.1 if name == "false_negative_removal" else 0.05
    plain = objectives.find("clip", "")(outputs, batch, "ecg", "image", temperature=temperature)
    np.testing.assert_allclose(value, objectives.mean(plain), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_rows_that_do_not_count_change_nothing(name):
  outputs, batch = case()

  # siamese outputs are [2, B, E]
  def row(x):
    return np.moveaxis(x, 1, 0) if x.shape[:2] == (2, B) else x

  out = np.flatnonzero(~counts(batch, CASES[name][1]))
  assert len(out) >= 3
  value, grads = value_and_grad(name, outputs, batch)
  assert all((row(g)[out] == 0).all() for g in jax.tree.leaves(grads))

  def garbled(rows):
    changed = jax.tree.map(np.copy, (outputs, batch))
    for path, x in jax.tree_util.tree_leaves_with_path(changed):
      if path[-1].key not in ("mask", "patch_mask", "has_ecg", "has_cmr", "subject"):
        row(x)[rows] = 50 * np.cos(np.arange(row(x)[rows].size)).reshape(row(x)[rows].shape)
    return value_and_grad(name, *changed)

  same, same_grads = garbled(out)
  np.testing.assert_allclose(same, value, rtol=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), grads, same_grads
  )
  assert not np.isclose(garbled([0, 1])[0], value, rtol=1e-4)  # rows that do


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_raised_to_float32(name):
  outputs, batch = case()
  low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), outputs)
  back = jax.tree.map(lambda x: np.asarray(x, np.float32), low)
  fn, (parameters, _) = objectives.find(name, ""), CASES[name]
  compute = jax.jit(
    lambda outputs: (loss := fn(outputs, batch, **parameters), objectives.mean(loss))
  )
  loss, mean = compute(low)
  assert {x.dtype for x in jax.tree.leaves(loss)} == {np.dtype(np.float32)}
  np.testing.assert_allclose(mean, compute(back)[1], rtol=1e-5)


@pytest.mark.parametrize(
  "name, parameters, words",
  [
    (
      "dual_phase",
      dict(w_ed=0.0, w_es=0.0, w_edes=0.0),
      "w_ed . w_es . w_edes is 0.0; expected a number above 0",
    ),
    ("dual_phase", dict(w_ed=-1.0), "w_ed is -1.0; expected 0 or"),
    ("clip", dict(b_to_a=1.5), "b_to_a is 1.5; expected a number from 0 to 1"),
    ("clip", dict(a="ed"), "a and b are both 'ed'"),
    ("clip", dict(b="image.agian"), "named 'image.agian'; expected ecg or a CMR tower"),
    ("clip", dict(b=""), "named ''"),
    ("clip", dict(temperature=0.0), "temperature is 0.0; expected a number above 0"),
    ("clip", dict(temperature=float("nan")), "temperature is nan"),
    ("nt_xent", dict(of="image.again"), "named 'image.again.again'"),
    ("siglip", dict(bias="low"), "bias is 'low'; expected a number"),
    ("phenotype_weighted", dict(sigma=0), "sigma is 0; expected a number above 0"),
    ("soft_positive", dict(radius=-1.0), "radius is -1.0; expected 0 or"),
    ("soft_positive", dict(sigma=None), "sigma is None"),
    ("false_negative_removal", dict(radius="x"), "radius is 'x'"),
    ("relational", dict(sigma=-0.2), "sigma is -0.2"),
    ("phenotype_regression", dict(delta=-0.2), "delta is -0.2"),
    (
      "disease_classification",
      dict(smoothing=1.0),
      "smoothing is 1.0; expected a number from 0 to below 1",
    ),
    ("vicreg", dict(covariance=-1.0), "covariance is -1.0"),
    ("cmr_mae", dict(of="ecg"), "of is 'ecg'; expected a CMR tower"),
  ],
)
def test_a_senseless_parameter_is_one_clear_line(name, parameters, words):
  outputs, batch = case()
  with pytest.raises(ValueError, match=words) as error:
    objectives.find(name, "")(outputs, batch, **parameters)
  assert "\n" not in str(error.value)


def test_targets_that_do_not_fit_are_one_clear_line():
  outputs, batch = case()
  for columns, words in (
    (1, r"\(16, 4\) and batch.targets \(16, 1\)"),
    (0, "at least one in config.data.targets"),
  ):
    with pytest.raises(ValueError, match=words):
      objectives.find("phenotype_regression", "")(
        outputs, batch | {"targets": batch["targets"][:, :columns]}
      )
  with pytest.raises(ValueError, match=r"\(16, 4\) and batch.diseases \(16, 3\)"):
    objectives.find("disease_classification", "")(
      outputs, batch | {"diseases": batch["diseases"][:, :3]}
    )


@pytest.mark.parametrize(
  "name, parameters, missing",
  [
    ("clip", dict(b="lax"), "lax"),
    ("nt_xent", dict(of="ed"), "ed"),
    ("phenotype_regression", dict(of="es"), "es"),
    ("disease_classification", dict(of="ed"), "ed"),
  ],
)
def test_a_missing_output_is_named(name, parameters, missing):
  """training.step_lib.check_outputs makes one line of it, with the outputs that there are."""
  with pytest.raises(KeyError, match=missing):
    objectives.find(name, "")(*case(), **parameters)
