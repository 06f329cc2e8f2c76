"""Masked-autoencoder reconstruction of the ECG and of CMR."""

import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common


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
  x, y = common.at_least_float32(batch["ecg"]), common.at_least_float32(outputs["reconstruction"])
  B, L, T = x.shape
  squared = jnp.square(x - y)
  mask = outputs["patch_mask"]
  per_patch = squared.reshape(B, L, mask.shape[2], -1).mean(axis=3)
  masked = (per_patch * mask).sum(axis=(1, 2)) / mask.sum(axis=(1, 2))
  ncc = jnp.sum(zscore(x) * zscore(y), axis=2).mean(axis=1) / (T - 1)
  mse = masked if region == "masked" else squared.mean(axis=(1, 2))
  weight = common.row_weight(batch, "ecg")
  return Loss((1 - ncc_weight) * mse + ncc_weight * (1 - ncc), weight,
              {"masked_mse": common.average(masked, weight), "ncc": common.average(ncc, weight)})


def zscore(x):
  """Per lead, with the sample variance (T - 1), so that NCC of a signal with itself is 1; a flat lead gives zeros."""
  centred = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(centred).sum(axis=-1, keepdims=True) / (x.shape[-1] - 1)
  return centred / jnp.sqrt(variance + 1e-8)


def cmr_mae(outputs, batch, of: str = "sax", norm_pix: bool = False) -> Loss:
  """MSE of a CMR tower's hidden patches (He et al. 2022).

  Args:
    outputs: cmr.NAME.{patches, reconstruction} [B, N, P], cmr.NAME.patch_mask [B, N] (1 = hidden).
    batch: has_cmr, mask [B].
    of: a CMR tower of kind=vit with a mask_ratio.
    norm_pix: each patch is first brought to mean 0 and variance 1: (x - mean) / sqrt(variance by P - 1, + 1e-6).
  """
  if common.tower(of)[0] == "ecg":
    raise ValueError(f"of is {of!r}; expected a CMR tower (the ECG has the objective mae)")
  tower = outputs["cmr"][of]
  target, mask = common.at_least_float32(tower["patches"]), tower["patch_mask"]
  if norm_pix:
    centred = target - target.mean(axis=2, keepdims=True)
    variance = jnp.square(centred).sum(axis=2, keepdims=True) / (target.shape[2] - 1)
    target = centred / jnp.sqrt(variance + 1e-6)
  per_patch = jnp.square(target - tower["reconstruction"]).mean(axis=2)
  return Loss((per_patch * mask).sum(axis=1) / mask.sum(axis=1), common.row_weight(batch, of), {})
