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
  def spare(self):
    """Output pixels by which the image is larger than the crop; negative: smaller."""
    on_image = int(self.length / self.ratio + 0.5)
    return on_image - self.size

  @property
  def centres(self):
    """float64 [size]: where output pixels have their centres, in source indices."""
    edges = self.start + np.arange(self.size)
    return (edges + 0.5) * self.ratio - 0.5

  @property
  def inside(self):
    """bool [size]: which of them lie on the image."""
    centres = self.centres
    last_edge = self.length - 0.5
    return (centres >= -0.5) & (centres < last_edge)


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

  z, *plane = _crop(heart, spacing, shape, flags)
  kept, padding = _kept_slices(z)
  ends = heart.images[[heart.ed, heart.es], kept]
  stack = _resampled(ends, plane)
  window = _window(stack, plane)
  labels = _nearest(heart.labels[:, kept], plane)
  new_spacing = spacing[0], shape.pixel_mm, shape.pixel_mm
  fields = {
    "ed_es_volumes": np.pad(_grey(stack, window), padding),
    "labels": np.pad(labels, padding),
    "spacing": np.float32(new_spacing),
  }
  if shape.frames:
    frames = len(heart.images)
    if frames < MIN_FRAMES:
      flags.append(f"cine slice interpolated from {frames} frames")
    middle = _middle_slice(heart.labels, kept)
    beat = _resampled(heart.images[:, middle], plane)
    fields |= _cine_fields(beat, heart.ed, heart.es, shape.frames, window)
  return fields, phenotypes, tuple(flags)


def _kept_slices(z):
  """(slice of the source's slices that the crop holds, padding of [P, Z, H, W] to its size)."""
  stop = z.start + z.size
  kept = slice(max(z.start, 0), min(stop, z.length))
  before = kept.start - z.start
  after = stop - kept.stop
  none = 0, 0
  return kept, (none, (before, after), none, none)


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
  flags.append("no segmentation: no phenotypes, heart located by its motion")
  if _turned(cine.base_first, flags):
    images = images[:, ::-1]
  _, slices, height, width = images.shape
  labels = np.zeros((2, slices, height, width), np.uint8)
  first = np.array([0, *moving.first])
  last = np.array([slices - 1, *moving.last])
  return _Heart(images, labels, ed, es, first, last)


def _cine_fields(beat, ed, es, frames, window):
  """`cine_slice` and `three_frames` of one slice's beat [F, H, W]."""
  recorded = len(beat)
  times = ed + np.arange(frames) * recorded / frames
  to_es = (es - ed) % recorded
  # A frame that was recorded, the earlier of two; their mean only where there is none between.
  half_way = to_es // 2 or 0.5
  three_times = ed + np.array([0, half_way, to_es])
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
  on_image = stack[..., inside]
  darkest, brightest = np.percentile(on_image, PERCENTILES)
  if not brightest > darkest:
    raise BadRecord(f"constant about the heart ({darkest:g}); expected an image")
  scale = 255 / (brightest - darkest)
  return _Window(darkest, scale, inside)


def _grey(images, window):
  """uint8 of float images [..., H, W]; 0 beyond the image."""
  scaled = (images - window.darkest) * window.scale
  scaled = np.clip(scaled, 0, 255)
  return np.rint(scaled * window.inside).astype(np.uint8)


