"""A heart in short axis and long axis with labels: LV, myocardium and RV whose voxel counts are the
target volumes.

Every structure has a gauge, a smooth field that grows from its inside to its outside. A structure
of n voxels is the n voxels of smallest gauge, so that hard labels have the target volume to half a
voxel on any grid. The LV cavity is a prolate ellipsoid cut by the base plane; the wall is a shell
of even thickness; the RV is a larger ellipsoid on the septal side, less the LV. Papillary muscles
count to the cavity (Petersen 2017, JCMR 19:18): only the image shows them.
"""

from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d
from scipy.special import expit

from mmcl_jax.data import schema


class Grid(NamedTuple):
  slices: int = 12
  size: int = 64  # H = W
  spacing: tuple[float, float, float] = (10.0, 2.5, 2.5)  # mm along Z (base to apex), H, W

  @property
  def millilitres(self) -> float:
    return self.spacing[0] * self.spacing[1] * self.spacing[2] / 1000


FRAMES = 25
LENGTH_TO_DIAMETER = 1.7  # of the LV cavity at ED
# the base plane cuts the ellipsoid this share of its half-length above the centre
_CUT = 0.30
_FILL = 2 / 3 + _CUT - _CUT**3 / 3  # volume of the cut ellipsoid / (pi radius^2 half-length)

# Share of the stroke volume ejected over one beat: systole, fast filling, diastasis, atrial kick.
EJECTED = PchipInterpolator(
  [0, 0.04, 0.12, 0.20, 0.30, 0.36, 0.42, 0.50, 0.58, 0.68, 0.80, 0.90, 1],
  [0, 0.02, 0.30, 0.70, 0.96, 1, 0.93, 0.55, 0.32, 0.22, 0.18, 0.06, 0],
)(np.arange(FRAMES) / FRAMES)
ES = 9  # the frame where all is ejected

# Signal of a balanced steady-state sequence in arbitrary units; assumption.
_LUNG, _LIVER, _FAT, _MUSCLE, _BLOOD, _MYOCARDIUM = 25.0, 95.0, 165.0, 70.0, 205.0, 85.0
_NOISE = 6.0


class Pose(NamedTuple):
  """One heart's place and shape in the grid, the same at every phase."""

  rho: np.ndarray  # [Z, H, W] mm from the long axis, bent by the shape of this heart
  septal: np.ndarray  # [Z, H, W] mm from the long axis towards the RV
  across: np.ndarray  # [Z, H, W] mm perpendicular to `septal`
  depth: np.ndarray  # [Z, 1, 1] mm below the base plane at ED
  length: float  # mm, of the LV cavity at ED
  descent: float  # mm that the base plane has moved towards the apex at ES
  # semi-axes of the RV along `septal` and `across`, relative to the LV epicardium's radius
  rv: tuple[float, float]
  # waves of `rho` around the axis: count, amplitude, phase
  bend: tuple[tuple[int, float, float], ...]


