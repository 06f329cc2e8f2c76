"""NIfTI volumes (.nii, .nii.gz) from sources that are not trusted: checked by their header before
memory is taken.

nibabel interprets the header and its scaling. Around it stands what it does not do: nibabel
believes whatever size a header or its extensions claim, and does not notice a .nii.gz that expands
beyond it.
Format: https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h
"""

import gzip
import math
import os
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from mmcl_jax.data.readers.cine import base_first
from mmcl_jax.data.readers.files import bad_record, check_file
from mmcl_jax.data.schema import LABELS
from mmcl_jax.errors import BadRecord

# X, Y, Z, T: beyond any cine, even one resampled to a cubic grid
MAX_SHAPE = (1024, 1024, 256, 256)
MAX_VOXELS = 2**27  # 5 times a UK Biobank cine; 256 MiB of int16, 1 GiB of float64
MAX_FILE_BYTES = 2**30 + 2**21  # that many float64, with header and extensions
HEADERS = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}  # by size, which they begin with
MAGIC = b"n+1", b"n+2"  # voxels in the same file
WHOLE = 1e-3  # scaled labels miss whole numbers by rounding
MAX_EXTENSION_BYTES = 2**20
MAX_INTENSITY = 2**24  # float32 holds whole numbers exactly up to it
# outside it the header does not mean the step of a cine: many writers leave 0 or 1
FRAME_S = (0.001, 0.2)
MM = {"unknown": 1, "mm": 1, "meter": 1000, "micron": 0.001}
SECONDS = {"unknown": 1, "sec": 1, "msec": 1e-3, "usec": 1e-6}


class Volume(NamedTuple):
  """`voxels` int16, uint16 or float32 [F, Z, H, W]; `spacing` mm (Z, H, W); `frame_s` seconds, NaN
  = not known.

  `base_first` as in Cine, by the header's affine.
  """

  voxels: np.ndarray
  spacing: tuple[float, float, float]
  frame_s: float
  base_first: bool | None


def read(path) -> Volume:
  """Reads images of 3 axes (as one frame) or 4. Raises BadRecord with the reason; errors of disk
  and memory pass."""
  voxels, header = _load(path)
  low = voxels.min()
  high = voxels.max()
  if not (low >= -MAX_INTENSITY and high <= MAX_INTENSITY):  # NaN is neither
    raise BadRecord(
      f"intensities from {low:g} to {high:g}; expected finite ones of at most {MAX_INTENSITY}"
    )
  space, time = header.get_xyzt_units()
  x, y, z, *step = map(float, header.get_zooms())
  mm = MM[space]
  spacing = z * mm, y * mm, x * mm
  frame_s = _frame_s(step, time)
  return Volume(_plain(voxels), spacing, frame_s, _base_first(header))


def _frame_s(step, unit):
  """Seconds between frames of a header's step, [] or [number]; NaN where it means something
  else."""
  if not step:
    return math.nan
  seconds = step[0] * SECONDS.get(unit, math.nan)
  shortest, longest = FRAME_S
  return seconds if shortest <= seconds <= longest else math.nan


def read_frame(path) -> Volume:
  """As `read`, of a file that holds one frame."""
  volume = read(path)
  _check_single(volume.voxels)
  return volume


def two_frames(ed: Volume, es: Volume) -> Volume:
  """ED and ES from files of their own as frames 0 and 1; BadRecord where their grids differ."""
  same_shape = ed.voxels.shape == es.voxels.shape
  same_spacing = np.allclose(ed.spacing, es.spacing, rtol=1e-3)
  if not same_shape or not same_spacing:
    raise BadRecord("ED and ES differ in shape or spacing")
  voxels = np.concatenate([ed.voxels, es.voxels])
  return Volume(_plain(voxels), ed.spacing, math.nan, ed.base_first)


def read_labels(path, numbers: dict[str, int]) -> np.ndarray:
  """Reads a segmentation as uint8 [F, Z, H, W] in schema.LABELS.

  `numbers` has the file's own number of each label in schema.LABELS but background, which is 0.
  Raises BadRecord.
  """
  voxels, _ = _load(path)
  largest = max(numbers.values())
  table = np.zeros(largest + 1, np.uint8)
  for name, number in numbers.items():
    table[number] = LABELS[name]
  rounded = voxels
  if voxels.dtype.kind == "f":
    rounded = np.rint(voxels)
  low = rounded.min()
  high = rounded.max()
  if not (low >= 0 and high <= largest):
    raise BadRecord(f"labels from {low:g} to {high:g}; expected 0 to {largest}")
  if np.abs(rounded - voxels).max() > WHOLE:
    raise BadRecord("labels are not whole numbers")
  return table[rounded.astype(np.uint8)]


def read_frame_labels(path, numbers: dict[str, int]) -> np.ndarray:
  """As `read_labels`, of a file that holds one frame: uint8 [Z, H, W]."""
  labels = read_labels(path, numbers)
  _check_single(labels)
  return labels[0]


