"""Phenotypes measured on label maps: the same numbers from a reader's segmentation and from the
synthetic heart."""

import numpy as np

from mmcl_jax.data import schema

_LV, _MYO, _RV = (schema.LABELS[name] for name in ("LV", "MYO", "RV"))


def phenotypes(labels: np.ndarray, spacing: np.ndarray, heart_rate: float) -> dict[str, float]:
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
  millilitres = volumes(labels, spacing).T
  (lvedv, lvesv), (wall, _), (rvedv, rvesv) = np.where(
    millilitres > 0, millilitres, np.nan
  ).tolist()

  closed = closed_rings(labels)
  pixel = float(spacing[1]) * float(spacing[2])
  lv, myo = (np.sum(labels == label, axis=(2, 3)) for label in (_LV, _MYO))
  endo, epi = (np.sqrt(area * pixel / np.pi) for area in (lv, lv + myo))  # [P, Z], mm
  middle = _middle_third(np.flatnonzero(closed.all(axis=0)))
  mid_wall = (endo + epi)[:, middle] / 2
  values = {
    "LVEDV": lvedv,
    "LVESV": lvesv,
    "LVSV": lvedv - lvesv,
    "LVEF": 100 * (lvedv - lvesv) / lvedv,
    "LVCO": (lvedv - lvesv) * float(heart_rate) / 1000,
    "LVM": wall * schema.MYOCARDIUM_G_PER_ML,
    "RVEDV": rvedv,
    "RVESV": rvesv,
    "RVSV": rvedv - rvesv,
    "RVEF": 100 * (rvedv - rvesv) / rvedv,
    "WT": float(np.mean((epi - endo)[0, closed[0]])) if closed[0].any() else np.nan,
    "Ecc": float(np.mean(100 * (mid_wall[1] / mid_wall[0] - 1))) if middle.size else np.nan,
  }
  return {name: values[name] for name in schema.PHENOTYPES}


def volumes(labels: np.ndarray, spacing) -> np.ndarray:
  """Of LV, MYO and RV in ml, float64 [F, 3], from labels [F, Z, H, W]: voxels times the product of
  `spacing` (mm)."""
  counts = np.stack(
    [np.count_nonzero(labels == label, axis=(1, 2, 3)) for label in (_LV, _MYO, _RV)], axis=1
  )
  return counts * (float(np.prod(spacing, dtype=np.float64)) / 1000)


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
  inside, beyond = labels == label, len(schema.LABELS)
  padded = np.pad(labels, [(0, 0)] * (labels.ndim - 2) + [(1, 1), (1, 1)], constant_values=beyond)
  on_myocardium = elsewhere = 0
  for neighbour in (
    padded[..., 2:, 1:-1],
    padded[..., :-2, 1:-1],
    padded[..., 1:-1, 2:],
    padded[..., 1:-1, :-2],
  ):
    myocardium = neighbour == _MYO
    on_myocardium = on_myocardium + np.count_nonzero(inside & myocardium, axis=(-2, -1))
    elsewhere = elsewhere + np.count_nonzero(
      inside & ~myocardium & (neighbour != label), axis=(-2, -1)
    )
  return on_myocardium, elsewhere


def _middle_third(slices: np.ndarray) -> np.ndarray:
  third = len(slices) // 3
  return slices[third : len(slices) - third]