def heart(
  phenotypes: dict, rng: np.random.Generator, grid: Grid = Grid()
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Images and labels of one heart.

  Args:
    phenotypes: LVEDV, LVESV, RVEDV, RVESV in ml and LVM in g.
    rng: for position, shape, texture and noise.
    grid: of the short-axis stack.

  Returns:
    ed_es_volumes: uint8 [2, Z, H, W].
    labels: uint8 [2, Z, H, W]. The wall has one volume at both phases, for muscle is
      incompressible.
    cine_slice: uint8 [FRAMES, H, W], the mid-ventricular slice; frame 0 = ED.
  """
  pose, fields, counts, labels = _end_phases(phenotypes, rng, grid)
  slices = np.flatnonzero((labels == schema.LABELS["LV"]).any(axis=(2, 3)).all(axis=0))
  middle = slices[len(slices) // 2]
  areas = np.stack([(labels[:, middle] == k).sum(axis=(1, 2)) for k in (1, 2, 3)], axis=1)  # [P, 3]
  cine_counts = np.round(areas[0] + EJECTED[:, None] * (areas[1] - areas[0])).astype(int)
  f = EJECTED[:, None, None].astype(np.float32)
  cine_fields = (1 - f) * fields[:, :1, middle] + f * fields[:, 1:, middle]  # [3, F, H, W]
  cine_labels = np.stack([label(cine_fields[:, i], np.True_, n) for i, n in enumerate(cine_counts)])

  tissue = sample_tissue(pose, rng)
  stack = image(labels, fields, tissue, rng, grid)
  cine = image(
    cine_labels[:, None], cine_fields[:, :, None], tissue[:, middle : middle + 1], rng, grid
  )[:, 0]
  scale = 255 / stack.max()
  return (
    np.rint(stack * scale).astype(np.uint8),
    labels,
    np.rint(np.minimum(cine * scale, 255)).astype(np.uint8),
  )


def cine_stack(
  phenotypes: dict, rng: np.random.Generator, grid: Grid = Grid()
) -> tuple[np.ndarray, np.ndarray]:
  """The whole beat of the heart that `heart` makes of the same arguments.

  Returns:
    images: uint8 [FRAMES, Z, H, W]; frames 0 and 9 are `ed_es_volumes`.
    labels: uint8 [FRAMES, Z, H, W]; frames 0 and 9 are `labels`. Volumes go between them as EJECTED
      says.
  """
  pose, fields, counts, ends = _end_phases(phenotypes, rng, grid)
  tissue = sample_tissue(pose, rng)
  stack = image(ends, fields, tissue, rng, grid)
  scale = 255 / stack.max()
  labels, images = (np.empty((FRAMES, *ends.shape[1:]), np.uint8) for _ in range(2))
  for i, f in enumerate(EJECTED.astype(np.float32)):
    between = (1 - f) * fields[:, 0] + f * fields[:, 1]
    volumes = np.round(counts[0] + EJECTED[i] * (counts[1] - counts[0])).astype(int)
    labels[i] = label(between, pose.depth > f * pose.descent, volumes)
    shown = (
      stack[int(f)]
      if f in (0, 1)
      else image(labels[i : i + 1], between[:, None], tissue, rng, grid)[0]
    )
    images[i] = np.rint(np.minimum(shown * scale, 255))
  return images, labels


def long_axis(
  phenotypes: dict, rng: np.random.Generator, plane_rng: np.random.Generator, grid: Grid = Grid()
) -> tuple[np.ndarray, np.ndarray]:
  """One beat of the heart that `heart` makes of `phenotypes` and `rng`, in the plane of its long
  axis and its septum.

  About a four-chamber view: base above, RV left, LV right, septum between; above the base plane the
  atria.

  Args:
    plane_rng: for place and turn of the plane's field of view, and for noise.
    grid: of the short-axis stack; the plane has its rows, columns and pixels.

  Returns:
    images: uint8 [FRAMES, H, W], frame 0 = ED, frame ES = ES.
    labels: uint8 [FRAMES, H, W]; each structure ends where it ends in the stack.
  """
  pose, stack_fields, _, stack_labels = _end_phases(phenotypes, rng, grid)
  surfaces = np.stack(
    [
      [field[p][stack_labels[p] == k].max() for p in (0, 1)]
      for k, field in enumerate(stack_fields, 1)
    ]
  )  # [3, P]
  pose = sample_plane(pose, plane_rng, grid)
  descents = (0.0, pose.descent)
  # [3, P, 1, H, W]
  fields = np.stack([gauges(pose, v, d) for v, d in zip(_volumes(phenotypes), descents)], axis=1)
  areas = np.zeros((2, 3))
  for p in (0, 1):
    free = pose.depth > descents[p]
    for k in range(3):
      found = free & (fields[k, p] <= surfaces[k, p])
      areas[p, k] = found.sum()
      free &= ~found
  counts = np.round(areas[0] + EJECTED[:, None] * (areas[1] - areas[0])).astype(int)
  f = EJECTED[:, None, None, None].astype(np.float32)
  beat = (1 - f) * fields[:, :1] + f * fields[:, 1:]  # [3, F, 1, H, W]
  labels = np.stack(
    [label(beat[:, i], pose.depth > f[i] * pose.descent, n) for i, n in enumerate(counts)]
  )
  shown = image(labels, beat, sample_tissue(pose, plane_rng), plane_rng, grid)[:, 0]
  return np.rint(shown * (255 / shown.max())).astype(np.uint8), labels[:, 0]


def _volumes(phenotypes):
  """[P, 3] of LV, wall and RV in ml."""
  wall = phenotypes["LVM"] / schema.MYOCARDIUM_G_PER_ML
  return np.array([(phenotypes[f"LV{p}V"], wall, phenotypes[f"RV{p}V"]) for p in ("ED", "ES")])


def _end_phases(phenotypes, rng, grid):
  """(pose, gauges [3, P, Z, H, W], voxels of each structure [P, 3], labels [P, Z, H, W]) at ED and
  ES."""
  volumes = _volumes(phenotypes)
  pose = sample_pose(volumes[0, 0], rng, grid)
  descents = (0.0, pose.descent)
  fields = np.stack([gauges(pose, v, d) for v, d in zip(volumes, descents)], axis=1)
  counts = np.round(volumes / grid.millilitres).astype(int)
  labels = np.stack([label(fields[:, p], pose.depth > descents[p], counts[p]) for p in (0, 1)])
  return pose, fields, counts, labels


def sample_pose(lvedv: float, rng: np.random.Generator, grid: Grid) -> Pose:
  """A heart of this LVEDV (ml) about the centre of the grid: shifted, turned, tilted and bent a
  little."""
  ratio = 2 * LENGTH_TO_DIAMETER / (1 + _CUT)  # half-length to radius
  radius = (1000 * lvedv / (np.pi * ratio * _FILL)) ** (1 / 3)
  length = (1 + _CUT) * ratio * radius
  z = np.arange(grid.slices, dtype=np.float32)[:, None, None] * grid.spacing[0]
  # mm above the base; the wall needs room below the apex
  top = (z.max() - length) / 2 - 5 + 3 * rng.standard_normal()
  depth = z - max(top, 0.0)
  # the stack is not quite perpendicular
  tilt = 0.05 * rng.standard_normal((2, 1, 1, 1)) * (depth - length / 2)
  # mm; the RV needs room beside the LV
  shift = 4 * rng.standard_normal(2) + (0, 0.45 * radius)
  position = [(np.arange(grid.size) - (grid.size - 1) / 2) * mm for mm in grid.spacing[1:]]
  y = position[0][:, None] - shift[0] - tilt[0]
  x = position[1][None, :] - shift[1] - tilt[1]
  # the RV lies left of the LV and above: to the front
  turn = np.radians(20 + 10 * rng.standard_normal())
  septal = (-np.cos(turn) * x - np.sin(turn) * y).astype(np.float32)
  across = (np.sin(turn) * x - np.cos(turn) * y).astype(np.float32)
  bend = tuple(
    (k, sd * rng.standard_normal(), np.float32(rng.uniform(0, 2 * np.pi)))
    for k, sd in ((2, 0.03), (3, 0.02))
  )
  rv = 0.88 * np.exp(0.05 * rng.standard_normal()), 1.42 * np.exp(0.05 * rng.standard_normal())
  return Pose(
    _rho(septal, across, bend), septal, across, depth, length, rng.uniform(10, 14), rv, bend
  )


def sample_plane(pose: Pose, rng: np.random.Generator, grid: Grid) -> Pose:
  """The same heart where `across` is 0, one plane [1, H, W]; turned and shifted in the image, the
  atria have room."""
  y, x = ((np.arange(grid.size) - (grid.size - 1) / 2) * mm for mm in grid.spacing[1:])
  # mm, as in the stack
  shift = 4 * rng.standard_normal(2) + (0, 0.45 * pose.length / (2 * LENGTH_TO_DIAMETER))
  turn = np.radians(10 * rng.standard_normal())
  y, x = y[:, None] - shift[0], x - shift[1]
  septal = (-np.cos(turn) * x - np.sin(turn) * y).astype(np.float32)[None]
  depth = (np.cos(turn) * y - np.sin(turn) * x + pose.length / 2 - 10).astype(np.float32)[None]
  across = np.zeros_like(septal)
  return pose._replace(
    rho=_rho(septal, across, pose.bend), septal=septal, across=across, depth=depth
  )


def _rho(septal, across, bend):
  """mm from the long axis, bent."""
  angle = np.arctan2(across, septal)
  waves = 1 + sum(amplitude * np.cos(count * angle + phase) for count, amplitude, phase in bend)
  return np.hypot(septal, across) * waves.astype(np.float32)


def gauges(pose: Pose, volumes: np.ndarray, descent: float) -> np.ndarray:
  """Gauges of LV (1 at its surface), wall (mm outside the LV, to first order) and RV; float32 [3,
  Z, H, W].

  Args:
    volumes: [3] of LV, wall and RV in ml.
    descent: mm that the base plane has moved; the apex of the cavity stays where it is.
  """
  half = (pose.length - descent) / (1 + _CUT)
  endo, epi = np.sqrt(1000 * np.cumsum(volumes[:2]) / (np.pi * half * _FILL))
  centre = descent + _CUT * half
  along, out = (pose.depth - centre) / half, pose.rho / endo
  lv = np.sqrt(out**2 + along**2)
  slope = np.sqrt((out / endo) ** 2 + (along / half) ** 2) / np.maximum(lv, 1e-3)  # 1/mm
  wall = (lv - 1) / np.maximum(slope, 1e-3)
  wide, high = epi * pose.rv[0], epi * pose.rv[1]
  rv = np.sqrt(
    ((pose.septal - 0.85 * epi) / wide) ** 2
    + (pose.across / high) ** 2
    + ((pose.depth - descent - 0.15 * half) / (0.95 * half)) ** 2
  )
  return np.stack([lv, wall, rv]).astype(np.float32)


def label(fields: np.ndarray, allowed: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Labels uint8 [...]: LV, MYO and RV in turn take the counts [3] allowed free voxels of smallest
  gauge [3, ...]."""
  labels = np.zeros(fields.shape[1:], np.uint8)
  for value, field, n in zip((schema.LABELS[name] for name in ("LV", "MYO", "RV")), fields, counts):
    gauge = np.where((labels == 0) & allowed, field, np.inf).ravel()
    labels.ravel()[np.argpartition(gauge, n)[:n]] = value
  return labels


def sample_tissue(pose: Pose, rng: np.random.Generator) -> np.ndarray:
  """What a heart lies in, float32 [5, Z, H, W]: signal of the surroundings, coil sensitivity, mm to
  the long axis along and across the septal direction, and 0 at the base to 1 at the apex of the
  cavity."""
  left, front = pose.septal, 0.35 * pose.septal + 0.94 * pose.across
  level = np.broadcast_to(pose.depth / pose.length, left.shape)
  liver = expit(0.5 * (-pose.across + 0.4 * left - 0.004 * left**2 - 44 + 12 * level))
  # mm outside the curved inner surface of the chest
  outward = front + 0.005 * (left - 25) ** 2 - 60
  chest = expit(0.5 * (outward + 1.5 * np.sin(left / 11 + rng.uniform(0, 6))))
  layers = 0.5 + 0.5 * np.sin(outward / 4.5)
  signal = _LUNG + (_LIVER - _LUNG) * liver
  signal += (_MUSCLE + (_FAT - _MUSCLE) * layers - signal) * chest
  direction = rng.normal(0, 0.0012, 2)
  coil = np.exp(direction[0] * left + direction[1] * pose.across + 0.002 * front)
  return np.stack([signal, coil, pose.septal, pose.across, level]).astype(np.float32)


def image(
  labels: np.ndarray, fields: np.ndarray, tissue: np.ndarray, rng: np.random.Generator, grid: Grid
):
  """Magnitude images, float32 [P, Z, H, W], of labels [P, Z, H, W] with their gauges [3, P, Z, H,
  W]."""
  background, coil, septal, across, level = tissue
  lv, _, rv = fields
  surface = np.max(
    rv, axis=(1, 2, 3), keepdims=True, where=labels == schema.LABELS["RV"], initial=0
  )
  # pericardial fat, RV free wall and, above
  signal = np.where(rv < 1.16 * surface, _FAT * 0.8, background)
  # the base plane, atria and outflow tract
  signal = np.where(rv < 1.08 * surface, _MYOCARDIUM, signal)
  signal = np.where((rv < 0.8 * surface) | (lv < 0.85), _BLOOD * 0.95, signal)
  signal = np.where(labels == schema.LABELS["MYO"], _MYOCARDIUM, signal)
  cavity = labels == schema.LABELS["LV"]
  signal = np.where(cavity | (labels == schema.LABELS["RV"]), _BLOOD, signal)

  radius = np.sqrt(
    cavity.sum(axis=(2, 3), keepdims=True) * grid.spacing[1] * grid.spacing[2] / np.pi
  )
  muscular = cavity & (level > 0.3) & (level < 0.75)
  for angle in (2.0, 4.2):  # anterolateral and posteromedial papillary muscle, rad from the septum
    distance = np.hypot(
      septal - 0.66 * radius * np.cos(angle), across - 0.66 * radius * np.sin(angle)
    )
    signal = np.where(muscular & (distance < 3.8), _MYOCARDIUM, signal)
  for axis, mm in ((2, grid.spacing[1]), (3, grid.spacing[2])):
    signal = gaussian_filter1d(signal.astype(np.float32), 1.6 / mm, axis)  # partial volume
  noise = rng.standard_normal((2, *labels.shape), np.float32) * np.float32(_NOISE)
  return np.hypot(signal * coil + noise[0], noise[1])  # Rician
