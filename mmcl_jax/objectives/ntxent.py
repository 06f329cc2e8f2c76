"""Contrastive learning of one modality from two augmentations of it."""

import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common
from mmcl_jax.objectives.contrastive import (
  log_sum_exp,
  may_compare,
  normalise,
  own_and_hit,
  similarities,
  HIDDEN,
)


def nt_xent(outputs, batch, of: str = "image", temperature: float = 0.1) -> Loss:
  """NT-Xent over the 2B views of a batch (SimCLR, Chen et al. 2020).

    l(v) = -s(v, v') + log sum_{w != v} e^{s(v, w)},  s = cosine / temperature,

  with v' the other view of the same row and w over both views of every row that may be compared; a
  row's value is the mean of l over its two views.

  Args:
    outputs: projections [B, E] of `of` and of its second augmentation, log_scale [] where the
      temperature is learned.
    batch: subject [B, 2], mask, and has_ecg or has_cmr [B].
    of: "ecg" or a CMR tower.
    temperature: of the softmax, where the model learns none.
  """
  x = normalise(common.projection(outputs, of))
  y = normalise(common.projection(outputs, f"{of}.again"))
  scale = common.inverse_temperature(outputs, temperature)
  weight = common.row_weight(batch, of)
  allowed = may_compare(batch["subject"], weight)
  # within one view a row's own logit is with itself
  others = allowed & ~jnp.eye(len(allowed), dtype=bool)
  xx = similarities(x, x, scale)
  xy = similarities(x, y, scale)
  yy = similarities(y, y, scale)
  first = jnp.logaddexp(
    log_sum_exp(xx, others, axis=1),
    log_sum_exp(xy, allowed, axis=1),
  )
  second = jnp.logaddexp(
    log_sum_exp(yy, others, axis=1),
    log_sum_exp(xy, allowed, axis=0),
  )
  own, hit = own_and_hit(xy, allowed)
  hit &= own > jnp.where(others, xx, HIDDEN).max(axis=1)
  values = 0.5 * (first + second) - own
  metrics = {
    "r@1": common.average(hit, weight),
    "temperature": 1.0 / jnp.asarray(scale),
  }
  return Loss(values, weight, metrics)
