"""Masked-autoencoder reconstruction of the ECG."""

import jax.numpy as jnp

from mmcl_jax.objectives import Loss


def mae(outputs, batch, region: str = "masked", ncc_weight: float = 0.0) -> Loss:
  """(1 - w) MSE + w (1 - NCC).

  MSE is over the masked patches (He et al. 2022, region="masked") or over all of them as in MMCL's code
  (region="all"). NCC is the mean over leads of 1 / (T - 1) sum_t zscore(x)_t zscore(x_hat)_t (MMCL: w = 0.1).

  Args:
    outputs: reconstruction [B, L, T], patch_mask [B, L, T / patch] (1 = hidden).
    batch: ecg [B, L, T], has_ecg [B], mask [B].
    region: masked | all.
    ncc_weight: w.
  """
  if region not in ("masked", "all"):
    raise ValueError(f"region is {region!r}; expected masked or all")
  x, y = batch["ecg"], outputs["reconstruction"]
  B, L, T = x.shape
  squared = jnp.square(x - y)
  mask = outputs["patch_mask"]
  per_patch = squared.reshape(B, L, mask.shape[2], -1).mean(axis=3)
  masked = (per_patch * mask).sum(axis=(1, 2)) / mask.sum(axis=(1, 2))
  ncc = jnp.sum(zscore(x) * zscore(y), axis=2).mean(axis=1) / (T - 1)
  mse = masked if region == "masked" else squared.mean(axis=(1, 2))
  weight = (batch["mask"] * batch["has_ecg"]).astype(jnp.float32)
  total = jnp.maximum(weight.sum(), 1.0)
  return Loss((1 - ncc_weight) * mse + ncc_weight * (1 - ncc), weight,
              {"masked_mse": (masked * weight).sum() / total, "ncc": (ncc * weight).sum() / total})


def zscore(x):
  """Per lead, with the sample variance (T - 1), so that NCC of a signal with itself is 1; a flat lead gives zeros."""
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(centred).sum(axis=-1, keepdims=True) / (x.shape[-1] - 1)
  return centred / jnp.sqrt(variance + 1e-8)
