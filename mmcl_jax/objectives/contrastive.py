"""Contrastive objectives over the global batch. Everything here is float32: logits at low temperature need it."""

import jax
import jax.numpy as jnp

from mmcl_jax.objectives import Loss


def normalise(z: jax.Array) -> jax.Array:
  """z / sqrt(|z|^2 + 1e-6) row by row.

  Unlike z / (|z| + eps) its gradient exists at z = 0, where it is 1,000: a smaller constant would let one dead row
  (all ReLUs of a head off) outweigh the batch.
  """
  z = z.astype(jnp.float32)
  return z * jax.lax.rsqrt(jnp.sum(jnp.square(z), axis=-1, keepdims=True) + 1e-6)


def may_compare(subject: jax.Array, valid: jax.Array) -> jax.Array:
  """[B, B] bool, symmetric: which rows stand in each other's denominators, and each row in its own.

  Two rows of one subject are not each other's negatives; a row that does not count (padding, a missing modality) is
  nobody's, and keeps only itself, so that its value is finite.
  """
  same = (subject[:, None, :] == subject[None, :, :]).all(axis=-1)
  counts = (valid[:, None] > 0) & (valid[None, :] > 0)
  return jnp.eye(len(subject), dtype=bool) | (~same & counts)


def info_nce(a, b, scale, allowed) -> tuple[jax.Array, jax.Array]:
  """Symmetric InfoNCE (Oord et al. 2018; CLIP): cross-entropy of rows and of columns of scale * a b^T.

  Args: a, b [B, E] of unit length; scale = 1 / temperature; allowed [B, B] (see `may_compare`).

  Returns: values [B], the mean of both directions; rank-one hits [B], whether a row's best candidate is its own.
  """
  logits = scale * jnp.einsum("ie,je->ij", a, b, precision="highest")
  own_column = jnp.eye(len(a), dtype=bool)
  hidden = jnp.float32(-1e30)  # finite: exp(hidden) is 0 and its gradient too
  own = jnp.where(own_column, logits, 0.0).sum(axis=1)
  compared = jnp.where(allowed, logits, hidden)
  # Columns are summed where they lie: a transpose of row-sharded logits would send all of them round the devices.
  rows, columns = (jax.nn.logsumexp(compared, axis=axis) for axis in (1, 0))
  others = jnp.where(allowed & ~own_column, logits, hidden).max(axis=1)
  return 0.5 * (rows + columns) - own, own > others


def dual_phase(outputs, batch, w_ed: float = 1.0, w_es: float = 1.0, w_edes: float = 1.0,
               temperature: float = 0.07) -> Loss:
  """Three-pair contrastive loss tying an ECG to the same heart at ED and ES (Alvarez-Florez et al. 2026).

    L = w_ed S(u, a) + w_es S(u, b) + w_edes S(a, b),  weights divided by their sum,

  with u, a, b the unit-length projections of ECG, ED and ES, and S the symmetric InfoNCE over the global batch.

  Args:
    outputs: ecg_projection [B, E], cmr.{ed,es}.projection [B, E], log_scale [] where the temperature is learned.
    batch: subject [B, 2], mask, has_ecg, has_cmr [B].
    w_ed, w_es, w_edes: weights of the three pairs.
    temperature: of the softmax, where the model learns none (config.model.learned_temperature).
  """
  u, a, b = (normalise(z) for z in (outputs["ecg_projection"], *(outputs["cmr"][p]["projection"] for p in ("ed", "es"))))
  scale = jnp.exp(outputs["log_scale"]) if "log_scale" in outputs else 1.0 / temperature
  weight = (batch["mask"] * batch["has_ecg"] * batch["has_cmr"]).astype(jnp.float32)
  allowed = may_compare(batch["subject"], weight)
  total = w_ed + w_es + w_edes
  values, metrics = 0.0, {}
  for name, x, y, w in (("ed", u, a, w_ed), ("es", u, b, w_es), ("edes", a, b, w_edes)):
    pair, hit = info_nce(x, y, scale, allowed)
    values += w / total * pair
    metrics |= {f"{name}_loss": (pair * weight).sum() / jnp.maximum(weight.sum(), 1.0),
                f"{name}_r@1": (hit * weight).sum() / jnp.maximum(weight.sum(), 1.0)}
  metrics["temperature"] = 1.0 / jnp.asarray(scale, jnp.float32)
  return Loss(values, weight, metrics)
