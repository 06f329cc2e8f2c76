"""Where the heart is and when it is smallest, by its motion alone: for short-axis cines without
segmentation."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from mmcl_jax.data.readers.cine import Cine
from mmcl_jax.errors import BadRecord

STEP_MM = 4.0  # between the pixels looked at
BLUR_MM = 6.0  # joins moving edges to one region
SHARE = 0.3  # of the strongest motion: less is not the heart
STILL = 1e-4  # of the range of intensities: no motion but rounding
POOL_RADIUS_MM = 40.0  # about the heart's centre, where its blood pool is measured
POOL_BLUR = 0.03  # of the beat


class Motion(NamedTuple):
  """The moving heart: `first` and `last` index along H and W, and what was looked at."""

  first: np.ndarray  # int [2], source pixels
  last: np.ndarray
  pixels: np.ndarray  # [F, Z', h, w], every `step`-th pixel of the middle half of the slices
  strength: np.ndarray  # float32 [Z', h, w], amplitude of the first temporal harmonic
  step: int


def find_heart(cine: Cine) -> Motion:
  """Finds what changes with the beat, by the first temporal harmonic of each pixel.

  After Lin, Cowan and Young 2006, "Automated detection of left ventricle in 4D MR images:
  experience from a large study", MICCAI. Here the harmonics of the slices are blurred and added;
  the heart is the region about the strongest that exceeds SHARE of it.

  Raises:
    BadRecord: nothing moves.
  """
  frames, slices = cine.images.shape[:2]
  _, *in_plane_mm = cine.spacing
  step = int(STEP_MM / max(in_plane_mm))
  step = max(1, step)
  quarter = slices // 4
  middle_half = slice(quarter, slices - quarter)
  pixels = cine.images[:, middle_half, ::step, ::step]
  strength = _first_harmonic(pixels)
  blur = [BLUR_MM / (step * mm) for mm in in_plane_mm]
  motion = ndimage.gaussian_filter(strength.sum(axis=0), blur)
  motion -= np.median(motion)  # what noise alone gives
  peak = np.unravel_index(motion.argmax(), motion.shape)
  strongest = motion[peak]
  brightest = float(pixels.max())
  darkest = float(pixels.min())
  intensities = brightest - darkest
  if not strongest > STILL * intensities:
    raise BadRecord("nothing moves over the beat; expected a cine")
  regions, _ = ndimage.label(motion > SHARE * strongest)
  heart = np.argwhere(regions == regions[peak]) * step
  return Motion(
    first=heart.min(axis=0),
    last=heart.max(axis=0),
    pixels=pixels,
    strength=strength,
    step=step,
  )


def _first_harmonic(pixels):
  """Its amplitude over the frames, float32 [...] of pixels [F, ...]."""
  frames = len(pixels)
  angle = 2 * np.pi * np.arange(frames) / frames
  waves = np.stack([np.cos(angle), np.sin(angle)])
  waves = waves.astype(np.float32)
  pixels = pixels.astype(np.float32)
  real, imaginary = np.tensordot(waves, pixels, 1)
  return np.hypot(real, imaginary) / frames


def end_systole(motion: Motion, spacing: tuple[float, float, float], ed: int) -> int:
  """The frame of least blood pool, `ed` apart.

  Blood is what is brighter than Otsu's threshold of its slice over all frames, within
  POOL_RADIUS_MM of the heart's centre. Its pixels count by their first harmonic: those that the
  walls sweep over decide, not vessels or fat.
  """
  frames, _, height, width = motion.pixels.shape
  _, pixel_height, pixel_width = spacing
  centre_y, centre_x = (motion.first + motion.last) / 2
  y = np.arange(height) * motion.step - centre_y
  x = np.arange(width) * motion.step - centre_x
  y_mm = y * pixel_height
  x_mm = x * pixel_width
  distance_mm = np.hypot(y_mm[:, None], x_mm)
  near = distance_mm < POOL_RADIUS_MM
  pool = np.zeros(frames)
  slices = motion.pixels.swapaxes(0, 1)
  for images, strength in zip(slices, motion.strength):
    values = images[:, near].astype(np.float32)
    blood = values > _otsu(values)
    pool += blood @ strength[near]
  pool = ndimage.gaussian_filter1d(pool, POOL_BLUR * frames, mode="wrap")
  pool[ed] = np.inf
  return int(np.argmin(pool))


def _otsu(values):
  """The threshold that parts values into two classes with the greatest variance between them (Otsu
  1979)."""
  counts, edges = np.histogram(values, 128)
  centres = (edges[1:] + edges[:-1]) / 2
  below = np.cumsum(counts)
  total = counts.sum()
  from_lowest = centres - centres[0]
  moment = np.cumsum(counts * from_lowest)
  difference = moment[-1] * below - moment * total
  above = total - below
  pairs = np.maximum(below * above, 1)
  between = difference**2 / pairs
  return centres[np.argmax(between[:-1])]
