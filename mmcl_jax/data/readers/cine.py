"""What every CMR reader ends in: a short-axis cine in one layout, with labels in one convention."""

from typing import NamedTuple

import numpy as np

from mmcl_jax.errors import BadRecord

SPACING_MM = ((0.5, 50), (0.1, 10), (0.1, 10))  # along Z, H, W: wider than any short-axis protocol
ED_ES_ONLY = "no cine, ED and ES only"
TO_APEX = np.array([1, -1, -1]) / 3**0.5  # left, anterior, inferior, in DICOM's axes
# cosine: stacks lie at 0.9 or more, axes of the scanner, as where nothing is known, at 0.58
TELLS = 0.7


class Cine(NamedTuple):
  """A short-axis cine as the source gives it: nothing is cropped, resampled or rescaled.

  H runs along the rows of the image as the scanner shows it (`pixel_array`; NIfTI arrays are [X, Y,
  Z, T], so an image is `volume[:, :, z, t].T`). Slices are in the source's order;
  mmcl_jax.data.preprocess.cmr turns them base to apex.
  """

  images: np.ndarray  # [F, Z, H, W], int16, uint16 or float32
  spacing: tuple[float, float, float]  # mm between voxel centres along Z, H, W
  frame_s: float = float("nan")  # seconds between frames; NaN = not known
  # uint8 [F, Z, H, W] in schema.LABELS; zeros in frames that are not labelled
  labels: np.ndarray | None = None
  labelled: tuple[int, ...] = ()  # frames with labels
  ed: int | None = None  # frames that the source names, 0-based
  es: int | None = None
  # how the source numbered its labels, such as "RV 1, MYO 2, LV 3"
  convention: str = ""
  # remarks on quality, without names or numbers that identify a person
  flags: tuple[str, ...] = ()
  base_first: bool | None = None  # whether slices run from base to apex, as `base_first` has it


def base_first(direction: np.ndarray) -> bool | None:
  """Whether slices run from base to apex if each lies in `direction` of the one before.

  `direction` is [3], of any length, to the patient's left, back and head as in DICOM; the apex
  points left, forward and down. None: it does not tell.
  """
  along = float(direction @ TO_APEX)
  length = float(np.linalg.norm(direction))
  return along > 0 if abs(along) > TELLS * length else None


def assemble(
  images,
  spacing,
  frame_s=float("nan"),
  labels=None,
  numbers=None,
  ed=None,
  es=None,
  flags=(),
  base_first=None,
) -> Cine:
  """Checks what a reader found and gives it back as a Cine.

  Args:
    images, spacing, frame_s, ed, es, flags, base_first: as in Cine.
    labels: uint8 [F, Z, H, W] in schema.LABELS, or {frame: uint8 [Z, H, W]}, or None.
    numbers: what the source numbers its labels by, name -> number; for `convention` only.

  Raises:
    BadRecord: the parts do not fit each other, or no heart has such a spacing, or the images are
      empty.
  """
  flags = list(flags)
  for name, (low, high), value in zip(("slices", "rows", "columns"), SPACING_MM, spacing):
    if not low <= value <= high:
      raise BadRecord(f"{name} lie {value:.4g} mm apart; expected {low:g} to {high:g}")
  for name, frame in (("ED", ed), ("ES", es)):
    if frame is not None and not 0 <= frame < len(images):
      raise BadRecord(f"{name} is said to be frame {frame + 1} of {len(images)}")
  if ed is not None and ed == es:
    raise BadRecord(f"ED and ES are said to be the same frame, {ed + 1} of {len(images)}")
  if images.min() == images.max():
    raise BadRecord(f"all voxels are {images.flat[0]}: the images are empty")
  labelled = ()
  if labels is not None:
    labels = _placed(labels, images.shape)
    with_labels = labels.any(axis=(1, 2, 3))
    labelled = tuple(np.flatnonzero(with_labels).tolist())
    if not labelled:
      labels = None
      flags.append("the segmentation holds no labels")
  convention = ""
  if labelled:
    convention = ", ".join(f"{name} {number}" for name, number in numbers.items())
  return Cine(
    images,
    tuple(map(float, spacing)),
    float(frame_s),
    labels,
    labelled,
    ed,
    es,
    convention,
    tuple(flags),
    base_first,
  )


def _placed(labels, shape):
  """Labels of all frames, uint8 [F, Z, H, W]; those of single frames are put into zeros."""
  single = isinstance(labels, dict)
  expected = shape[1:] if single else shape
  for each in labels.values() if single else (labels,):
    if each.shape != expected:
      voxels = " x ".join(map(str, each.shape))
      images = " x ".join(map(str, expected))
      raise BadRecord(f"labels of {voxels} voxels for images of {images}")
  if not single:
    return labels
  placed = np.zeros(shape, np.uint8)
  for frame, each in labels.items():
    placed[frame] = each
  return placed
