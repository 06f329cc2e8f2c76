"""Softmax contrastive objectives over the global batch. All here is at least float32: low
temperatures need it."""

import functools

import jax
import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common, ring as ring_infonce

HIDDEN = -1e30  # logit of what is not compared; finite: its exponential is 0 and its gradient too


def normalise(z: jax.Array) -> jax.Array:
  """z / max(|z|, 1e-3) row by row.

  Its gradient at z = 0 is 1,000: a smaller constant would let one dead row (all ReLUs of a head
  off) outweigh the rest.
  """
  z = common.at_least_float32(z)
  squared_norm = jnp.sum(jnp.square(z), axis=-1, keepdims=True)
  return z * jax.lax.rsqrt(jnp.maximum(squared_norm, 1e-6))


def may_compare(subject: jax.Array, valid: jax.Array) -> jax.Array:
  """[B, B] bool, symmetric: which rows stand in each other's denominators, and each row in its own.

  Two rows of one subject are not each other's negatives; a row that does not count (padding, a
  missing modality) is nobody's, and keeps only itself, so that its value is finite.
  """
  same_ids = subject[:, None, :] == subject[None, :, :]  # [B, B, 2]
  same = same_ids.all(axis=-1)
  both_count = (valid[:, None] > 0) & (valid[None, :] > 0)
  own = jnp.eye(len(subject), dtype=bool)
  return own | (~same & both_count)


def similarities(a: jax.Array, b: jax.Array, scale) -> jax.Array:
  """scale * a b^T, [B, B], for a, b [B, E] of unit length."""
  return scale * jnp.einsum("ie,je->ij", a, b, precision="highest")


def log_sum_exp(logits: jax.Array, compared: jax.Array, axis: int) -> jax.Array:
  """[B] over the compared entries of each row (axis 1) or column (axis 0).

  Columns are summed where they lie: a transpose of row-sharded logits would send all of them round
  the devices.
  """
  logits = jnp.where(compared, logits, HIDDEN)
  return jax.nn.logsumexp(logits, axis=axis)


