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
    """Volume of a voxel."""
    thickness, height, width = self.spacing
    return thickness * height * width / 1000


FRAMES = 25
LENGTH_TO_DIAMETER = 1.7  # of the LV cavity at ED
# the base plane cuts the ellipsoid this share of its half-length above the centre
_CUT = 0.30
_FILL = 2 / 3 + _CUT - _CUT**3 / 3  # volume of the cut ellipsoid / (pi radius^2 half-length)

# Share of the stroke volume ejected over one beat: systole, fast filling, diastasis, atrial kick.
_EJECTION = {  # share of the beat -> share ejected
  0: 0,
  0.04: 0.02,
  0.12: 0.30,
  0.20: 0.70,
  0.30: 0.96,
  0.36: 1,
  0.42: 0.93,
  0.50: 0.55,
  0.58: 0.32,
  0.68: 0.22,
  0.80: 0.18,
  0.90: 0.06,
  1: 0,
}
_share_ejected = PchipInterpolator(list(_EJECTION), list(_EJECTION.values()))
EJECTED = _share_ejected(np.arange(FRAMES) / FRAMES)
ES = 9  # the frame where all is ejected

# Signal of a balanced steady-state sequence in arbitrary units; assumption.
_LUNG = 25.0
_LIVER = 95.0
_FAT = 165.0
_MUSCLE = 70.0
_BLOOD = 205.0
_MYOCARDIUM = 85.0
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
  pose, fields, _, labels = _end_phases(phenotypes, rng, grid)
  middle = _middle_slice(labels)
  areas = np.stack([_areas(phase[middle]) for phase in labels])
  cine_fields = _between(fields[:, :, middle])
  cine_labels = []
  for frame, voxels in enumerate(_counts_of_frames(areas)):
    cine_labels.append(label(cine_fields[:, frame], np.True_, voxels))
  cine_labels = np.stack(cine_labels)

  tissue = sample_tissue(pose, rng)
  stack = image(labels, fields, tissue, rng, grid)
  cine = image(
    cine_labels[:, None],
    cine_fields[:, :, None],
    tissue[:, middle : middle + 1],
    rng,
    grid,
  )
  scale = 255 / stack.max()
  return _grey(stack, scale), labels, _grey(cine[:, 0], scale)


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
  labels = np.empty((FRAMES, *ends.shape[1:]), np.uint8)
  images = np.empty_like(labels)
  voxels = _counts_of_frames(counts)
  for i, ejected in enumerate(EJECTED.astype(np.float32)):
    between = (1 - ejected) * fields[:, 0] + ejected * fields[:, 1]
    below_base = pose.depth > ejected * pose.descent
    labels[i] = label(between, below_base, voxels[i])
    if ejected in (0, 1):
      frame = stack[int(ejected)]
    else:
      (frame,) = image(labels[i : i + 1], between[:, None], tissue, rng, grid)
    images[i] = _grey(frame, scale)
  return images, labels


