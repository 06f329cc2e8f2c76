"""A heart in short axis and long axis with labels: LV, myocardium and RV whose voxel counts are the
target volumes.

Every structure has a gauge, a smooth field that grows from its inside to its outside. A structure
of n voxels is the n voxels of smallest gauge, so that hard labels have the target volume to half a
voxel on any grid. The LV cavity is a prolate ellipsoid cut by the base plane; the wall is a shell
of even thickness; the RV is a larger ellipsoid on the septal side, less the LV. Papillary muscles
count to the cavity (Petersen 2017, JCMR 19:18): only the image shows them.

Letters of shapes are those of mmcl_jax.data.schema; an axis of 3 structures is (LV, wall, RV).
"""

from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.ndimage import gaussian_filter1d
from scipy.special import expit

from mmcl_jax.data import schema

_LV = schema.LABELS["LV"]
_MYO = schema.LABELS["MYO"]
_RV = schema.LABELS["RV"]
_STRUCTURES = (_LV, _MYO, _RV)  # in the order of every axis of 3


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
_HALF_LENGTH_TO_RADIUS = 2 * LENGTH_TO_DIAMETER / (1 + _CUT)

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

_BLUR_MM = 1.6  # partial volume
_PAPILLARY_RAD = (2.0, 4.2)  # anterolateral and posteromedial, from the septum
_PAPILLARY_PLACE = 0.66  # of the cavity's radius
_PAPILLARY_MM = 3.8  # their radius
_PAPILLARY_LEVELS = (0.3, 0.75)  # between base (0) and apex (1)


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


class _EndPhases(NamedTuple):
  """A heart at ED and ES."""

  pose: Pose
  fields: np.ndarray  # gauges [P, 3, Z, H, W]
  counts: np.ndarray  # voxels [P, 3]
  labels: np.ndarray  # uint8 [P, Z, H, W]


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
  tissue = sample_tissue(pose, rng)
  stack = image(labels, fields, tissue, rng, grid)

  middle = _middle_slice(labels)
  beat = _between(fields[:, :, [middle]])  # [F, 3, 1, H, W]
  areas = _areas(labels[:, [middle]])
  everywhere = np.ones(FRAMES, bool)
  beat_labels = _label_frames(beat, everywhere, _counts_of_frames(areas))
  cine = image(beat_labels, beat, tissue[:, [middle]], rng, grid)

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
  pose, fields, counts, end_labels = _end_phases(phenotypes, rng, grid)
  tissue = sample_tissue(pose, rng)
  stack = image(end_labels, fields, tissue, rng, grid)
  scale = 255 / stack.max()
  ed, es = fields
  images, labels = [], []
  shares = EJECTED.astype(np.float32)
  for ejected, voxels in zip(shares, _counts_of_frames(counts)):  # one after the other: memory
    gauge = _mixed(ed, es, ejected)
    below_base = pose.depth > ejected * pose.descent
    frame_labels = label(gauge, below_base, voxels)
    if ejected in (0, 1):
      frame = stack[int(ejected)]
    else:
      (frame,) = image(frame_labels[None], gauge[None], tissue, rng, grid)
    labels.append(frame_labels)
    images.append(_grey(frame, scale))
  return np.stack(images), np.stack(labels)


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
  fields = _end_gauges(pose, _volumes(phenotypes))  # [P, 3, 1, H, W]
  areas = _areas_within(surfaces, fields, pose)

  beat = _between(fields)  # [F, 3, 1, H, W]
  descents = EJECTED.astype(np.float32) * pose.descent
  below_base = [pose.depth > descent for descent in descents]
  labels = _label_frames(beat, below_base, _counts_of_frames(areas))
  tissue = sample_tissue(pose, plane_rng)
  images = image(labels, beat, tissue, plane_rng, grid)
  scale = 255 / images.max()
  return _grey(images[:, 0], scale), labels[:, 0]


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
  volumes = _volumes(phenotypes)
  lvedv = volumes[0, 0]
  pose = sample_pose(lvedv, rng, grid)
  fields = _end_gauges(pose, volumes)
  counts = np.round(volumes / grid.millilitres)
  counts = counts.astype(int)
  labels = _label_frames(fields, _below_base(pose), counts)
  return _EndPhases(pose, fields, counts, labels)


