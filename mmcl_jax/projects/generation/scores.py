"""Scores of generated hearts: what they measure, and how like real ones they look.

Letters: N test subjects, S draws of each, K phenotypes, P phases, R bootstrap draws.
"""

import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist

from mmcl_jax.data import schema
from mmcl_jax.evaluators import statistics
from mmcl_jax.projects.generation import images

PHENOTYPES = ("LVEDV", "LVESV", "LVEF", "LVM", "RVEDV", "RVESV", "RVEF")
CHAMBERS = ("LV", "MYO", "RV")


def measure(millilitres: np.ndarray) -> np.ndarray:
  """Volumes [..., P, 3] of LV, MYO and RV at ED and ES -> PHENOTYPES [..., K] (data.measure); NaN
  where there is no LV or RV."""
  known = np.where(millilitres > 0, millilitres, np.nan)
  ed = known[..., 0, :]
  es = known[..., 1, :]
  ejected = 100 * (ed - es) / ed
  values = {
    "LVEDV": ed[..., 0],
    "LVESV": es[..., 0],
    "LVEF": ejected[..., 0],
    "LVM": ed[..., 1] * schema.MYOCARDIUM_G_PER_ML,
    "RVEDV": ed[..., 2],
    "RVESV": es[..., 2],
    "RVEF": ejected[..., 2],
  }
  return np.stack([values[name] for name in PHENOTYPES], axis=-1)


def volumes(labels, spacing):
  """Labels [B, ..., Z, H, W] with the spacing [B, 3] of each row in mm -> ml of LV, MYO, RV [B,
  ..., 3]."""
  counts = []
  for name in CHAMBERS:
    inside = labels == schema.LABELS[name]
    counts.append(inside.sum(axis=(-3, -2, -1)))
  counts = jnp.stack(counts, axis=-1)
  voxel_ml = spacing.prod(axis=-1) / 1000
  return counts * jnp.expand_dims(voxel_ml, tuple(range(1, counts.ndim)))


def sd(x: np.ndarray) -> np.ndarray:
  """SD over the draws [N, S, K] that are known -> [N, K]; 0 of one."""
  known = np.isfinite(x)
  count = known.sum(axis=1)
  mean = np.where(known, x, 0).sum(axis=1) / np.maximum(count, 1)
  squares = np.where(known, x - mean[:, None], 0) ** 2
  return np.sqrt(squares.sum(axis=1) / (np.maximum(count, 2) - 1))


def filled(x: np.ndarray) -> np.ndarray:
  """A heart without a chamber to measure counts as the mean of the others of its kind [..., K]; NaN
  where there are none."""
  known = np.isfinite(x)
  count = known.sum(axis=(0, 1))
  mean = np.where(known, x, 0).sum(axis=(0, 1)) / np.maximum(count, 1)
  return np.where(known, x, np.where(count > 0, mean, np.nan))


def mean_and_draws(values: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
  """Mean of values [N] and its bootstrap draws [R] by weights [R, N]."""
  return values.mean(), weights @ values / weights.sum(axis=1)


def phenotype_scores(
  y: np.ndarray, x: np.ndarray, crps: np.ndarray, weights: np.ndarray
) -> list[dict]:
  """Of each phenotype: R2, bias and SD of the error of the mean of x [N or 1, S, K] against y [N,
  K], and the mean of crps [N, K]; weights [R, N] of the bootstrap."""
  mean = np.broadcast_to(x.mean(axis=1), y.shape)
  r2 = statistics.r2(y, mean)
  r2_draws = statistics.r2(y, mean, weights)
  scores = []
  for k in range(y.shape[1]):
    crps_mean, crps_draws = mean_and_draws(crps[:, k], weights)
    error = mean[:, k] - y[:, k]
    scores.append(
      {
        "r2": float(r2[k]),
        "r2_ci": statistics.interval(r2_draws[:, k]).tolist(),
        "bias": float(error.mean()),
        "sd": float(error.std(ddof=1)),
        "crps": float(crps_mean),
        "crps_ci": statistics.interval(crps_draws).tolist(),
      }
    )
  return scores


def picture_scores(x, labels, real, truth) -> dict[str, float]:
  """Means over subjects: PSNR (dB) and SSIM of x against the real images, where there is one, and
  Dice of its labels."""
  scores = {}
  if x is not None:
    scores["psnr"] = float(images.psnr(x, real).mean())
    scores["ssim"] = float(images.ssim(x, real).mean())
  known = truth.any(axis=(1, 2, 3, 4))  # nobody has drawn the others
  for name in CHAMBERS:
    dice = np.nan
    if known.any():
      dice = np.nanmean(images.dice(labels[known], truth[known], schema.LABELS[name]))
    scores[f"dice_{name}"] = float(dice)
  return scores


def memorisation(drawn: np.ndarray, real: np.ndarray, train: np.ndarray) -> dict[str, float]:
  """Distance of latents to the nearest of train: of draws, and of real hearts of test, which nobody
  can have memorised.

  `closer` is the share of draws that lie nearer than all but 1 % of the real hearts: 0.01 of draws
  from the true distribution, near 1 of copies.
  """
  of_drawn = cdist(drawn, train).min(axis=1)
  of_real = cdist(real, train).min(axis=1)
  return {
    "nearest_drawn": float(np.median(of_drawn)),
    "nearest_real": float(np.median(of_real)),
    "closer": float((of_drawn < np.quantile(of_real, 0.01)).mean()),
  }