def own_and_hit(logits: jax.Array, compared: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Each row's own logit [B], and whether no compared one reaches it (rank one; a tie is none)."""
  diagonal = jnp.eye(len(logits), dtype=bool)
  own = jnp.where(diagonal, logits, 0.0).sum(axis=1)
  others = jnp.where(compared & ~diagonal, logits, HIDDEN)
  return own, own > others.max(axis=1)


def info_nce(
  a, b, scale, allowed, b_to_a: float = 0.5, log_weight=0.0
) -> tuple[jax.Array, jax.Array]:
  """InfoNCE in both directions (Oord et al. 2018; CLIP, Radford et al. 2021): with s = scale * a
  b^T,

    value_i = (1 - b_to_a) log sum_k w_ik e^{s_ik} + b_to_a log sum_k w_ki e^{s_ki} - s_ii.

  Args:
    a, b: [B, E] of unit length.
    scale: 1 / temperature.
    allowed: [B, B], which k are summed over (see `may_compare`).
    b_to_a: share of the direction in which each b looks for its own a among all of them.
    log_weight: log w [B, B], 0 on the diagonal.

  Returns: values [B]; rank-one hits [B], whether the b nearest to a row's a is its own.
  """
  logits = similarities(a, b, scale)
  own, hit = own_and_hit(logits, allowed)
  weighted = logits + log_weight
  rows = log_sum_exp(weighted, allowed, axis=1)
  columns = log_sum_exp(weighted, allowed, axis=0)
  return (1 - b_to_a) * rows + b_to_a * columns - own, hit


def among(subject: jax.Array, valid: jax.Array, ring: bool):
  """(a, b, scale, b_to_a) -> `info_nce` among the rows that `may_compare`; `ring`: without holding
  [B, B] logits."""
  if not isinstance(ring, bool):
    raise ValueError(f"ring is {ring!r}; expected True or False")
  if ring:
    return functools.partial(ring_infonce.info_nce, subject=subject, valid=valid)
  return functools.partial(info_nce, allowed=may_compare(subject, valid))


def dual_phase(
  outputs,
  batch,
  w_ed: float = 1.0,
  w_es: float = 1.0,
  w_edes: float = 1.0,
  temperature: float = 0.07,
  ring: bool = False,
) -> Loss:
  """Three-pair contrastive loss tying an ECG to the same heart at ED and ES (Alvarez-Florez et al.
  2026).

    L = w_ed S(u, a) + w_es S(u, b) + w_edes S(a, b),  weights divided by their sum,

  with u, a, b the unit-length projections of ECG, ED and ES, and S the symmetric InfoNCE over the
  global batch.

  Args:
    outputs: ecg_projection [B, E], cmr.{ed,es}.projection [B, E], log_scale [] where the
      temperature is learned.
    batch: subject [B, 2], mask, has_ecg, has_cmr [B].
    w_ed, w_es, w_edes: weights of the three pairs.
    temperature: of the softmax, where the model learns none (config.model.learned_temperature).
    ring: the same numbers in less memory, for batches of many thousand rows (objectives.ring).
  """
  common.require_not_negative(w_ed=w_ed, w_es=w_es, w_edes=w_edes)
  total = w_ed + w_es + w_edes
  common.require_positive(**{"w_ed + w_es + w_edes": total})
  ecg = normalise(common.projection(outputs, "ecg"))
  ed = normalise(common.projection(outputs, "ed"))
  es = normalise(common.projection(outputs, "es"))
  scale = common.inverse_temperature(outputs, temperature)
  weight = common.row_weight(batch, "ecg", "ed", "es")
  nce = among(batch["subject"], weight, ring)
  values, metrics = 0.0, {}
  pairs = (
    ("ed", ecg, ed, w_ed),
    ("es", ecg, es, w_es),
    ("edes", ed, es, w_edes),
  )
  for name, x, y, w in pairs:
    of_pair, hit = nce(x, y, scale)
    values += w / total * of_pair
    metrics[f"{name}_loss"] = common.average(of_pair, weight)
    metrics[f"{name}_r@1"] = common.average(hit, weight)
  metrics["temperature"] = 1.0 / jnp.asarray(scale)
  return Loss(values, weight, metrics)


def clip(
  outputs,
  batch,
  a: str = "ecg",
  b: str = "ed",
  b_to_a: float = 0.5,
  temperature: float = 0.1,
  ring: bool = False,
) -> Loss:
  """Two-tower contrastive loss (CLIP, Radford et al. 2021) with a weight for its directions (MMCL,
  Turgut et al. 2025).

    L = b_to_a CE(each b among all a) + (1 - b_to_a) CE(each a among all b),

  over unit-length projections at 1 / temperature. MMCL: a="ecg", b the CMR tower, b_to_a=0.75 (its
  lambda, the weight of CMR -> ECG), temperature=0.1.

  Args:
    outputs: projections [B, E] of both, log_scale [] where the temperature is learned.
    batch: subject [B, 2], mask, has_ecg, has_cmr [B].
    a, b: "ecg" or a CMR tower, or either with ".again".
    b_to_a: share of the direction b -> a, 0 to 1.
    temperature: of the softmax, where the model learns none.
    ring: the same numbers in less memory, for batches of many thousand rows (objectives.ring).
  """
  if not (common.is_number(b_to_a) and 0 <= b_to_a <= 1):
    raise ValueError(f"b_to_a is {b_to_a!r}; expected a number from 0 to 1")
  x, y = map(normalise, common.pair(outputs, a, b))
  scale = common.inverse_temperature(outputs, temperature)
  weight = common.row_weight(batch, a, b)
  nce = among(batch["subject"], weight, ring)
  values, hit = nce(x, y, scale, b_to_a=b_to_a)
  metrics = {
    "r@1": common.average(hit, weight),
    "temperature": 1.0 / jnp.asarray(scale),
  }
  return Loss(values, weight, metrics)
