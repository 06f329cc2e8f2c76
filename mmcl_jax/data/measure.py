"""Phenotypes measured on label maps: the same numbers from a reader's segmentation and from the
synthetic heart."""

import numpy as np

from mmcl_jax.data import schema

_LV = schema.LABELS["LV"]
_MYO = schema.LABELS["MYO"]
_RV = schema.LABELS["RV"]


def phenotypes(
  labels: np.ndarray,
  spacing: np.ndarray,
  heart_rate: float,
) -> dict[str, float]:
  """All of schema.PHENOTYPES, in its order and units; NaN where the labels do not allow a
  measurement.

  Volumes are voxel counts times the voxel volume (papillary muscles belong to whatever the labels
  say). LVM is the myocardial volume at ED times 1.05 g/ml. EF = 100 SV / EDV, SV = EDV - ESV, CO =
  SV * heart_rate / 1000. WT and Ecc follow from areas of rings, A_endo = LV and A_epi = LV + MYO,
  with r = sqrt(A / pi):
    WT:  mean over the slices with a closed ring at ED of r_epi - r_endo.
    Ecc: mean over mid slices of 100 (c_ES / c_ED - 1), c = (r_epi + r_endo) / 2 being the mid-wall
      radius, which has the ratio of the circumference. Mid slices are the middle third of those
      with a closed ring at both phases.

  Args:
    labels: uint8 [2, Z, H, W], ED then ES.
    spacing: [3], mm along Z, H, W.
    heart_rate: bpm; NaN if unknown.
  """
  ml = volumes(labels, spacing)
  ed, es = np.where(ml > 0, ml, np.nan).tolist()
  lvedv, wall, rvedv = ed
  lvesv, _, rvesv = es
  lvsv = lvedv - lvesv
  rvsv = rvedv - rvesv

  _, height, width = map(float, spacing)
  endo, epi = _radii(labels, height * width)
  closed = closed_rings(labels)  # [P, Z]
  closed_at_ed, _ = closed
  thickness_at_ed, _ = epi - endo
  thickness = thickness_at_ed[closed_at_ed]
  closed_at_both = np.flatnonzero(closed.all(axis=0))
  middle = _middle_third(closed_at_both)
  mid_wall = (endo + epi) / 2
  mid_wall_ed, mid_wall_es = mid_wall[:, middle]
  shortening = 100 * (mid_wall_es / mid_wall_ed - 1)
  values = {
    "LVEDV": lvedv,
    "LVESV": lvesv,
    "LVSV": lvsv,
    "LVEF": 100 * lvsv / lvedv,
    "LVCO": lvsv * float(heart_rate) / 1000,
    "LVM": wall * schema.MYOCARDIUM_G_PER_ML,
    "RVEDV": rvedv,
    "RVESV": rvesv,
    "RVSV": rvsv,
    "RVEF": 100 * rvsv / rvedv,
    "WT": _mean(thickness),
    "Ecc": _mean(shortening),
  }
  return {name: values[name] for name in schema.PHENOTYPES}


def _mean(values):
  """NaN of none, without a warning."""
  if not values.size:
    return np.nan
  return float(np.mean(values))


def _radii(labels, pixel_mm2):
  """(endocardial, epicardial) radii of circles of the areas in each slice, float64 [P, Z] in mm."""
  cavity = np.sum(labels == _LV, axis=(2, 3))
  wall = np.sum(labels == _MYO, axis=(2, 3))
  within_epi = cavity + wall
  endo = np.sqrt(cavity * pixel_mm2 / np.pi)
  epi = np.sqrt(within_epi * pixel_mm2 / np.pi)
  return endo, epi


def volumes(labels: np.ndarray, spacing) -> np.ndarray:
  """Of LV, MYO and RV in ml, float64 [F, 3], from labels [F, Z, H, W]: voxels times the product of
  `spacing` (mm)."""
  counts = []
  for label in (_LV, _MYO, _RV):
    inside = labels == label
    counts.append(np.count_nonzero(inside, axis=(1, 2, 3)))
  voxel_mm3 = np.prod(spacing, dtype=np.float64)
  voxel_ml = float(voxel_mm3) / 1000
  return np.stack(counts, axis=1) * voxel_ml


def closed_rings(labels: np.ndarray) -> np.ndarray:
  """Slices whose cavity myocardium encloses: no LV pixel with a 4-neighbour other than LV or MYO,
  or none at the edge.

  Args:
    labels: [..., H, W].

  Returns:
    bool [...]; False where a slice has no LV pixel.
  """
  on_myocardium, elsewhere = borders(labels, _LV)
  return (elsewhere == 0) & (on_myocardium > 0)


def borders(labels: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
  """Length of a structure's in-plane border in pixel edges: on myocardium, and on all else or the
  end of the image.

  Args:
    labels: [..., H, W].
    label: the structure, not myocardium.

  Returns:
    int [...] and int [...], of each slice.
  """
  inside = labels == label
  beyond = len(schema.LABELS)  # a label that there is not
  margins = np.zeros((labels.ndim, 2), int)
  margins[-2:] = 1  # pixels round each slice
  padded = np.pad(labels, margins, constant_values=beyond)
  neighbours = (
    padded[..., 2:, 1:-1],
    padded[..., :-2, 1:-1],
    padded[..., 1:-1, 2:],
    padded[..., 1:-1, :-2],
  )
  on_myocardium = 0
  elsewhere = 0
  for neighbour in neighbours:
    to_myocardium = inside & (neighbour == _MYO)
    leaving = inside & (neighbour != label)
    to_other = leaving & ~to_myocardium
    on_myocardium = on_myocardium + np.count_nonzero(to_myocardium, axis=(-2, -1))
    elsewhere = elsewhere + np.count_nonzero(to_other, axis=(-2, -1))
  return on_myocardium, elsewhere


def _middle_third(slices: np.ndarray) -> np.ndarray:
  third = len(slices) // 3
  return slices[third : len(slices) - third]
