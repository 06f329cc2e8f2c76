"""Masked-autoencoder reconstruction of the ECG and of CMR."""

import jax.numpy as jnp

from mmcl_jax.objectives import Loss, common


def mae(
  outputs, batch, region: str = "masked", ncc_weight: float = 0.0, norm_pix: bool = False
) -> Loss:
  """(1 - w) MSE + w (1 - NCC).

  MSE is over the masked patches (He et al. 2022, region="masked") or over all of them as in MMCL's
  code (region="all"). NCC is the mean over leads of 1 / (T - 1) sum_t zscore(x)_t zscore(x_hat)_t
  (MMCL: w = 0.1).

  Args:
    outputs: reconstruction [B, L, T], patch_mask [B, L, T / patch] (1 = hidden).
    batch: ecg [B, L, T], has_ecg [B], mask [B].
    region: masked | all.
    ncc_weight: w.
    norm_pix: MSE is to patches that are normalised first, as in cmr_mae (ST-MEM); it needs w = 0.
  """
  if region not in ("masked", "all"):
    raise ValueError(f"region is {region!r}; expected masked or all")
  if norm_pix and ncc_weight:
    raise ValueError(
      f"norm_pix=True with ncc_weight={ncc_weight}; patches without their own level "
      "make no lead that NCC could compare: expected norm_pix=False or ncc_weight=0"
    )
  x = common.at_least_float32(batch["ecg"])
  y = common.at_least_float32(outputs["reconstruction"])
  B, L, T = x.shape
  mask = outputs["patch_mask"]  # [B, L, N]
  patches = x.reshape(B, L, mask.shape[2], -1)  # [B, L, N, P]
  target = normalised(patches) if norm_pix else patches
  squared = jnp.square(target - y.reshape(patches.shape))
  per_patch = squared.mean(axis=3)
  hidden = mask.sum(axis=(1, 2))
  masked_mse = (per_patch * mask).sum(axis=(1, 2)) / hidden
  products = jnp.sum(zscore(x) * zscore(y), axis=2)  # [B, L]
  ncc = products.mean(axis=1) / (T - 1)
  mse = masked_mse
  if region == "all":
    mse = squared.mean(axis=(1, 2, 3))
  weight = common.row_weight(batch, "ecg")
  values = (1 - ncc_weight) * mse + ncc_weight * (1 - ncc)
  metrics = {
    "masked_mse": common.average(masked_mse, weight),
    "ncc": common.average(ncc, weight),
  }
  return Loss(values, weight, metrics)


def zscore(x):
  """Per lead, with the sample variance (T - 1), so that NCC of a signal with itself is 1; a flat
  lead gives zeros."""
  return _standardised(x, 1e-8)


def normalised(patches):
  """patches [..., P] -> (x - mean) / sqrt(variance by P - 1, + 1e-6) of each (He et al. 2022)."""
  return _standardised(patches, 1e-6)


def _standardised(x, epsilon):
  """(x - mean) / sqrt(sample variance + epsilon) along the last axis."""
  centred = x - x.mean(axis=-1, keepdims=True)
  squares = jnp.square(centred).sum(axis=-1, keepdims=True)
  variance = squares / (x.shape[-1] - 1)
  return centred / jnp.sqrt(variance + epsilon)


def cmr_mae(outputs, batch, of: str = "sax", norm_pix: bool = False) -> Loss:
  """MSE of a CMR tower's hidden patches (He et al. 2022).

  Args:
    outputs: cmr.NAME.{patches, reconstruction} [B, N, P], cmr.NAME.patch_mask [B, N] (1 = hidden).
    batch: has_cmr, mask [B].
    of: a CMR tower with a mask_ratio above 0, such as video_vit.
    norm_pix: each patch is normalised first.
  """
  if common.tower(of)[0] == "ecg":
    raise ValueError(f"of is {of!r}; expected a CMR tower (the ECG has the objective mae)")
  tower = outputs["cmr"][of]
  target = common.at_least_float32(tower["patches"])
  mask = tower["patch_mask"]
  if norm_pix:
    target = normalised(target)
  error = target - tower["reconstruction"]
  per_patch = jnp.square(error).mean(axis=2)  # [B, N]
  hidden = mask.sum(axis=1)
  values = (per_patch * mask).sum(axis=1) / hidden
  return Loss(values, common.row_weight(batch, of), {})
