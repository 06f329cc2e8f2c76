"""Objectives that draw two views together without negatives, and what keeps them from
collapsing."""

import jax
import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common
from mmcl_jax.objectives.contrastive import normalise


def vicreg(
  outputs,
  batch,
  a: str = "ecg",
  b: str = "ed",
  invariance: float = 25.0,
  variance: float = 25.0,
  covariance: float = 1.0,
) -> Loss:
  """Variance-invariance-covariance regularisation (VICReg, Bardes et al. 2022, algorithm 1), with z
  of width E:

    invariance mean_e (z_i - z'_i)_e^2
    + variance   sum over z, z' of mean_e max(0, 1 - sqrt(Var z_e + 1e-4))
    + covariance sum over z, z' of 1/E sum_{e != f} Cov(z_e, z_f)^2.

  The last two belong to the batch, and every row has them alike; Var and Cov are over the rows that
  count, by n - 1.

  Args:
    outputs: projections [B, E] of both, not normalised.
    batch: mask, has_ecg, has_cmr [B].
    a, b: "ecg" or a CMR tower, or either with ".again".
    invariance, variance, covariance: weights of the three terms.
  """
  common.require_not_negative(invariance=invariance, variance=variance, covariance=covariance)
  x, y = (common.at_least_float32(z) for z in common.pair(outputs, a, b))
  weight = common.row_weight(batch, a, b)
  n = weight.sum()
  rows = weight[:, None]  # [B, 1]
  distance = jnp.square(x - y).mean(axis=1)
  variance_term, covariance_term = 0.0, 0.0
  for z in (x, y):
    mean = (z * rows).sum(axis=0) / jnp.maximum(n, 1)
    centred = (z - mean) * rows
    products = jnp.einsum("be,bf->ef", centred, centred, precision="highest")
    cov = products / jnp.maximum(n - 1, 1)  # [E, E]
    sd = jnp.sqrt(jnp.diagonal(cov) + 1e-4)
    variance_term += jnp.maximum(1 - sd, 0).mean()
    diagonal = jnp.eye(len(cov), dtype=bool)
    between = jnp.where(diagonal, 0, cov)
    covariance_term += jnp.square(between).sum() / len(cov)
  values = invariance * distance + variance * variance_term + covariance * covariance_term
  metrics = {
    "invariance": common.average(distance, weight),
    "variance": variance_term,
    "covariance": covariance_term,
  }
  return Loss(values, weight, metrics)


def simsiam(outputs, batch) -> Loss:
  """Two masked views of one ECG predict each other (SimSiam, Chen & He 2021).

    value_i = -1/2 cos(p1, stop_gradient(z2)) - 1/2 cos(p2, stop_gradient(z1)),  from 1 (opposite)
      to -1 (the same),

  with z the projections and p the predictions of row i's two views. MMCL's later code and
  dual-phase's add it to their MAE at weight 0.1.

  Args:
    outputs: siamese.{projection, prediction} [2, B, E].
    batch: has_ecg, mask [B].

  Metrics: spread, sqrt(E) times the SD of unit-length projections over the batch: near 1 is
  healthy, 0 is collapse.
  """
  z = normalise(outputs["siamese"]["projection"])
  p = normalise(outputs["siamese"]["prediction"])
  weight = common.row_weight(batch, "ecg")
  first, second = jax.lax.stop_gradient(z)
  towards_second = (p[0] * second).sum(axis=1)
  towards_first = (p[1] * first).sum(axis=1)
  values = -0.5 * (towards_second + towards_first)
  rows = weight[:, None]
  n = jnp.maximum(weight.sum(), 1.0)
  mean = (first * rows).sum(axis=0) / n
  variance = (jnp.square(first - mean) * rows).sum(axis=0) / n
  spread = jnp.sqrt(variance).mean() * z.shape[2] ** 0.5
  return Loss(values, weight, {"spread": spread})