def _middle_slice(labels, kept):
  """The middle of the slices with LV at both phases; without labels that of the slices `kept`."""
  lv = labels == _LV
  shows_lv = lv.any(axis=(2, 3))  # [P, Z]
  at_both = shows_lv.all(axis=0)
  slices = np.flatnonzero(at_both)
  if len(slices):
    return slices[len(slices) // 2]
  return (kept.start + kept.stop) // 2


def _check(cine):
  """BadRecord where there are too few slices or frames, too small images, or images without a
  picture."""
  frames, slices, height, width = cine.images.shape
  if slices < MIN_SLICES:
    raise BadRecord(f"{slices} slices; expected at least {MIN_SLICES}")
  phases_named = cine.ed is not None and cine.es is not None
  if frames < MIN_FRAMES and not phases_named:
    raise BadRecord(f"{frames} frames, ED and ES not named; expected at least {MIN_FRAMES}")
  _, pixel_height, pixel_width = cine.spacing
  height_mm = height * pixel_height
  width_mm = width * pixel_width
  if min(height_mm, width_mm) < MIN_VIEW_MM:
    raise BadRecord(
      f"images of {height_mm:.0f} x {width_mm:.0f} mm; expected at least {MIN_VIEW_MM:.0f} each way"
    )
  ed = cine.ed or 0
  if cine.es == ed:
    raise BadRecord(f"ED and ES are both frame {ed}")
  _check_intensities(cine.images)


def _check_intensities(images):
  darkest = images.min(axis=(2, 3))
  brightest = images.max(axis=(2, 3))
  low = float(darkest.min())
  high = float(brightest.max())
  if not (low >= -MAX_INTENSITY and high <= MAX_INTENSITY):  # NaN is neither
    raise BadRecord(
      f"intensities from {low:g} to {high:g}; expected finite ones within {MAX_INTENSITY:g}"
    )
  constant = darkest == brightest
  for frame, z in np.argwhere(constant):
    value = darkest[frame, z]
    content = f"constant ({value:g})" if value else "all zeros"
    raise BadRecord(f"slice {z} of frame {frame} is {content}; expected an image")


def _phases_of_labels(cine, flags):
  """(ED, ES), as frames. ES is the source's, else the segmented frame of the least LV; never half
  of the frames."""
  frames = len(cine.images)
  labelled = list(cine.labelled)
  volumes = measure.volumes(cine.labels[labelled], cine.spacing)
  lv = np.full(frames, np.nan)
  lv[labelled] = volumes[:, 0]
  ed = cine.ed or 0  # a cine triggered by the R wave starts at ED
  not_ed = np.arange(frames) != ed
  others = np.where((lv > 0) & not_ed, lv, np.inf)
  if cine.es is None and np.isinf(others).all():
    raise BadRecord(f"no frame but ED (frame {ed}) is segmented; expected ED and ES")
  least = int(np.argmin(others))
  es = least if cine.es is None else cine.es
  _check_volumes(lv, ed, es, len(labelled))
  if empty := int(np.sum(lv == 0)):
    flags.append(f"{empty} segmented frames have no LV label")
  largest = int(np.nanargmax(lv))
  if largest != ed:
    flags.append(f"the largest LV volume is at frame {largest}, ED is taken at frame {ed}")
  apart = abs(es - least)
  if min(apart, frames - apart) > 1:
    flags.append(f"the least LV volume is at frame {least}, ES is taken at frame {es}")
  if cine.es is None and len(labelled) < frames:
    flags.append(f"ES is the least LV of {len(labelled)} segmented frames, there are {frames}")
  _remark_on_timing(cine, ed, es, flags)
  return ed, es


def _check_volumes(lv, ed, es, labelled):
  """BadRecord where LV volumes [F] in ml, NaN where a frame is not segmented, do not fall from ED
  to ES."""
  for name, frame in (("ED", ed), ("ES", es)):
    if np.isnan(lv[frame]):
      raise BadRecord(
        f"{name} (frame {frame}) is not segmented; {labelled} of {len(lv)} frames are"
      )
    if lv[frame] == 0:
      raise BadRecord(f"no LV label at {name} (frame {frame})")
  edv = lv[ed]
  esv = lv[es]
  if not esv < edv:
    raise BadRecord(
      f"the LV has {esv:.1f} ml at ES (frame {es}), not less than {edv:.1f} ml at ED (frame {ed})"
    )


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
  earliest, latest = SYSTOLE
  if cine.es is None and not earliest <= share <= latest:
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
    read_as = convention or "LV 1, MYO 2, RV 3"
    raise BadRecord(
      f"the label map looks wrong: {lv:.0%} of the LV's border lies on myocardium, "
      f"{rv:.0%} of the RV's (read as {read_as}); "
      "expected most of the LV's and less of the RV's"
    )


def _share_on_myocardium(labels, structure):
  """Share of a structure's in-plane border; 0 where it has none."""
  on_myocardium, elsewhere = measure.borders(labels, structure)
  on = np.sum(on_myocardium)
  border = on + np.sum(elsewhere)
  return on / max(border, 1)


def _base_is_last(labels, base_first, flags):
  """Whether labels [Z, H, W] run from apex to base: the heart tapers to its apex, and the RV ends
  before it."""
  areas = np.count_nonzero(labels, axis=(1, 2))
  slices = np.flatnonzero(areas)
  from_middle = slices - slices.mean()
  growth = float(from_middle @ areas[slices])
  if growth == 0:
    return _turned(base_first, flags)
  return growth > 0


def _turned(base_first, flags):
  """Whether slices run from apex to base as far as their geometry tells."""
  if base_first is None:
    flags.append("slice order taken as base to apex")
  return base_first is False


def _extent(labels, flags):
  """(first, last) int [3], indices along Z, H, W of those parts of labels [Z, H, W] that are the
  heart."""
  touching = np.ones((3, 3, 3))  # by a corner, too
  parts, _ = ndimage.label(labels, touching)
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
  _, *lengths = heart.images.shape
  axes = []
  for k, name in enumerate("ZHW"):
    # Rounded: NIfTI keeps spacing in float32, DICOM as text; a centre between two pixels would go
    # either way.
    ratio = 1.0
    if name != "Z":
      ratio = output[k] / round(spacing[k], 5)
    first = heart.first[k]
    end = heart.last[k] + 1
    axis = _cropped_axis(first, end, sizes[k], ratio, lengths[k])
    axes.append(axis)
    need_mm = (end - first) * spacing[k] + 2 * margins[k]
    kept_mm = sizes[k] * output[k]
    if axis.spare > 0 and need_mm > kept_mm:
      flags.append(
        f"the heart is cut by the crop: it needs {need_mm:.0f} mm along {name}, "
        f"{kept_mm:.0f} are kept"
      )
  return axes


def _cropped_axis(first, end, size, ratio, length):
  """Output pixels, `size` of them, about the source pixels from `first` to before `end`."""
  axis = _Axis(0, size, ratio, length)
  if axis.spare <= 0:
    return axis._replace(start=axis.spare // 2)
  middle = (first + end) / 2 / ratio
  start = round(middle - size / 2)
  start = min(max(start, 0), axis.spare)
  return axis._replace(start=start)


def _resampled(images, plane):
  """[..., H, W] -> float32 [..., size, size]: linear; where output pixels are larger, a triangle of
  their width."""
  rows, columns = map(_weights, plane)
  # In one order of memory: the sums of a product are rounded in the order that the layout suggests.
  images = images.astype(np.float32, order="C")
  return rows @ images @ columns.T


def _weights(axis):
  """float32 [size, length] of one axis; rows sum to 1, and are 0 where they lie beyond the
  image."""
  pixels = np.arange(axis.length)
  distance = np.abs(pixels - axis.centres[:, None])
  width = max(axis.ratio, 1)
  weights = np.maximum(0, 1 - distance / width)
  weights = weights * axis.inside[:, None]
  total = weights.sum(axis=1, keepdims=True)
  weights = weights / np.maximum(total, 1e-9)
  return weights.astype(np.float32)


def _nearest(labels, plane):
  """uint8 [..., H, W] -> uint8 [..., size, size]: the label under each centre, background beyond
  the image."""
  rows, columns = plane
  inside = np.outer(rows.inside, columns.inside)
  y = _nearest_pixels(rows)
  x = _nearest_pixels(columns)
  return labels[..., y[:, None], x] * inside


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
  frames = len(cine.images)
  if np.isnan(heart_rate) and frames >= MIN_FRAMES and cine.frame_s > 0:
    heart_rate = 60 / (cine.frame_s * frames)
  if np.isnan(heart_rate):
    flags.append("heart rate unknown")
    return heart_rate
  lowest, highest = HEART_RATES
  if not lowest <= heart_rate <= highest:
    flags.append(f"heart rate of {heart_rate:.4g} bpm not believed")
    return float("nan")
  return heart_rate