def _below_base(pose):
  """What lies below the base plane at ED and at ES."""
  return [pose.depth > descent for descent in (0.0, pose.descent)]


def _end_gauges(pose, volumes):
  """Gauges [P, 3, Z, H, W] at ED and ES, of volumes [P, 3] in ml."""
  at_ed, at_es = volumes
  ed = gauges(pose, at_ed, 0.0)
  es = gauges(pose, at_es, pose.descent)
  return np.stack([ed, es])


def _mixed(ed, es, ejected):
  return (1 - ejected) * ed + ejected * es


def _between(fields):
  """Gauges [F, 3, ...] at every frame, of those at ED and ES [P, 3, ...]."""
  ed, es = fields
  shares = EJECTED.astype(np.float32)
  return np.stack([_mixed(ed, es, ejected) for ejected in shares])


def _counts_of_frames(ends):
  """Voxels int [F, 3] at every frame, of those at ED and ES [2, 3]."""
  ed, es = ends
  ejected = EJECTED[:, None]
  counts = ed + ejected * (es - ed)
  return np.round(counts).astype(int)


def _middle_slice(labels):
  """The middle of the slices that show the LV at both phases."""
  lv = labels == _LV
  shows_lv = lv.any(axis=(2, 3))  # [P, Z]
  at_both = shows_lv.all(axis=0)
  slices = np.flatnonzero(at_both)
  return slices[len(slices) // 2]


def _areas(labels):
  """Voxels int [P, 3] of labels [P, Z, H, W]."""
  areas = []
  for structure in _STRUCTURES:
    inside = labels == structure
    areas.append(inside.sum(axis=(1, 2, 3)))
  return np.stack(areas, axis=1)


def _surfaces(fields, labels):
  """[P, 3]: the largest gauge inside each structure at each phase."""
  surfaces = []
  for phase_fields, phase_labels in zip(fields, labels):
    for structure, gauge in zip(_STRUCTURES, phase_fields):
      inside = gauge[phase_labels == structure]
      surfaces.append(inside.max())
  return np.reshape(surfaces, (2, 3))


def _areas_within(surfaces, fields, pose):
  """Pixels [P, 3] within surfaces [P, 3] of gauges [P, 3, ...]; each belongs to the first structure
  that has it."""
  areas = []
  for phase_fields, phase_surfaces, free in zip(fields, surfaces, _below_base(pose)):
    for gauge, surface in zip(phase_fields, phase_surfaces):
      within = gauge <= surface
      inside = free & within
      areas.append(inside.sum())
      free = free & ~within
  return np.reshape(areas, (2, 3))


def sample_pose(lvedv: float, rng: np.random.Generator, grid: Grid) -> Pose:
  """A heart of this LVEDV (ml) about the centre of the grid: shifted, turned, tilted and bent a
  little."""
  volume = 1000 * lvedv  # mm3
  radius_cubed = volume / (np.pi * _HALF_LENGTH_TO_RADIUS * _FILL)
  radius = radius_cubed ** (1 / 3)
  length = (1 + _CUT) * _HALF_LENGTH_TO_RADIUS * radius
  slices = np.arange(grid.slices, dtype=np.float32)
  thickness, _, _ = grid.spacing
  z = slices[:, None, None] * thickness
  # mm above the base; the wall needs room below the apex
  above = (z.max() - length) / 2
  top = above - 5 + 3 * rng.standard_normal()
  depth = z - max(top, 0.0)
  # the stack is not quite perpendicular
  from_middle = depth - length / 2
  slope = 0.05 * rng.standard_normal((2, 1, 1, 1))
  y_tilt, x_tilt = slope * from_middle
  # mm; the RV needs room beside the LV
  y_shift, x_shift = 4 * rng.standard_normal(2) + (0, 0.45 * radius)
  y, x = _positions(grid)
  y = y - y_shift - y_tilt
  x = x - x_shift - x_tilt
  # the RV lies left of the LV and above: to the front
  turn = np.radians(20 + 10 * rng.standard_normal())
  septal, across = _turned(y, x, turn)
  septal = septal.astype(np.float32)
  across = across.astype(np.float32)
  bend = []
  for count, sd in ((2, 0.03), (3, 0.02)):
    amplitude = sd * rng.standard_normal()
    phase = rng.uniform(0, 2 * np.pi)
    bend.append((count, amplitude, np.float32(phase)))
  wide = _lognormal(0.88, 0.05, rng)
  high = _lognormal(1.42, 0.05, rng)
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
  y_shift, x_shift = 4 * rng.standard_normal(2) + (0, room)
  turn = np.radians(10 * rng.standard_normal())
  septal, up = _turned(y - y_shift, x - x_shift, turn)
  septal = septal.astype(np.float32)[None]
  depth = pose.length / 2 - up - 10
  across = np.zeros_like(septal)
  return pose._replace(
    rho=_rho(septal, across, pose.bend),
    septal=septal,
    across=across,
    depth=depth.astype(np.float32)[None],
  )


def _lognormal(median, sd, rng):
  return median * np.exp(sd * rng.standard_normal())


def _positions(grid):
  """mm of the pixels from the centre, (rows [H, 1], columns [1, W])."""
  middle = (grid.size - 1) / 2
  offsets = np.arange(grid.size) - middle
  _, height, width = grid.spacing
  y = offsets * height
  x = offsets * width
  return y[:, None], x[None]


def _turned(y, x, turn):
  """Places in an image, mm to the left and upwards, as it looks when turned by an angle in rad."""
  cosine = np.cos(turn)
  sine = np.sin(turn)
  left = -cosine * x - sine * y
  up = sine * x - cosine * y
  return left, up


def _rho(septal, across, bend):
  """mm from the long axis, bent."""
  angle = np.arctan2(across, septal)
  waves = 0
  for count, amplitude, phase in bend:
    wave = np.cos(count * angle + phase)
    waves = waves + amplitude * wave
  bent = (1 + waves).astype(np.float32)
  return np.hypot(septal, across) * bent


def gauges(pose: Pose, volumes: np.ndarray, descent: float) -> np.ndarray:
  """Gauges of LV (1 at its surface), wall (mm outside the LV, to first order) and RV; float32 [3,
  Z, H, W].

  Args:
    volumes: [3] of LV, wall and RV in ml.
    descent: mm that the base plane has moved; the apex of the cavity stays where it is.
  """
  half = (pose.length - descent) / (1 + _CUT)  # of the length of the uncut cavity
  inside_wall = 1000 * np.cumsum(volumes[:2])  # mm3: within the endocardium, the epicardium
  areas = inside_wall / (np.pi * half * _FILL)
  endo, epi = np.sqrt(areas)  # radii in mm
  centre = descent + _CUT * half

  # shares of the semi-axes
  radial = pose.rho / endo
  along = (pose.depth - centre) / half
  lv = np.sqrt(radial**2 + along**2)
  radial_slope = radial / endo
  along_slope = along / half
  steepness = np.sqrt(radial_slope**2 + along_slope**2)
  slope = steepness / np.maximum(lv, 1e-3)  # 1/mm
  wall = (lv - 1) / np.maximum(slope, 1e-3)

  rv_wide, rv_high = pose.rv
  to_rv = 0.85 * epi
  septal = (pose.septal - to_rv) / (epi * rv_wide)
  across = pose.across / (epi * rv_high)
  rv_centre = 0.15 * half
  below = (pose.depth - descent - rv_centre) / (0.95 * half)
  rv = np.sqrt(septal**2 + across**2 + below**2)
  return np.stack([lv, wall, rv]).astype(np.float32)


def label(
  fields: np.ndarray,
  allowed: np.ndarray,
  counts: np.ndarray,
) -> np.ndarray:
  """Labels uint8 [...]: LV, MYO and RV in turn take the counts [3] allowed free voxels of smallest
  gauge [3, ...]."""
  _, *shape = fields.shape
  labels = np.zeros(shape, np.uint8)
  for structure, field, count in zip(_STRUCTURES, fields, counts):
    free = (labels == 0) & allowed
    gauge = np.where(free, field, np.inf)
    order = np.argpartition(gauge.ravel(), count)
    smallest = order[:count]
    labels.ravel()[smallest] = structure
  return labels


def _label_frames(fields, allowed, counts):
  """Labels uint8 [F, ...], as `label` gives each frame, of gauges [F, 3, ...]."""
  labels = []
  for frame_fields, frame_allowed, frame_counts in zip(fields, allowed, counts):
    labels.append(label(frame_fields, frame_allowed, frame_counts))
  return np.stack(labels)


def sample_tissue(pose: Pose, rng: np.random.Generator) -> np.ndarray:
  """What a heart lies in, float32 [5, Z, H, W]: signal of the surroundings, coil sensitivity, mm to
  the long axis along and across the septal direction, and 0 at the base to 1 at the apex of the
  cavity."""
  left = pose.septal
  front = 0.35 * pose.septal + 0.94 * pose.across
  level = pose.depth / pose.length
  level = np.broadcast_to(level, left.shape)

  # mm below the dome of the diaphragm, which falls towards the apex
  dome = -pose.across + 0.4 * left - 0.004 * left**2
  below_diaphragm = dome - 44 + 12 * level
  liver = expit(0.5 * below_diaphragm)
  signal = _LUNG + (_LIVER - _LUNG) * liver

  # mm outside the curved inner surface of the chest
  curve = 0.005 * (left - 25) ** 2
  outward = front + curve - 60
  phase = rng.uniform(0, 6)
  ribs = np.sin(left / 11 + phase)
  chest = expit(0.5 * (outward + 1.5 * ribs))
  waves = np.sin(outward / 4.5)
  fat = 0.5 + 0.5 * waves  # in layers with muscle
  chest_signal = _MUSCLE + (_FAT - _MUSCLE) * fat
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
  """Magnitude images, float32 [P, Z, H, W], of labels [P, Z, H, W] with their gauges [P, 3, Z, H,
  W]."""
  background, coil, septal, across, level = tissue
  signal = _with_heart(background, labels, fields)
  papillary = _papillary_muscles(labels == _LV, septal, across, level, grid)
  signal = np.where(papillary, _MYOCARDIUM, signal)
  _, height, width = grid.spacing
  for axis, mm in ((2, height), (3, width)):
    signal = signal.astype(np.float32)
    signal = gaussian_filter1d(signal, _BLUR_MM / mm, axis)
  noise = rng.standard_normal((2, *labels.shape), np.float32)
  real, imaginary = np.float32(_NOISE) * noise
  return np.hypot(signal * coil + real, imaginary)  # Rician


def _with_heart(background, labels, fields):
  """Signal [P, Z, H, W] of the labelled heart and what is next to it, before its background."""
  lv_gauge, _, rv_gauge = fields.swapaxes(0, 1)
  rv = labels == _RV
  rv_surface = np.max(
    rv_gauge,
    axis=(1, 2, 3),
    keepdims=True,
    where=rv,
    initial=0,
  )
  pericardial_fat = rv_gauge < 1.16 * rv_surface
  rv_wall = rv_gauge < 1.08 * rv_surface
  # above the base plane: atria and outflow tract
  chambers = (rv_gauge < 0.8 * rv_surface) | (lv_gauge < 0.85)
  signal = np.where(pericardial_fat, _FAT * 0.8, background)
  signal = np.where(rv_wall, _MYOCARDIUM, signal)
  signal = np.where(chambers, _BLOOD * 0.95, signal)
  signal = np.where(labels == _MYO, _MYOCARDIUM, signal)
  return np.where((labels == _LV) | rv, _BLOOD, signal)


def _papillary_muscles(lv, septal, across, level, grid):
  """Where in the cavity, bool [P, Z, H, W], they are."""
  _, height, width = grid.spacing
  pixels = lv.sum(axis=(2, 3), keepdims=True)
  area = pixels * height * width
  radius = np.sqrt(area / np.pi)
  from_axis = _PAPILLARY_PLACE * radius
  highest, lowest = _PAPILLARY_LEVELS
  near = np.zeros(lv.shape, bool)
  for angle in _PAPILLARY_RAD:
    beside = septal - from_axis * np.cos(angle)
    in_front = across - from_axis * np.sin(angle)
    near |= np.hypot(beside, in_front) < _PAPILLARY_MM
  in_reach = (level > highest) & (level < lowest)
  return lv & in_reach & near
