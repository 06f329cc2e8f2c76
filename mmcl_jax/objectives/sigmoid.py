"""Contrastive learning pair by pair, without a softmax over the batch."""

import jax
import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common
from mmcl_jax.objectives.contrastive import may_compare, normalise, own_and_hit, similarities


def siglip(
  outputs,
  batch,
  a: str = "ecg",
  b: str = "ed",
  temperature: float = 0.1,
  bias: float = -10.0,
) -> Loss:
  """Sigmoid loss (SigLIP, Zhai et al. 2023): every pair of rows is a yes-or-no question.

    value_i = -sum_k log sigmoid(y_ik (a_i . b_k / temperature + bias)),  y_ii = 1, else -1,

  over unit-length projections and the k that may be compared. The paper learns both numbers, from
  the defaults on; the bias keeps the many negatives from ruling the first steps.

  Args:
    outputs: projections [B, E] of both, log_scale [] and bias [] where they are learned.
    batch: subject [B, 2], mask, has_ecg, has_cmr [B].
    a, b: "ecg" or a CMR tower, or either with ".again".
    temperature, bias: where the model learns none (config.model.learned_temperature, learned_bias).
  """
  if not common.is_number(bias):
    raise ValueError(f"bias is {bias!r}; expected a number")
  x, y = map(normalise, common.pair(outputs, a, b))
  scale = common.inverse_temperature(outputs, temperature)
  bias = outputs.get("bias", bias)
  weight = common.row_weight(batch, a, b)
  allowed = may_compare(batch["subject"], weight)
  logits = similarities(x, y, scale) + bias
  sign = 2.0 * jnp.eye(len(x), dtype=logits.dtype) - 1
  each = jax.nn.softplus(-sign * logits)  # -log sigmoid(sign * logits)
  values = jnp.where(allowed, each, 0.0).sum(axis=1)
  _, hit = own_and_hit(logits, allowed)
  metrics = {
    "r@1": common.average(hit, weight),
    "temperature": 1.0 / jnp.asarray(scale),
    "bias": jnp.asarray(bias),
  }
  return Loss(values, weight, metrics)
