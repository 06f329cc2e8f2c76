"""Contrastive objectives that know which hearts are alike: distances between phenotypes weigh, join
or drop pairs.

Throughout, d_ik is the mean squared difference of the standardised targets that rows i and k both
know (SD^2; see `common.phenotype_distance`), so that sigma and radius are in SD and mean the same
for any number of targets. Two hearts drawn at random have d = 2 on average; of the synthetic ones
(volumes, mass, function) 5 % of pairs have sqrt(d) < 0.5, 32 % < 0.9. The sources take a sum over
another space instead: CardioNets' code over 128 principal components of the CMR encoder's features,
MyoECG's over 27 phenotypes.
"""

import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common
from mmcl_jax.objectives.contrastive import (
  info_nce,
  log_sum_exp,
  may_compare,
  normalise,
  own_and_hit,
  similarities,
)


def phenotype_weighted(
  outputs,
  batch,
  a: str = "ecg",
  b: str = "ed",
  temperature: float = 0.05,
  sigma: float = 0.5,
) -> Loss:
  """InfoNCE whose negatives weigh the less, the more alike the hearts are (CardioNets, Ding et al.
  2026).

    l_i = -log [e^{s_ii} / (e^{s_ii} + sum_{k != i} W_ik e^{s_ik})],  W_ik = 1 - exp(-d_ik /
      sigma^2),

  with s = cosine / temperature, the mean of both directions. Pairs without a common target are
  ordinary: W = 1.

  Args:
    outputs: projections [B, E] of both, log_scale [] where the temperature is learned.
    batch: targets [B, K] standardised (NaN: unknown), subject [B, 2], mask, has_ecg, has_cmr [B].
    a, b: "ecg" or a CMR tower, or either with ".again".
    temperature: of the softmax, where the model learns none.
    sigma: difference in SD at which a negative has 63 % of its weight.
  """
  common.require_positive(sigma=sigma)
  d, common_target = common.phenotype_distance(batch)
  unlike = -jnp.expm1(-d / sigma**2)  # 1 - exp(-d / sigma^2)
  w = jnp.where(common_target, unlike, 1.0)
  return weighted(outputs, batch, a, b, temperature, w)


def false_negative_removal(
  outputs,
  batch,
  a: str = "ecg",
  b: str = "ed",
  temperature: float = 0.1,
  radius: float = 0.5,
) -> Loss:
  """InfoNCE whose denominators leave out the others that look the same (Huynh et al. 2022,
  elimination):

    l_i = -log [e^{s_ii} / (e^{s_ii} + sum_{k != i, k not in F_i} e^{s_ik})],  F_i = {k: sqrt(d_ik)
      < radius},

  the mean of both directions. Huynh et al. guess F_i from embeddings and MMCL's code reads it from
  a matrix of cosines (above 0.9); here the phenotypes tell. Radius 0 removes nobody: plain InfoNCE.

  Args: as `phenotype_weighted`; radius: root mean square difference in SD below which two hearts
  are alike.
  """
  common.require_not_negative(radius=radius)
  d, common_target = common.phenotype_distance(batch)
  alike = common_target & (d < radius**2)
  w = jnp.where(alike, 0.0, 1.0)
  return weighted(outputs, batch, a, b, temperature, w)


def weighted(outputs, batch, a, b, temperature, w) -> Loss:
  """Symmetric InfoNCE with weights w [B, B] of the negatives; metrics: their mean, 1 being plain
  InfoNCE."""
  x, y = map(normalise, common.pair(outputs, a, b))
  scale = common.inverse_temperature(outputs, temperature)
  weight = common.row_weight(batch, a, b)
  allowed = may_compare(batch["subject"], weight)
  own = jnp.eye(len(x), dtype=bool)
  w = jnp.where(own, 1.0, w)
  counts = w > 0
  log_weight = jnp.log(jnp.where(counts, w, 1.0))
  values, hit = info_nce(x, y, scale, allowed & counts, log_weight=log_weight)
  negatives = allowed & ~own
  metrics = {
    "r@1": common.average(hit, weight),
    "temperature": 1.0 / jnp.asarray(scale),
    "negative_weight": common.average(w, negatives),
  }
  return Loss(values, weight, metrics)


