"""From a short-axis cine of any size to what a cohort keeps: stacks at ED and ES and one slice's
beat, round the heart.

Phenotypes are measured on the source's own grid. Then each in-plane axis is resampled to one pixel
size; slices are chosen, never interpolated, for they lie 8 to 18 mm apart. Nothing is scaled to
fit: size carries information.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from mmcl_jax.data import measure, schema
from mmcl_jax.data.preprocess import motion
from mmcl_jax.data.readers.cine import Cine
from mmcl_jax.errors import BadRecord

MIN_SLICES = 6  # as the published dual-phase system: fewer do not reach from base to apex
MIN_FRAMES = 8  # fewer miss end-systole
MIN_VIEW_MM = 40.0  # of the image; no adult heart is narrower
MAX_INTENSITY = 1e9  # beyond any scanner's scale; float32 still resolves images below it
HEART_RATES = (20, 250)  # bpm
# shares of the beat between which ES is to be expected, from slow to fast heart rates
SYSTOLE = (0.15, 0.65)
# share of the LV's border on myocardium; a wall read as LV has less, its outer side is longer
MIN_ENCLOSED = 0.5
# parts of a label map below this share of its largest part are not the heart
STRAY = 0.1
MARGIN_MM = 10.0  # round the heart, within the crop
PERCENTILES = (1, 99)  # intensities that become 0 and 255

_LV = schema.LABELS["LV"]
_MYO = schema.LABELS["MYO"]
_RV = schema.LABELS["RV"]


class Shape(NamedTuple):
  """What a cohort keeps of each study."""

  slices: int = 12
  size: int = 64  # H = W
  pixel_mm: float = 2.5
  frames: int = 25  # of `cine_slice`; 0: neither it nor `three_frames` is kept


class _Axis(NamedTuple):
  """One axis of the crop. Output pixels tile the image from its edge; the crop holds those from
  `start` on."""

  start: int  # negative: the crop is larger than the image
  size: int
  ratio: float  # output over source spacing
  length: int  # of the source

  @property
  def centres(self):
    """float64 [size]: where output pixels have their centres, in source indices."""
    edges = self.start + np.arange(self.size)
    return (edges + 0.5) * self.ratio - 0.5

  @property
  def inside(self):
    """bool [size]: which of them lie on the image."""
    centres = self.centres
    return (centres >= -0.5) & (centres < self.length - 0.5)


def to_record(
  cine: Cine, shape: Shape = Shape(), heart_rate: float = float("nan")
) -> tuple[dict, dict, tuple]:
  """The CMR part of a record.

  Args:
    cine: as mmcl_jax.data.readers.cine.assemble gives it.
    shape: of the cohort.
    heart_rate: bpm; NaN takes 60 / (frames * frame_s), the rate during the scan.

  Returns:
    fields: as in mmcl_jax.data.schema, slices from base to apex: `ed_es_volumes` uint8 [2, slices,
      size, size], `labels` of that shape (zeros without segmentation), `cine_slice` uint8 [frames,
      size, size], `three_frames` uint8 [3, size, size], `spacing`.
    phenotypes: all of schema.PHENOTYPES; NaN where not measured.
    flags: remarks on quality, the cine's own first.

  Raises:
    BadRecord: the cine cannot be used.
  """
  _check(cine)
  flags = list(cine.flags)
  spacing = tuple(float(mm) for mm in cine.spacing)
  if cine.labels is not None and len(cine.labelled):
    heart = _heart_of_labels(cine, flags)
  else:
    heart = _heart_of_images(cine, flags)
  rate = _heart_rate(cine, heart_rate, flags)
  phenotypes = measure.phenotypes(heart.labels, spacing, rate)

  z, rows, columns = _crop(heart, spacing, shape, flags)
  plane = rows, columns
  slices = heart.images.shape[1]
  kept = slice(max(z.start, 0), min(z.start + z.size, slices))
  before = kept.start - z.start
  after = z.start + z.size - kept.stop
  padding = ((0, 0), (before, after), (0, 0), (0, 0))

  ends = heart.images[[heart.ed, heart.es], kept]
  stack = _resampled(ends, plane)
  window = _window(stack, plane)
  labels = _nearest(heart.labels[:, kept], plane)
  fields = {
    "ed_es_volumes": np.pad(_grey(stack, window), padding),
    "labels": np.pad(labels, padding),
    "spacing": np.float32((spacing[0], shape.pixel_mm, shape.pixel_mm)),
  }
  if shape.frames:
    if len(heart.images) < MIN_FRAMES:
      flags.append(f"cine slice interpolated from {len(heart.images)} frames")
    middle = _middle_slice(heart.labels, kept)
    beat = _resampled(heart.images[:, middle], plane)
    fields |= _cine_fields(beat, heart.ed, heart.es, shape.frames, window)
  return fields, phenotypes, tuple(flags)


class _Heart(NamedTuple):
  """A cine from base to apex, and where its heart is."""

  images: np.ndarray  # [F, Z, H, W]
  labels: np.ndarray  # uint8 [2, Z, H, W]
  ed: int  # frames
  es: int
  first: np.ndarray  # int [3], indices along Z, H, W
  last: np.ndarray


def _heart_of_labels(cine, flags):
  ed, es = _phases_of_labels(cine, flags)
  images = cine.images
  labels = cine.labels[[ed, es]]
  _check_label_map(labels, cine.convention, flags)
  if _base_is_last(labels[0], cine.base_first, flags):
    images = images[:, ::-1]
    labels = labels[:, ::-1]
  first, last = _extent(labels[0], flags)
  return _Heart(images, labels, ed, es, first, last)


def _heart_of_images(cine, flags):
  moving = motion.find_heart(cine)
  ed, es = _phases_of_images(cine, moving, flags)
  images = cine.images
  slices = images.shape[1]
  flags.append("no segmentation: no phenotypes, heart located by its motion")
  if _turned(cine.base_first, flags):
    images = images[:, ::-1]
  labels = np.zeros((2, *images.shape[1:]), np.uint8)
  first = np.array([0, *moving.first])
  last = np.array([slices - 1, *moving.last])
  return _Heart(images, labels, ed, es, first, last)


def _cine_fields(beat, ed, es, frames, window):
  """`cine_slice` and `three_frames` of one slice's beat [F, H, W]."""
  times = ed + np.arange(frames) * len(beat) / frames
  # A frame that was recorded, the earlier of two; their mean only where there is none between.
  steps = (es - ed) % len(beat)
  three_times = ed + np.array((0, steps // 2 or 0.5, steps))
  return {
    "cine_slice": _grey(_at(beat, times), window),
    "three_frames": _grey(_at(beat, three_times), window),
  }


class _Window(NamedTuple):
  """What intensities of one study become uint8, and where the crop lies on the image."""

  darkest: float
  scale: float
  inside: np.ndarray  # bool [H, W]


def _window(stack, plane):
  """Intensities between PERCENTILES of the stack's become 0 to 255."""
  rows, columns = plane
  inside = np.outer(rows.inside, columns.inside)
  darkest, brightest = np.percentile(stack[..., inside], PERCENTILES)
  if not brightest > darkest:
    raise BadRecord(f"constant about the heart ({darkest:g}); expected an image")
  return _Window(darkest, 255 / (brightest - darkest), inside)


def _grey(images, window):
  """uint8 of float images [..., H, W]; 0 beyond the image."""
  scaled = np.clip((images - window.darkest) * window.scale, 0, 255)
  return np.rint(scaled * window.inside).astype(np.uint8)


def _middle_slice(labels, kept):
  """The middle of the slices with LV at both phases; without labels that of the slices `kept`."""
  with_lv = (labels == _LV).any(axis=(2, 3))  # [P, Z]
  with_lv = np.flatnonzero(with_lv.all(axis=0))
  if len(with_lv):
    return with_lv[len(with_lv) // 2]
  return (kept.start + kept.stop) // 2


def _check(cine):
  """BadRecord where there are too few slices or frames, too small images, or images without a
  picture."""
  frames, slices, height, width = cine.images.shape
  if slices < MIN_SLICES:
    raise BadRecord(f"{slices} slices; expected at least {MIN_SLICES}")
  if frames < MIN_FRAMES and (cine.ed is None or cine.es is None):
    raise BadRecord(f"{frames} frames, ED and ES not named; expected at least {MIN_FRAMES}")
  height_mm = height * cine.spacing[1]
  width_mm = width * cine.spacing[2]
  if min(height_mm, width_mm) < MIN_VIEW_MM:
    raise BadRecord(
      f"images of {height_mm:.0f} x {width_mm:.0f} mm; expected at least {MIN_VIEW_MM:.0f} each way"
    )
  if cine.es is not None and cine.es == (cine.ed or 0):
    raise BadRecord(f"ED and ES are both frame {cine.es}")
  darkest = cine.images.min(axis=(2, 3))
  brightest = cine.images.max(axis=(2, 3))
  low = float(darkest.min())
  high = float(brightest.max())
  if not (low >= -MAX_INTENSITY and high <= MAX_INTENSITY):  # NaN is neither
    raise BadRecord(
      f"intensities from {low:g} to {high:g}; expected finite ones within {MAX_INTENSITY:g}"
    )
  for frame, z in np.argwhere(darkest == brightest)[:1]:
    value = darkest[frame, z]
    content = f"constant ({value:g})" if value else "all zeros"
    raise BadRecord(f"slice {z} of frame {frame} is {content}; expected an image")


def _phases_of_labels(cine, flags):
  """(ED, ES), as frames. ES is the source's, else the segmented frame of the least LV; never half
  of the frames."""
  frames = len(cine.images)
  labelled = list(cine.labelled)
  lv = np.full(frames, np.nan)
  lv[labelled] = measure.volumes(cine.labels[labelled], cine.spacing)[:, 0]
  ed = cine.ed or 0  # a cine triggered by the R wave starts at ED
  may_be_es = (lv > 0) & (np.arange(frames) != ed)
  others = np.where(may_be_es, lv, np.inf)
  if cine.es is None and np.isinf(others).all():
    raise BadRecord(f"no frame but ED (frame {ed}) is segmented; expected ED and ES")
  least = int(np.argmin(others))
  largest = int(np.nanargmax(lv))
  es = least if cine.es is None else cine.es
  for name, frame in (("ED", ed), ("ES", es)):
    if np.isnan(lv[frame]):
      raise BadRecord(
        f"{name} (frame {frame}) is not segmented; {len(labelled)} of {frames} frames are"
      )
    if lv[frame] == 0:
      raise BadRecord(f"no LV label at {name} (frame {frame})")
  if not lv[es] < lv[ed]:
    raise BadRecord(
      f"the LV has {lv[es]:.1f} ml at ES (frame {es}), "
      f"not less than {lv[ed]:.1f} ml at ED (frame {ed})"
    )
  if empty := int(np.sum(lv == 0)):
    flags.append(f"{empty} segmented frames have no LV label")
  if largest != ed:
    flags.append(f"the largest LV volume is at frame {largest}, ED is taken at frame {ed}")
  apart = abs(es - least)
  if min(apart, frames - apart) > 1:
    flags.append(f"the least LV volume is at frame {least}, ES is taken at frame {es}")
  if cine.es is None and len(labelled) < frames:
    flags.append(f"ES is the least LV of {len(labelled)} segmented frames, there are {frames}")
  _remark_on_timing(cine, ed, es, flags)
  return ed, es


def _phases_of_images(cine, heart, flags):
  """(ED, ES), as frames: the source's, else the first and that of the least blood pool as the
  images show it."""
  ed = cine.ed or 0
  if cine.es is not None:
    return ed, cine.es
  es = motion.end_systole(heart, cine.spacing, ed)
  flags.append("ES from images, no segmentation")
  _remark_on_timing(cine, ed, es, flags)
  return ed, es


def _remark_on_timing(cine, ed, es, flags):
  frames = len(cine.images)
  share = (es - ed) % frames / frames
  if cine.es is None and not SYSTOLE[0] <= share <= SYSTOLE[1]:
    flags.append(f"ES at {share:.2f} of the beat")


def _check_label_map(labels, convention, flags):
  """BadRecord where labels [2, Z, H, W] cannot mean what they say: conventions differ, and a wrong
  one is silent."""
  for phase, volume in zip(("ED", "ES"), labels):
    if not (volume == _MYO).any():
      raise BadRecord(f"no myocardium label at {phase}")
    if not (volume == _RV).any():
      flags.append(f"no RV label at {phase}")
  lv = _share_on_myocardium(labels, _LV)
  rv = _share_on_myocardium(labels, _RV)
  if lv < MIN_ENCLOSED or rv >= lv:
    raise BadRecord(
      f"the label map looks wrong: {lv:.0%} of the LV's border lies on myocardium, {rv:.0%} of the "
      f"RV's (read as {convention or 'LV 1, MYO 2, RV 3'}); expected most of the LV's and less of "
      "the RV's"
    )


def _share_on_myocardium(labels, structure):
  """Share of a structure's in-plane border; 0 where it has none."""
  on_myocardium, elsewhere = measure.borders(labels, structure)
  on, off = np.sum(on_myocardium), np.sum(elsewhere)
  return on / max(on + off, 1)


def _base_is_last(labels, base_first, flags):
  """Whether labels [Z, H, W] run from apex to base: the heart tapers to its apex, and the RV ends
  before it."""
  areas = np.count_nonzero(labels, axis=(1, 2))
  slices = np.flatnonzero(areas)
  growth = float((slices - slices.mean()) @ areas[slices])
  return growth > 0 or growth == 0 and _turned(base_first, flags)


def _turned(base_first, flags):
  """Whether slices run from apex to base as far as their geometry tells."""
  if base_first is None:
    flags.append("slice order taken as base to apex")
  return base_first is False


def _extent(labels, flags):
  """(first, last) int [3], indices along Z, H, W of those parts of labels [Z, H, W] that are the
  heart."""
  parts, _ = ndimage.label(labels, np.ones((3, 3, 3)))
  sizes = np.bincount(parts.ravel())
  sizes[0] = 0
  heart = sizes >= STRAY * sizes.max()
  if stray := int(sizes[~heart].sum()):
    flags.append(f"{stray} labelled voxels lie apart from the heart")
  places = np.argwhere(heart[parts])
  return places.min(axis=0), places.max(axis=0)


def _crop(heart, spacing, shape, flags):
  """[_Axis] of Z, H and W: about the middle of the heart, yet on the image as far as the image is
  large enough."""
  output = (spacing[0], shape.pixel_mm, shape.pixel_mm)
  sizes = (shape.slices, shape.size, shape.size)
  margins = (0, MARGIN_MM, MARGIN_MM)
  axes = []
  for axis, name in enumerate("ZHW"):
    low, high = heart.first[axis], heart.last[axis]
    length = heart.images.shape[1 + axis]
    size = sizes[axis]
    # Rounded: NIfTI keeps spacing in float32, DICOM as text; a centre between two pixels would go
    # either way.
    ratio = 1.0
    if name != "Z":
      ratio = output[axis] / round(spacing[axis], 5)
    on_image = int(length / ratio + 0.5)  # output pixels
    spare = on_image - size
    start = spare // 2
    if spare > 0:
      centred = round((low + high + 1) / 2 / ratio - size / 2)
      start = min(max(centred, 0), spare)
    axes.append(_Axis(start, size, ratio, length))
    need_mm = (high + 1 - low) * spacing[axis] + 2 * margins[axis]
    kept_mm = size * output[axis]
    if spare > 0 and need_mm > kept_mm:
      flags.append(
        f"the heart is cut by the crop: it needs {need_mm:.0f} mm along {name}, {kept_mm:.0f} are "
        "kept"
      )
  return axes


def _resampled(images, plane):
  """[..., H, W] -> float32 [..., size, size]: linear; where output pixels are larger, a triangle of
  their width."""
  rows, columns = map(_weights, plane)
  # In one order of memory: the sums of a product are rounded in the order that the layout suggests.
  return rows @ images.astype(np.float32, order="C") @ columns.T


def _weights(axis):
  """float32 [size, length] of one axis; rows sum to 1, and are 0 where they lie beyond the
  image."""
  pixels = np.arange(axis.length)
  distance = np.abs(pixels - axis.centres[:, None])
  weights = np.maximum(0, 1 - distance / max(axis.ratio, 1))
  weights = weights * axis.inside[:, None]
  total = weights.sum(axis=1, keepdims=True)
  return (weights / np.maximum(total, 1e-9)).astype(np.float32)


def _nearest(labels, plane):
  """uint8 [..., H, W] -> uint8 [..., size, size]: the label under each centre, background beyond
  the image."""
  rows, columns = plane
  inside = np.outer(rows.inside, columns.inside)
  nearest = labels[..., _nearest_pixels(rows)[:, None], _nearest_pixels(columns)]
  return nearest * inside


def _nearest_pixels(axis):
  """int [size]: the source pixel under each centre."""
  pixels = np.floor(axis.centres + 0.5).astype(int)
  return np.clip(pixels, 0, axis.length - 1)


def _at(images, at):
  """float [F, H, W] of one periodic beat -> [N, H, W] at the times `at` [N], in frames; linear in
  time."""
  before = np.floor(at).astype(int)
  share = (at - before).astype(np.float32)
  share = share[:, None, None]
  earlier = images[before % len(images)]
  later = images[(before + 1) % len(images)]
  return (1 - share) * earlier + share * later


def _heart_rate(cine, heart_rate, flags):
  """bpm, or NaN where it is neither given nor known from the length of the beat."""
  if np.isnan(heart_rate) and len(cine.images) >= MIN_FRAMES and cine.frame_s > 0:
    heart_rate = 60 / (cine.frame_s * len(cine.images))
  if np.isnan(heart_rate):
    flags.append("heart rate unknown")
  elif not HEART_RATES[0] <= heart_rate <= HEART_RATES[1]:
    flags.append(f"heart rate of {heart_rate:.4g} bpm not believed")
    return float("nan")
  return heart_rate