def long_axis(
  phenotypes: dict,
  rng: np.random.Generator,
  plane_rng: np.random.Generator,
  grid: Grid = Grid(),
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
  surfaces = _surfaces(stack_fields, stack_labels)
  pose = sample_plane(pose, plane_rng, grid)
  fields = _end_gauges(pose, _volumes(phenotypes))  # [3, P, 1, H, W]
  areas = np.zeros((2, 3))
  for phase, descent in enumerate((0.0, pose.descent)):
    free = pose.depth > descent
    for k in range(3):
      inside = free & (fields[k, phase] <= surfaces[k, phase])
      areas[phase, k] = inside.sum()
      free &= ~inside
  beat = _between(fields)  # [3, F, 1, H, W]
  descents = EJECTED.astype(np.float32) * pose.descent
  labels = []
  for frame, voxels in enumerate(_counts_of_frames(areas)):
    labels.append(label(beat[:, frame], pose.depth > descents[frame], voxels))
  labels = np.stack(labels)
  tissue = sample_tissue(pose, plane_rng)
  images = image(labels, beat, tissue, plane_rng, grid)[:, 0]
  return _grey(images, 255 / images.max()), labels[:, 0]


def _grey(images, scale):
  scaled = np.minimum(images * scale, 255)
  return np.rint(scaled).astype(np.uint8)


def _volumes(phenotypes):
  """[P, 3] of LV, wall and RV in ml."""
  wall = phenotypes["LVM"] / schema.MYOCARDIUM_G_PER_ML
  return np.array(
    [
      (phenotypes["LVEDV"], wall, phenotypes["RVEDV"]),
      (phenotypes["LVESV"], wall, phenotypes["RVESV"]),
    ]
  )


def _end_phases(phenotypes, rng, grid):
  """(pose, gauges [3, P, Z, H, W], voxels of each structure [P, 3], labels [P, Z, H, W]) at ED and
  ES."""
  volumes = _volumes(phenotypes)
  pose = sample_pose(volumes[0, 0], rng, grid)
  fields = _end_gauges(pose, volumes)
  counts = np.round(volumes / grid.millilitres).astype(int)
  labels = []
  for phase, descent in enumerate((0.0, pose.descent)):
    below_base = pose.depth > descent
    labels.append(label(fields[:, phase], below_base, counts[phase]))
  return pose, fields, counts, np.stack(labels)


def _end_gauges(pose, volumes):
  """Gauges [3, P, Z, H, W] at ED and ES, of volumes [P, 3] in ml."""
  ed = gauges(pose, volumes[0], 0.0)
  es = gauges(pose, volumes[1], pose.descent)
  return np.stack([ed, es], axis=1)


def _between(fields):
  """Gauges [3, F, ...] at every frame, of those at ED and ES [3, P, ...]."""
  axes = tuple(range(1, fields.ndim - 1))
  ejected = np.expand_dims(EJECTED.astype(np.float32), axes)
  ed, es = fields[:, :1], fields[:, 1:]
  return (1 - ejected) * ed + ejected * es


def _counts_of_frames(ends):
  """Voxels int [F, 3] at every frame, of those at ED and ES [2, 3]."""
  ed, es = ends
  ejected = EJECTED[:, None]
  return np.round(ed + ejected * (es - ed)).astype(int)


def _middle_slice(labels):
  """The middle of the slices that show the LV at both phases."""
  with_lv = (labels == schema.LABELS["LV"]).any(axis=(2, 3))
  slices = np.flatnonzero(with_lv.all(axis=0))
  return slices[len(slices) // 2]


def _areas(labels):
  """Pixels [3] of LV, wall and RV."""
  return np.array([np.sum(labels == value) for value in (1, 2, 3)])


def _surfaces(fields, labels):
  """[3, P]: the largest gauge inside each structure at each phase."""
  surfaces = np.empty((3, 2))
  for k, field in enumerate(fields):
    for phase in (0, 1):
      inside = labels[phase] == k + 1
      surfaces[k, phase] = field[phase][inside].max()
  return surfaces


def sample_pose(lvedv: float, rng: np.random.Generator, grid: Grid) -> Pose:
  """A heart of this LVEDV (ml) about the centre of the grid: shifted, turned, tilted and bent a
  little."""
  ratio = 2 * LENGTH_TO_DIAMETER / (1 + _CUT)  # half-length to radius
  volume = 1000 * lvedv  # mm3
  radius = (volume / (np.pi * ratio * _FILL)) ** (1 / 3)
  length = (1 + _CUT) * ratio * radius
  z = np.arange(grid.slices, dtype=np.float32) * grid.spacing[0]
  z = z[:, None, None]
  # mm above the base; the wall needs room below the apex
  top = (z.max() - length) / 2 - 5 + 3 * rng.standard_normal()
  depth = z - max(top, 0.0)
  # the stack is not quite perpendicular
  from_middle = depth - length / 2
  tilt = 0.05 * rng.standard_normal((2, 1, 1, 1)) * from_middle
  # mm; the RV needs room beside the LV
  shift = 4 * rng.standard_normal(2) + (0, 0.45 * radius)
  y, x = _positions(grid)
  y = y - shift[0] - tilt[0]
  x = x - shift[1] - tilt[1]
  # the RV lies left of the LV and above: to the front
  turn = np.radians(20 + 10 * rng.standard_normal())
  cosine = np.cos(turn)
  sine = np.sin(turn)
  septal = -cosine * x - sine * y
  across = sine * x - cosine * y
  septal = septal.astype(np.float32)
  across = across.astype(np.float32)
  bend = []
  for count, sd in ((2, 0.03), (3, 0.02)):
    amplitude = sd * rng.standard_normal()
    phase = np.float32(rng.uniform(0, 2 * np.pi))
    bend.append((count, amplitude, phase))
  wide = 0.88 * np.exp(0.05 * rng.standard_normal())
  high = 1.42 * np.exp(0.05 * rng.standard_normal())
  return Pose(
    rho=_rho(septal, across, bend),
    septal=septal,
    across=across,
    depth=depth,
    length=length,
    descent=rng.uniform(10, 14),
    rv=(wide, high),
    bend=tuple(bend),
  )


def sample_plane(pose: Pose, rng: np.random.Generator, grid: Grid) -> Pose:
  """The same heart where `across` is 0, one plane [1, H, W]; turned and shifted in the image, the
  atria have room."""
  y, x = _positions(grid)
  # mm, as in the stack
  room = 0.45 * pose.length / (2 * LENGTH_TO_DIAMETER)
  shift = 4 * rng.standard_normal(2) + (0, room)
  turn = np.radians(10 * rng.standard_normal())
  cosine = np.cos(turn)
  sine = np.sin(turn)
  y = y - shift[0]
  x = x - shift[1]
  septal = -cosine * x - sine * y
  septal = septal.astype(np.float32)[None]
  depth = cosine * y - sine * x + pose.length / 2 - 10
  across = np.zeros_like(septal)
  return pose._replace(
    rho=_rho(septal, across, pose.bend),
    septal=septal,
    across=across,
    depth=depth.astype(np.float32)[None],
  )


def _positions(grid):
  """mm of the pixels from the centre, (rows [H, 1], columns [1, W])."""
  middle = (grid.size - 1) / 2
  offsets = np.arange(grid.size) - middle
  _, height, width = grid.spacing
  y = offsets * height
  x = offsets * width
  return y[:, None], x[None]


def _rho(septal, across, bend):
  """mm from the long axis, bent."""
  angle = np.arctan2(across, septal)
  waves = 0
  for count, amplitude, phase in bend:
    waves = waves + amplitude * np.cos(count * angle + phase)
  bent = (1 + waves).astype(np.float32)
  return np.hypot(septal, across) * bent


def gauges(pose: Pose, volumes: np.ndarray, descent: float) -> np.ndarray:
  """Gauges of LV (1 at its surface), wall (mm outside the LV, to first order) and RV; float32 [3,
  Z, H, W].

  Args:
    volumes: [3] of LV, wall and RV in ml.
    descent: mm that the base plane has moved; the apex of the cavity stays where it is.
  """
  half = (pose.length - descent) / (1 + _CUT)
  inside_wall = 1000 * np.cumsum(volumes[:2])  # mm3: within the endocardium, the epicardium
  areas = inside_wall / (np.pi * half * _FILL)
  endo, epi = np.sqrt(areas)  # radii in mm
  centre = descent + _CUT * half
  along = (pose.depth - centre) / half
  out = pose.rho / endo
  lv = np.sqrt(out**2 + along**2)
  steepness = np.sqrt((out / endo) ** 2 + (along / half) ** 2)
  slope = steepness / np.maximum(lv, 1e-3)  # 1/mm
  wall = (lv - 1) / np.maximum(slope, 1e-3)
  septal = (pose.septal - 0.85 * epi) / (epi * pose.rv[0])
  across = pose.across / (epi * pose.rv[1])
  below = (pose.depth - descent - 0.15 * half) / (0.95 * half)
  rv = np.sqrt(septal**2 + across**2 + below**2)
  return np.stack([lv, wall, rv]).astype(np.float32)


def label(fields: np.ndarray, allowed: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Labels uint8 [...]: LV, MYO and RV in turn take the counts [3] allowed free voxels of smallest
  gauge [3, ...]."""
  labels = np.zeros(fields.shape[1:], np.uint8)
  for name, field, count in zip(("LV", "MYO", "RV"), fields, counts):
    free = (labels == 0) & allowed
    gauge = np.where(free, field, np.inf).ravel()
    smallest = np.argpartition(gauge, count)[:count]
    labels.ravel()[smallest] = schema.LABELS[name]
  return labels


def sample_tissue(pose: Pose, rng: np.random.Generator) -> np.ndarray:
  """What a heart lies in, float32 [5, Z, H, W]: signal of the surroundings, coil sensitivity, mm to
  the long axis along and across the septal direction, and 0 at the base to 1 at the apex of the
  cavity."""
  left = pose.septal
  front = 0.35 * pose.septal + 0.94 * pose.across
  level = np.broadcast_to(pose.depth / pose.length, left.shape)
  below_diaphragm = -pose.across + 0.4 * left - 0.004 * left**2 - 44 + 12 * level
  liver = expit(0.5 * below_diaphragm)
  # mm outside the curved inner surface of the chest
  outward = front + 0.005 * (left - 25) ** 2 - 60
  phase = rng.uniform(0, 6)
  ribs = np.sin(left / 11 + phase)
  chest = expit(0.5 * (outward + 1.5 * ribs))
  layers = 0.5 + 0.5 * np.sin(outward / 4.5)
  chest_signal = _MUSCLE + (_FAT - _MUSCLE) * layers
  signal = _LUNG + (_LIVER - _LUNG) * liver
  signal += (chest_signal - signal) * chest
  to_left, to_front = rng.normal(0, 0.0012, 2)
  falloff = to_left * left + to_front * pose.across + 0.002 * front
  coil = np.exp(falloff)
  tissue = [signal, coil, pose.septal, pose.across, level]
  return np.stack(tissue).astype(np.float32)


def image(
  labels: np.ndarray,
  fields: np.ndarray,
  tissue: np.ndarray,
  rng: np.random.Generator,
  grid: Grid,
) -> np.ndarray:
  """Magnitude images, float32 [P, Z, H, W], of labels [P, Z, H, W] with their gauges [3, P, Z, H,
  W]."""
  background, coil, septal, across, level = tissue
  lv_gauge, _, rv_gauge = fields
  lv = labels == schema.LABELS["LV"]
  wall = labels == schema.LABELS["MYO"]
  rv = labels == schema.LABELS["RV"]
  surface = np.max(rv_gauge, axis=(1, 2, 3), keepdims=True, where=rv, initial=0)
  # pericardial fat, RV free wall and, above the base plane, atria and outflow tract
  signal = np.where(rv_gauge < 1.16 * surface, _FAT * 0.8, background)
  signal = np.where(rv_gauge < 1.08 * surface, _MYOCARDIUM, signal)
  above_base = (rv_gauge < 0.8 * surface) | (lv_gauge < 0.85)
  signal = np.where(above_base, _BLOOD * 0.95, signal)
  signal = np.where(wall, _MYOCARDIUM, signal)
  signal = np.where(lv | rv, _BLOOD, signal)

  _, height, width = grid.spacing
  area = lv.sum(axis=(2, 3), keepdims=True) * height * width
  radius = np.sqrt(area / np.pi)
  muscular = lv & (level > 0.3) & (level < 0.75)
  for angle in (2.0, 4.2):  # anterolateral and posteromedial papillary muscle, rad from the septum
    beside = septal - 0.66 * radius * np.cos(angle)
    in_front = across - 0.66 * radius * np.sin(angle)
    papillary = muscular & (np.hypot(beside, in_front) < 3.8)
    signal = np.where(papillary, _MYOCARDIUM, signal)
  for axis, mm in ((2, height), (3, width)):
    signal = gaussian_filter1d(signal.astype(np.float32), 1.6 / mm, axis)  # partial volume
  noise = rng.standard_normal((2, *labels.shape), np.float32)
  real, imaginary = np.float32(_NOISE) * noise
  return np.hypot(signal * coil + real, imaginary)  # Rician