def _check_single(voxels):
  if len(voxels) != 1:
    raise BadRecord(f"{len(voxels)} frames in a file of one frame")


def _base_first(header):
  try:
    affine = header.get_best_affine()
  except (HeaderDataError, ValueError):  # no rotation
    return None
  direction = affine[:3, 2] * (-1, -1, 1)  # NIfTI's axes lead to the right and to the front
  return base_first(direction)


def _plain(voxels):
  """`voxels` in the smallest of the types of Cine.images that holds them."""
  if voxels.dtype in (np.int16, np.uint16):
    return voxels
  single_bytes = voxels.dtype.itemsize == 1
  return voxels.astype(np.int16 if single_bytes else np.float32)


def _load(path):
  """(voxels scaled by the header [F, Z, H, W], native byte order; header)."""
  check_file(path, "a NIfTI file (.nii, .nii.gz)")
  if (size := os.path.getsize(path)) > MAX_FILE_BYTES:
    raise BadRecord(f"the file has {size} bytes; expected at most {MAX_FILE_BYTES}")
  with bad_record("not a NIfTI file that can be read"):  # by where gzip, nibabel or NumPy stumble
    with open(path, "rb") as file:
      zipped = file.read(2) == b"\x1f\x8b"
      file.seek(0)
      stream = gzip.GzipFile(fileobj=file) if zipped else file
      header = _read_header(stream)
      voxels = _read_voxels(stream, header)
    slope, intercept = header.get_slope_inter()
    if slope is not None:
      voxels = apply_read_scaling(voxels, slope, intercept)
    native = voxels.dtype.newbyteorder("=")
    return voxels.T.astype(native, copy=False), header


def _read_voxels(stream, header):
  """[X, Y, Z, T] as stored, of a stream that stands behind its header."""
  size = header["sizeof_hdr"].item()
  skip = header.get_data_offset() - size
  dtype = header.get_data_dtype()
  shape = header.get_data_shape()
  need = skip + math.prod(shape) * dtype.itemsize
  try:
    # no more, whatever the stream expands to; gzip compares its checksum at the end
    body = stream.read(need + 1)
  except EOFError as error:
    raise BadRecord("the gzip stream ends early") from error
  if len(body) != need:
    share = "more than" if len(body) > need else f"{size + len(body)} of"
    raise BadRecord(f"the file holds {share} the {size + need} bytes that its header announces")
  voxels = np.frombuffer(body, dtype, offset=skip)
  four_axes = (*shape, 1)[:4]
  return voxels.reshape(four_axes, order="F")


def _read_header(stream):
  """The nibabel header that a file begins with, if all that it claims is within bounds."""
  block = stream.read(min(HEADERS))
  size = 348
  if block.startswith((b"\x1c\x02\0\0", b"\0\0\x02\x1c")):  # 540 in either byte order
    size = 540
  block += stream.read(size - min(HEADERS))
  if len(block) < size:
    raise BadRecord(f"the file holds {len(block)} bytes; a NIfTI header has {size}")
  header = HEADERS[size](block, check=False)
  magic = header["magic"].item()
  if header["sizeof_hdr"] != size or magic[:3] not in MAGIC:
    raise BadRecord("not a NIfTI-1 or NIfTI-2 file with its voxels in the same file")
  zooms = header["pixdim"][1:4]
  header["pixdim"][1:4] = np.abs(zooms)  # some writers put an axis's direction here
  shape = header.get_data_shape()
  if set(shape[4:]) == {1}:  # one value a voxel and moment
    header.set_data_shape(shape[:4])
  _check_shape(header.get_data_shape())
  dtype = header.get_data_dtype()
  if dtype.kind not in "iuf" or dtype.itemsize > 8:
    raise BadRecord(
      f"voxels of type {header.get_value_label('datatype')}; expected integers or real numbers"
    )
  for zoom in header.get_zooms()[:3]:
    if not 0 < zoom < math.inf:
      raise BadRecord("the header's spacing is not positive")
  space, _ = header.get_xyzt_units()
  if space not in MM:
    raise BadRecord("the header's unit of space is unknown")
  start = header.get_data_offset()
  if not 0 <= start - size <= MAX_EXTENSION_BYTES:
    raise BadRecord(f"voxels are said to start at byte {start}")
  return header


def _check_shape(shape):
  within = all(1 <= n <= most for n, most in zip(shape, MAX_SHAPE))
  if len(shape) not in (3, 4) or not within:
    announced = " x ".join(map(str, shape))
    largest = " x ".join(map(str, MAX_SHAPE))
    raise BadRecord(
      f"the header announces {announced} voxels; expected 3 or 4 axes of at most {largest}"
    )
  voxels = math.prod(shape)
  if voxels > MAX_VOXELS:
    raise BadRecord(f"the header announces {voxels} voxels; expected at most {MAX_VOXELS}")
