"""Objectives against NumPy written from their formulas, and their degenerate inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy.special import logsumexp

from mmcl_jax import objectives
from mmcl_jax.errors import UserError
from mmcl_jax.objectives import contrastive, mae

B, E = 6, 5


def contrastive_case(seed=0, subjects=None, mask=None, scale=1.0):
  rng = np.random.default_rng(seed)
  u, a, b = scale * rng.normal(size=(3, B, E)).astype(np.float32)
  outputs = {"ecg_projection": u, "cmr": {"ed": {"projection": a}, "es": {"projection": b}}}
  subject = np.stack([np.arange(B) if subjects is None else subjects, np.zeros(B)], 1).astype(
    np.uint32
  )
  ones = np.ones(B, np.float32)
  return outputs, {
    "subject": subject,
    "mask": ones if mask is None else np.float32(mask),
    "has_ecg": ones,
    "has_cmr": ones,
  }


def numpy_dual_phase(outputs, batch, weights=(1, 1, 1), tau=0.07):
  """Row by row in float64: mean over valid rows of the weighted symmetric cross-entropies."""

  def unit(z):
    return z / np.linalg.norm(z, axis=1, keepdims=True)

  u, a, b = (
    unit(np.float64(z))
    for z in (
      outputs["ecg_projection"],
      outputs["cmr"]["ed"]["projection"],
      outputs["cmr"]["es"]["projection"],
    )
  )
  valid, subject = batch["mask"] > 0, batch["subject"]
  total = []
  for x, y in ((u, a), (u, b), (a, b)):
    rows = []
    for i in np.flatnonzero(valid):
      others = [j for j in range(B) if j == i or (valid[j] and (subject[j] != subject[i]).any())]
      forward, backward = x[i] @ y[others].T / tau, y[i] @ x[others].T / tau
      rows.append(0.5 * (logsumexp(forward) + logsumexp(backward)) - x[i] @ y[i] / tau)
    total.append(np.mean(rows))
  return np.dot(weights, total) / np.sum(weights)


@pytest.mark.parametrize(
  "case",
  [
    dict(),
    dict(subjects=[0, 1, 1, 2, 3, 3]),
    dict(mask=[1, 1, 0, 1, 1, 0]),
    dict(subjects=[0] * 3 + [1] * 3, mask=[1, 0, 1, 1, 1, 1]),
  ],
)
def test_dual_phase_is_its_formula(case):
  outputs, batch = contrastive_case(**case)
  loss = contrastive.dual_phase(outputs, batch, w_ed=1.0, w_es=2.0, w_edes=0.5)
  np.testing.assert_allclose(
    objectives.mean(loss), numpy_dual_phase(outputs, batch, (1, 2, 0.5)), rtol=1e-5
  )


def test_weights_go_to_the_pair_they_name():
  """The published code mixed up the pairs; here w_ed alone must ignore ES."""
  outputs, batch = contrastive_case()
  value = objectives.mean(contrastive.dual_phase(outputs, batch, 1.0, 0.0, 0.0))
  changed = outputs | {
    "cmr": outputs["cmr"] | {"es": {"projection": -outputs["cmr"]["es"]["projection"]}}
  }
  assert objectives.mean(contrastive.dual_phase(changed, batch, 1.0, 0.0, 0.0)) == value
  assert objectives.mean(contrastive.dual_phase(changed, batch, 0.0, 1.0, 0.0)) != value


def test_identical_embeddings_give_log_batch_and_no_hits():
  outputs, batch = contrastive_case()
  same = jax.tree.map(np.ones_like, outputs)
  loss = contrastive.dual_phase(same, batch)
  np.testing.assert_allclose(loss.values, np.log(B), rtol=1e-6)
  assert loss.metrics["ed_r@1"] == 0


def test_zero_vectors_have_finite_loss_and_gradient():
  outputs, batch = contrastive_case(scale=0.0)
  value, grads = jax.value_and_grad(lambda o: objectives.mean(contrastive.dual_phase(o, batch)))(
    outputs
  )
  assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_batch_without_any_pair_costs_nothing():
  outputs, batch = contrastive_case(mask=[0] * B)
  value, grads = jax.value_and_grad(lambda o: objectives.mean(contrastive.dual_phase(o, batch)))(
    outputs
  )
  assert value == 0 and all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))


def test_rows_that_do_not_count_change_nothing():
  outputs, batch = contrastive_case(mask=[1, 1, 0, 1, 1, 1])
  other = jax.tree.map(np.copy, outputs)
  for z in jax.tree.leaves(other):
    z[2] = 100.0
  for o in (outputs, other):
    np.testing.assert_allclose(
      objectives.mean(contrastive.dual_phase(o, batch)), numpy_dual_phase(outputs, batch), rtol=1e-5
    )


def test_learned_temperature_is_the_exponential_of_log_scale():
  outputs, batch = contrastive_case()
  learned = contrastive.dual_phase(outputs | {"log_scale": jnp.log(1 / 0.2)}, batch)
  np.testing.assert_allclose(
    objectives.mean(learned), numpy_dual_phase(outputs, batch, tau=0.2), rtol=1e-5
  )


def reconstruction_case():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(2, 3, 2, 20)).astype(np.float32)
  mask = (rng.random((3, 2, 4)) < 0.5).astype(np.float32)
  mask[:, 0, 0] = 1
  return {"reconstruction": y, "patch_mask": mask}, {
    "ecg": x,
    "mask": np.float32([1, 0, 1]),
    "has_ecg": np.ones(3, np.float32),
  }


def test_masked_mse_looks_at_hidden_patches_only():
  outputs, batch = reconstruction_case()
  loss = mae.mae(outputs, batch)
  hidden = np.repeat(outputs["patch_mask"], 5, axis=2) > 0
  expected = [
    np.mean((batch["ecg"][i] - outputs["reconstruction"][i])[hidden[i]] ** 2) for i in range(3)
  ]
  np.testing.assert_allclose(loss.values, expected, rtol=1e-5)
  np.testing.assert_allclose(objectives.mean(loss), (expected[0] + expected[2]) / 2, rtol=1e-5)


def test_all_patch_form_with_ncc():
  outputs, batch = reconstruction_case()
  x, y = batch["ecg"], outputs["reconstruction"]
  mse = ((x - y) ** 2).mean(axis=(1, 2))
  ncc = np.array(
    [np.mean([np.corrcoef(x[i, lead], y[i, lead])[0, 1] for lead in range(2)]) for i in range(3)]
  )
  loss = mae.mae(outputs, batch, region="all", ncc_weight=0.1)
  np.testing.assert_allclose(loss.values, 0.9 * mse + 0.1 * (1 - ncc), rtol=1e-4)


def test_a_flat_lead_keeps_ncc_and_its_gradient_finite():
  outputs, batch = reconstruction_case()
  batch["ecg"] = np.zeros_like(batch["ecg"])

  def f(y):
    return objectives.mean(
      mae.mae(outputs | {"reconstruction": y}, batch, region="all", ncc_weight=0.1)
    )

  value, grad = jax.value_and_grad(f)(jnp.zeros_like(batch["ecg"]))
  assert np.isfinite(value) and np.isfinite(grad).all()


def test_scheduled_weight_is_linear_between_and_constant_beyond():
  [one] = objectives.build(
    ConfigDict({"x": dict(fn="mae", weight=dict(steps=(10, 20), values=(0.0, 2.0)))})
  )
  np.testing.assert_allclose([one.weight(s) for s in (0, 10, 15, 20, 99)], [0, 0, 1, 2, 2])


@pytest.mark.parametrize(
  "entry, words",
  [
    (dict(fn="nope", weight=1.0), "expected one of mae, dual_phase"),
    (dict(fn="no_such_package.module:loss", weight=1.0), "cannot be imported"),
    (dict(fn="mmcl_jax.objectives.mae:nope", weight=1.0), "cannot be imported"),
    (dict(fn="mae"), "expected fn, weight"),
    (dict(fn="mae", weight=1.0, ncc=0.1), "parameters are region, ncc_weight"),
    (dict(fn="mae", weight="high"), "expected a number or dict"),
    (dict(fn="mae", weight=dict(steps=(5, 5), values=(0, 1))), "rising steps"),
  ],
)
def test_a_wrong_entry_is_one_clear_error(entry, words):
  with pytest.raises(UserError, match="config.objectives.mine.*" + words):
    objectives.build(ConfigDict({"mine": entry}))
