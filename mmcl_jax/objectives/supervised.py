"""Supervised objectives."""

import jax
import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common


def phenotype_regression(outputs, batch, of: str = "ecg", delta: float = 0.0) -> Loss:
  """Regression of phenotypes from an embedding: the mean over a row's known targets of

    (y - t)^2                                                    (delta = 0; dual-phase's CMR
      encoders), or
    (y - t)^2 / 2 within delta, else delta (|y - t| - delta / 2)  (Huber 1964; delta = 1: MyoECG's
      SmoothL1).

  Targets are standardised by the train split, so that each weighs alike whatever its unit
  (dual-phase's code regresses raw units, where volumes in mL outweigh everything). A row without a
  known target does not count.

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
    raise ValueError(
      f"outputs.regression.{of} has the shape {predicted.shape} and batch.targets {targets.shape}; "
      "expected the same"
    )
  error = jnp.where(known, predicted - targets, 0)
  squared = jnp.square(error)
  each = squared
  if delta:
    size = jnp.abs(error)
    linear = delta * (size - delta / 2)
    each = jnp.where(size <= delta, squared / 2, linear)
  count = known.sum(axis=1)
  values = each.sum(axis=1) / jnp.maximum(count, 1)
  weight = common.row_weight(batch, of) * known.any(axis=1)
  rows = weight[:, None]  # [B, 1]
  unexplained = (squared * rows).sum()
  total = (jnp.square(targets) * rows).sum()
  r2 = 1 - unexplained / jnp.where(total > 0, total, 1.0)
  return Loss(values, weight, {"r2": r2})


def disease_classification(outputs, batch, of: str = "ecg", smoothing: float = 0.0) -> Loss:
  """Classification of diseases from an embedding: the mean over a row's known diseases of the
  binary cross-entropy

    -q log p - (1 - q) log(1 - p),   q = y (1 - smoothing) + smoothing / 2      (Szegedy et al.
      2016; MMCL: 0.1),

  which is the cross-entropy of two classes with as much label smoothing. Every disease weighs
  alike, and so do cases and controls: no class weights, so that probabilities keep to the
  prevalence. A row without a known disease does not count.

  Args:
    outputs: classification.NAME [B, C], log-odds.
    batch: diseases [B, C] of 0 and 1 (NaN: unknown), mask, and has_ecg or has_cmr [B].
    of: "ecg" or a CMR tower out of config.model.classification.
    smoothing: in [0, 1).

  Metrics: log_loss, the same without smoothing.
  """
  common.require_not_negative(smoothing=smoothing)
  if smoothing >= 1:
    raise ValueError(f"smoothing is {smoothing}; expected a number from 0 to below 1")
  diseases = common.at_least_float32(batch["diseases"])
  odds = common.at_least_float32(outputs["classification"][of])
  if odds.shape != diseases.shape:
    raise ValueError(
      f"outputs.classification.{of} has the shape {odds.shape} and batch.diseases "
      f"{diseases.shape}; expected the same"
    )
  known = ~jnp.isnan(diseases)
  weight = common.row_weight(batch, of) * known.any(axis=1)

  def cross_entropy(smoothing):
    states = jnp.where(known, diseases, 0)
    wanted = states * (1 - smoothing) + smoothing / 2
    # -q log p - (1 - q) log(1 - p), from the log-odds
    each = jax.nn.softplus(odds) - wanted * odds
    each = jnp.where(known, each, 0)
    count = known.sum(axis=1)
    return each.sum(axis=1) / jnp.maximum(count, 1)

  metrics = {"log_loss": common.average(cross_entropy(0.0), weight)}
  return Loss(cross_entropy(smoothing), weight, metrics)