def soft_positive(
  outputs,
  batch,
  a: str = "ecg",
  b: str = "ed",
  temperature: float = 0.05,
  sigma: float = 0.5,
  radius: float = 0.5,
) -> Loss:
  """Supervised contrastive loss (SupCon, Khosla et al. 2020, L_out) with soft positives from
  phenotypes.

    l_i = -sum_k P_ik log [e^{s_ik} / sum_j e^{s_ij}],  P_ik ~ exp(-d_ik / sigma^2) where sqrt(d_ik)
      < radius,

  with sum_k P_ik = 1, the mean of both directions; a row's own pair has d = 0 and is always a
  positive. SupCon and CardioNets' optional term (distance up to 0.9, the ten nearest where there is
  none) count all positives alike; here they fade out with distance, and a row without any keeps its
  own pair. Radius 0: plain InfoNCE.

  Args:
    outputs, batch, a, b, temperature: as `phenotype_weighted`.
    sigma: difference in SD at which a positive has 37 % of the own pair's weight.
    radius: root mean square difference in SD up to which another heart is a positive.
  """
  common.require_positive(sigma=sigma)
  common.require_not_negative(radius=radius)
  x, y = map(normalise, common.pair(outputs, a, b))
  scale = common.inverse_temperature(outputs, temperature)
  weight = common.row_weight(batch, a, b)
  allowed = may_compare(batch["subject"], weight)
  d, common_target = common.phenotype_distance(batch)
  alike = allowed & common_target & (d < radius**2)
  own = jnp.eye(len(x), dtype=bool)
  likeness = jnp.exp(-d / sigma**2)
  positive = jnp.where(own, 1.0, jnp.where(alike, likeness, 0.0))
  logits = similarities(x, y, scale)
  _, hit = own_and_hit(logits, allowed)

  def direction(axis):
    # positive is symmetric: its columns are the weights of the other direction
    weights = positive.sum(axis)
    mean_positive = (positive * logits).sum(axis) / weights
    return log_sum_exp(logits, allowed, axis) - mean_positive

  values = 0.5 * (direction(1) + direction(0))
  metrics = {
    "r@1": common.average(hit, weight),
    "temperature": 1.0 / jnp.asarray(scale),
    "positives": common.average((positive > 0).sum(axis=1), weight),
  }
  return Loss(values, weight, metrics)


def relational(
  outputs,
  batch,
  a: str = "ecg",
  b: str = "ecg",
  temperature: float = 0.07,
  sigma: float = 0.2,
) -> Loss:
  """Relational distillation: who is near whom among embeddings as among phenotypes (MyoECG, Ding et
  al. 2026).

    KL(p_i || q_i),  p_ik ~ exp(-sqrt(d_ik) / sigma),  q_ik ~ exp(cos(a_i, b_k) / temperature).

  The k are those that may be compared and have a target in common with i; rows without any do not
  count. Within one projection (a = b, as in MyoECG) k = i is left out; between two it is part of
  both. MyoECG has a sum in place of the mean in d: its 1.0 over 27 phenotypes is sigma = 1 /
  sqrt(27) here.

  Args:
    outputs: projections [B, E] of a and b, log_scale [] where the temperature is learned.
    batch: targets [B, K] standardised (NaN: unknown), subject [B, 2], mask, has_ecg, has_cmr [B].
    a, b: "ecg" or a CMR tower, or either with ".again"; each a looks at every b.
    temperature: of q, where the model learns none.
    sigma: scale of p, in SD.
  """
  common.require_positive(sigma=sigma)
  x = normalise(common.projection(outputs, a))
  y = normalise(common.projection(outputs, b))
  scale = common.inverse_temperature(outputs, temperature)
  weight = common.row_weight(batch, a, b)
  d, common_target = common.phenotype_distance(batch)
  own = jnp.eye(len(x), dtype=bool)
  others = may_compare(batch["subject"], weight) & common_target & ~own
  compared = others if a == b else others | own

  def log_softmax(logits):
    normaliser = log_sum_exp(logits, compared, axis=1)
    return jnp.where(compared, logits - normaliser[:, None], 0.0)

  log_p = log_softmax(-jnp.sqrt(d) / sigma)
  log_q = log_softmax(similarities(x, y, scale))
  terms = jnp.exp(log_p) * (log_p - log_q)
  divergence = jnp.where(compared, terms, 0.0).sum(axis=1)
  weight *= others.any(axis=1)
  metrics = {
    "rows": weight.sum(),
    "temperature": 1.0 / jnp.asarray(scale),
  }
  return Loss(divergence, weight, metrics)
