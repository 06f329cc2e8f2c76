"""Supervised objectives."""

import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common


def phenotype_regression(outputs, batch, of: str = "ecg", delta: float = 0.0) -> Loss:
  """Regression of phenotypes from an embedding: the mean over a row's known targets of

    (y - t)^2                                                              (delta = 0; dual-phase's CMR encoders), or
    (y - t)^2 / 2 within delta, else delta (|y - t| - delta / 2)           (Huber 1964; delta = 1: MyoECG's SmoothL1).

  Targets are standardised by the train split, so that each weighs alike whatever its unit (dual-phase's code regresses
  raw units, where volumes in mL outweigh everything). A row without a known target does not count.

  Args:
    outputs: regression.NAME [B, K], in SD.
    batch: targets [B, K] standardised (NaN: unknown), mask, and has_ecg or has_cmr [B].
    of: "ecg" or a CMR tower out of config.model.regression.
    delta: in SD, where the squared error turns linear; 0: never.

  Metrics: r2, over all known targets of the batch, against predicting the train split's means.
  """
  common.require_not_negative(delta=delta)
  targets, known = common.targets_of(batch)
  predicted = common.at_least_float32(outputs["regression"][of])
  if predicted.shape != targets.shape:
    raise ValueError(f"outputs.regression.{of} has the shape {predicted.shape} and batch.targets {targets.shape}; "
                     "expected the same")
  error = jnp.where(known, predicted - targets, 0)
  squared, size = jnp.square(error), jnp.abs(error)
  each = jnp.where(size <= delta, squared / 2, delta * (size - delta / 2)) if delta else squared
  weight = common.row_weight(batch, of) * known.any(axis=1)
  unexplained, total = ((x * weight[:, None]).sum() for x in (squared, jnp.square(targets)))
  return Loss(each.sum(axis=1) / jnp.maximum(known.sum(axis=1), 1), weight,
              {"r2": 1 - unexplained / jnp.where(total > 0, total, 1.0)})
