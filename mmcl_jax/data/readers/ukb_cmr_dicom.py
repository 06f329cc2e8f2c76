"""UK Biobank field 20209: a zip of DICOM files and a manifest -> the short-axis cine.

    manifest.csv (or manifest.cvs)   filename, patientid, studyid, date,
                                     series discription (sic), seriesid
    *.dcm                            one image each; the series CINE_segmented_SAX_b1, b2, ...
                                     are the slices in order

Slices, frames and axes are those of ukbb_cardiac's converter
(https://github.com/baiwenjia/ukbb_cardiac, data/biobank_utils.py), so that a segmentation made from
its NIfTI fits. Nothing is extracted to disk, and of each file only the tags in TAGS are
interpreted: none of them names the participant.
"""

import csv
import io
import math
import os
import re
import stat
import warnings
import zipfile
from collections import Counter
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import pydicom
from pydicom.uid import (
  DeflatedExplicitVRLittleEndian,
  ExplicitVRBigEndian,
  ExplicitVRLittleEndian,
  ImplicitVRLittleEndian,
)

from mmcl_jax.data.readers import nifti, ukbb_cardiac
from mmcl_jax.data.readers.cine import Cine, assemble, base_first
from mmcl_jax.data.readers.files import bad_record, check_file
from mmcl_jax.errors import BadRecord

# the whole name: ..._InlineVF and its results are not images
SLICE = re.compile(r"CINE_segmented_SAX_b([0-9]{1,3})")
MIXED = "CINE_segmented_SAX"
MANIFESTS = ("manifest.csv", "manifest.cvs")  # the second is as common a slip as it looks
TAGS = [
  "AcquisitionTime",
  "BitsAllocated",
  "CardiacNumberOfImages",
  "Columns",
  "ImageOrientationPatient",
  "ImagePositionPatient",
  "InstanceNumber",
  "NominalInterval",
  "NumberOfFrames",
  "PixelData",
  "PixelRepresentation",
  "PixelSpacing",
  "Rows",
  "SamplesPerPixel",
  "SeriesInstanceUID",
  "SeriesNumber",
  "SliceThickness",
  "SpacingBetweenSlices",
  "TriggerTime",
]
DESCRIPTIONS = "series discription", "series description"  # columns of the manifest
BYTE_ORDER = {
  ImplicitVRLittleEndian: "<",
  ExplicitVRLittleEndian: "<",
  ExplicitVRBigEndian: ">",
}

MAX_MEMBERS = 4096  # a study has about 550
MAX_DIRECTORY_BYTES = 2**20  # of the zip: 250 bytes a member
MAX_MEMBER_BYTES = 2**22  # an image of 1024 x 1024 with a header as large
MAX_IMAGE_BYTES = 2**28  # of all images together: nifti.MAX_VOXELS of 2 bytes
MAX_FRAMES = nifti.MAX_SHAPE[3]
MAX_MISSING = 2  # frames of a slice that may be filled by the one before
SAME_SLICE_MM = 0.5  # images of one slice lie no further apart
UNEVEN_FLAG, UNEVEN = 0.02, 0.25  # deviation of a slice distance from the median: remarked, refused
SHIFT_FLAG_MM = 2
TILT = 0.02  # sine of the angle between slices that still count as parallel


class _Image(NamedTuple):
  """One file. `uid`, `series` and `time` tell acquisitions apart; what a file does not give is NaN,
  -1, "" or None."""

  name: str  # of the file: only for the order in which the converter takes files
  pixels: np.ndarray  # [H, W]
  pixel_mm: np.ndarray | None  # between rows, between columns
  position: np.ndarray | None  # mm [3], centre of the first pixel
  axes: np.ndarray | None  # [6], unit vectors along a row and along a column
  # (tag, mm) that tells the slice distance where positions do not; () = none
  distance: tuple[()] | tuple[str, float]
  uid: str
  series: float
  time: str
  trigger_ms: float
  instance: float
  beat_ms: float
  count: float  # frames of its slice


def read(path, segmentation=None) -> Cine:
  """Reads a study; pixels are as stored (uint16 or int16, no rescaling).

  Args:
    path: the zip.
    segmentation: labels of all frames [X, Y, Z, T] by ukbb_cardiac's network (its seg_sa.nii.gz),
      or None.

  Raises:
    BadRecord: it cannot be read, and why; errors of disk and memory pass.
  """
  with bad_record("not a zip of DICOM files that can be read"), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pydicom quotes what it stumbles over
    return _cine(_series(path), segmentation)


# The zip


class _Reader(io.FileIO):
  """A file whose reads are bounded: zipfile takes the whole directory at the size that the file
  claims for it."""

  def read(self, size=-1):
    wanted = size
    if size is None or size < 0:
      wanted = os.fstat(self.fileno()).st_size - self.tell()
    if wanted > MAX_DIRECTORY_BYTES:
      raise BadRecord(f"the zip's directory has more than {MAX_DIRECTORY_BYTES} bytes")
    return super().read(size)


def _series(path):
  """{name: its images} of the short-axis cine, in the order of slices."""
  check_file(path, "a zip of DICOM files")
  with _Reader(path) as file, zipfile.ZipFile(file) as archive:
    members = _members(archive)
    manifests = [members[name] for name in MANIFESTS if name in members]
    if not manifests:
      raise BadRecord("no manifest.csv in the zip")
    manifest = _content(archive, manifests[0], "the manifest")
    wanted = _wanted(_listed(manifest.decode("utf-8-sig", "replace")))
    series, size = {}, 0
    for name, files in wanted.items():
      series[name] = []
      for number, file_name in enumerate(files, 1):
        if file_name in members:
          where = f"file {number} of {name}"
          data = _content(archive, members[file_name], where)
          size += len(data)
          if size > MAX_IMAGE_BYTES:
            raise BadRecord(f"the images take more than {MAX_IMAGE_BYTES} bytes")
          series[name].append(_image(file_name, data, where))
  if absent := [name for name, images in series.items() if not images]:
    raise BadRecord(f"no file of {absent[0]} is in the zip")
  return series


def _members(archive):
  """{name: entry} of a zip in which nothing is odd."""
  entries = archive.infolist()
  if len(entries) > MAX_MEMBERS:
    raise BadRecord(f"the zip has {len(entries)} members; expected at most {MAX_MEMBERS}")
  for entry in entries:
    if _leads_out(entry.orig_filename):
      raise BadRecord("a member of the zip has a name that leads out of its folder")
    if stat.S_ISLNK(entry.external_attr >> 16):
      raise BadRecord("a member of the zip is a symbolic link")
    if entry.flag_bits & 1:
      raise BadRecord("a member of the zip is encrypted")
    # the others expand without bound
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise BadRecord(
        f"a member of the zip is compressed by method {entry.compress_type}; expected none or "
        "deflate"
      )
  members = {entry.filename: entry for entry in entries}
  if len(members) != len(entries):
    raise BadRecord("two members of the zip have the same name")
  return members


def _leads_out(name):
  path = PurePosixPath(name.replace("\\", "/"))
  if path.is_absolute() or ".." in path.parts:
    return True
  return re.search("^[A-Za-z]:|\0", name) is not None  # a drive of Windows; the end of a C string


def _content(archive, entry, where):
  with archive.open(entry) as stream:
    parts, size = [], 0
    # what the directory says of its size is not believed
    while part := stream.read(MAX_DIRECTORY_BYTES):
      parts.append(part)
      size += len(part)
      if size > MAX_MEMBER_BYTES:
        raise BadRecord(f"{where} has more than {MAX_MEMBER_BYTES} bytes")
  return b"".join(parts)


# The manifest


def _listed(text):
  """{file name: series description}."""
  lines = [line for line in text.splitlines() if line.strip()]
  first_row = next(csv.reader(lines[:1]), [])
  header = [name.strip().lower() for name in first_row]
  descriptions = [name for name in DESCRIPTIONS if name in header]
  if "filename" not in header or not descriptions:
    raise BadRecord("the manifest has no columns 'filename' and 'series discription'")
  date = header.index("date") if "date" in header else None

  def field(row, name):
    """A date such as Aug 30, 2015 without quotes takes two fields: what follows it is counted from
    the end."""
    at = header.index(name)
    if date is not None and at >= date:
      at -= len(header)
    return row[at].strip()

  listed = {}
  for number, line in enumerate(lines[1:], 2):
    try:
      row = next(csv.reader([line]))
    except csv.Error as error:
      raise BadRecord(f"line {number} of the manifest is no CSV") from error
    fewest = len(header)
    most = fewest if date is None else fewest + 1
    if not fewest <= len(row) <= most:
      raise BadRecord(f"line {number} of the manifest has {len(row)} fields; expected {fewest}")
    file_name = field(row, "filename")
    listed[file_name] = field(row, descriptions[0])
  return listed


def _wanted(listed):
  """{series: its files} of the short-axis cine, in the order of slices."""
  numbered = {}
  for name, series in listed.items():
    if match := SLICE.fullmatch(series):
      number = int(match[1])
      numbered.setdefault(number, []).append(name)
  if numbered:
    last = max(numbered)
    if missing := set(range(1, last + 1)) - numbered.keys():
      raise BadRecord(
        f"series b{min(missing)} is missing: there are {len(numbered)} slices up to b{last}"
      )
    if 0 in numbered:
      raise BadRecord("a series b0; expected the slices b1 to bN")
    return {f"series b{number}": numbered[number] for number in sorted(numbered)}
  if mixed := [name for name, series in listed.items() if series == MIXED]:
    return {MIXED: mixed}
  raise BadRecord("no short-axis cine: the manifest lists no series CINE_segmented_SAX_b1, b2, ...")


# One image


def _image(name, data, where):
  # pydicom would inflate it before anyone can ask how far
  if DeflatedExplicitVRLittleEndian.encode() in data:
    raise BadRecord(f"{where} is deflated; expected an uncompressed image")
  with bad_record(f"{where} is no DICOM image that can be read"):
    tags = pydicom.dcmread(io.BytesIO(data), specific_tags=TAGS)
    syntax = tags.file_meta.TransferSyntaxUID
    if syntax not in BYTE_ORDER:
      raise BadRecord(
        f"{where} is compressed or of an unknown transfer syntax; expected uncompressed pixels"
      )
    distance = ()
    for tag in ("SliceThickness", "SpacingBetweenSlices"):  # the second goes before the first
      mm = _number(tags, tag)
      if mm > 0:
        distance = tag, mm
    return _Image(
      name,
      _pixels(tags, BYTE_ORDER[syntax], where),
      _vector(tags, "PixelSpacing", 2),
      _vector(tags, "ImagePositionPatient", 3),
      _vector(tags, "ImageOrientationPatient", 6),
      distance,
      str(tags.get("SeriesInstanceUID", "")),
      np.nan_to_num(_number(tags, "SeriesNumber"), nan=-1),
      str(tags.get("AcquisitionTime", "")),
      _number(tags, "TriggerTime"),
      _number(tags, "InstanceNumber"),
      _number(tags, "NominalInterval"),
      _number(tags, "CardiacNumberOfImages"),
    )


def _number(tags, tag):
  value = tags.get(tag)
  if value is None or value == "":
    return math.nan
  number = float(value)
  return number if math.isfinite(number) else math.nan


def _vector(tags, tag, length):
  value = tags.get(tag)
  vector = np.array([] if value is None else value, float)
  if vector.shape != (length,) or not np.isfinite(vector).all():
    return None
  return vector


def _pixels(tags, order, where):
  """[H, W], as stored, native byte order; no copy."""
  bits = tags.BitsAllocated
  signed = tags.PixelRepresentation
  samples = tags.get("SamplesPerPixel", 1)
  frames = tags.get("NumberOfFrames", 1)
  single = samples == frames == 1
  if bits not in (8, 16) or signed not in (0, 1) or not single:
    raise BadRecord(f"{where} is not one grey image of 8 or 16 bits a pixel")
  rows, columns = tags.Rows, tags.Columns
  need = rows * columns * bits // 8
  even = need + need % 2
  present = len(tags.PixelData)
  if not 0 < need <= present <= even:
    raise BadRecord(f"{where} holds {present} bytes of pixels; {rows} x {columns} take {need}")
  kind = "ui"[signed]
  dtype = f"{order}{kind}{bits // 8}"
  pixels = np.frombuffer(tags.PixelData, dtype, rows * columns)
  pixels = pixels.reshape(rows, columns)
  return pixels.astype(f"{kind}2", copy=False)


# From images to slices and frames


def _cine(series, segmentation):
  flags = []
  if list(series) == [MIXED]:
    series = _split(series[MIXED], segmentation)
    flags.append("one series of all slices, split by their position")
  count = _count(series, flags)
  slices, clocks = {}, {}
  for name, images in series.items():
    images = _one_acquisition(name, images, count, segmentation, flags)
    slices[name], clocks[name] = _in_time(name, images, flags)
  source = _source_frames(clocks, count, flags)
  spacing = _spacing(slices, flags)

  cine = _joined(slices, source, count)
  labels = None
  if segmentation is not None:
    labels = nifti.read_labels(segmentation, ukbb_cardiac.NUMBERS)
    # its frames are the files in order, gaps closed; another shape is refused below
    if labels.shape == cine.shape:
      by_slice = []
      for z, which in enumerate(source.values()):
        by_slice.append(labels[which, z])
      labels = np.stack(by_slice, axis=1)

  return assemble(
    cine,
    spacing,
    _frame_s(slices, count),
    labels,
    ukbb_cardiac.NUMBERS,
    flags=flags,
    base_first=_base_first(slices),
  )


def _joined(slices, source, count):
  """[F, Z, H, W] of {name: images of a slice}; `source` as of `_source_frames`."""
  images = [image for each in slices.values() for image in each]
  first = images[0].pixels
  for image in images:
    same_size = image.pixels.shape == first.shape
    if not same_size or image.pixels.dtype != first.dtype:
      raise BadRecord("the images differ in size or type")
  cine = np.empty((count, len(slices), *first.shape), first.dtype)
  for z, (name, images) in enumerate(slices.items()):
    for frame, which in enumerate(source[name]):
      cine[frame, z] = images[which].pixels
  return cine


def _split(images, segmentation):
  """{name: images} of one series of all slices, by their position along the normal.

  They run in the order of file names, in which the converter cuts the series into slices.
  """
  if not _placed(images):
    raise BadRecord("one series of all slices, and images in it without position or orientation")
  normal = np.cross(*np.split(images[0].axes, 2))

  def along(image):
    return image.position @ normal

  def first_name(images):
    return min(image.name for image in images)

  slices = []
  start = 0.0  # of the last slice, along the normal
  for image in sorted(images, key=along):
    place = along(image)
    if not slices or place - start > SAME_SLICE_MM:
      slices.append([])
      start = place
    slices[-1].append(image)
  by_name = sorted(slices, key=first_name)
  if by_name[0] is slices[-1]:
    slices.reverse()
  if segmentation is not None and any(a is not b for a, b in zip(slices, by_name)):
    raise BadRecord(
      "one series of all slices, whose files are not in their order: the segmentation cannot be "
      "placed"
    )
  return {f"slice {number}": images for number, images in enumerate(slices, 1)}


def _count(series, flags):
  """Frames of a slice."""
  stated = Counter()
  for images in series.values():
    stated.update(image.count for image in images if image.count > 0)
  if stated:
    count = max(stated, key=stated.get)
  else:
    flags.append("CardiacNumberOfImages is missing, the frames of the longest slice are counted")
    count = 0
    for images in series.values():
      acquisitions = Counter(image.uid for image in images)
      count = max(count, *acquisitions.values())
  if count > MAX_FRAMES or count % 1:
    raise BadRecord(f"CardiacNumberOfImages is {count:g}; expected at most {MAX_FRAMES}")
  return int(count)


def _one_acquisition(name, images, count, segmentation, flags):
  """The images of the last acquisition that is complete."""
  acquisitions = {}
  for image in images:
    acquisitions.setdefault(image.uid, []).append(image)
  in_time = sorted(acquisitions.values(), key=_acquired)
  complete = [images for images in in_time if len(images) >= count - MAX_MISSING]
  images = (complete or in_time)[-1]
  times = len(in_time)
  if times > 1:
    flags.append(f"{name} was acquired {times} times, the last complete one is taken")
    converted = max(acquisitions)  # the converter's choice
    if segmentation is not None and images[0].uid != converted:
      raise BadRecord(
        f"{name} was acquired {times} times, and the segmentation belongs to another than the last"
      )
  if not count - MAX_MISSING <= len(images) <= count:
    raise BadRecord(
      f"{name} has {len(images)} images of {count} frames; at most {MAX_MISSING} may be missing"
    )
  return images


def _acquired(images):
  """What puts acquisitions in order."""
  return max((image.series, image.time, image.uid) for image in images)


def _in_time(name, images, flags):
  """(images in the order of frames, what orders them: float, TriggerTime in ms or else
  InstanceNumber)."""
  for tag in ("trigger_ms", "instance"):
    clock = np.array([getattr(image, tag) for image in images])
    distinct = len(np.unique(clock)) == len(clock)
    if distinct and np.isfinite(clock).all():
      if tag == "instance":
        flags.append(f"{name} has no distinct trigger times, its frames go by InstanceNumber")
      order = np.argsort(clock)
      return [images[i] for i in order], clock[order]
  raise BadRecord(f"neither TriggerTime nor InstanceNumber puts the frames of {name} in order")


def _source_frames(clocks, count, flags):
  """{name: int [F], the image that each frame takes}: its own; where that is missing, the one
  before."""
  steps, starts = {}, {}
  for name, clock in clocks.items():
    step = np.median(np.diff(clock)) if len(clock) > 1 else 1
    steps[name] = step
    starts[name] = clock[0] / step
  usual_start = np.median(list(starts.values()))
  source, missing = {}, []
  for name, clock in clocks.items():
    lacking = count - len(clock)
    if not lacking:
      source[name] = np.arange(count)
      continue
    # the frame of each image: by the time from the first one
    frames = np.rint((clock - clock[0]) / steps[name])
    spare = count - 1 - frames[-1]
    if spare < 0 or not np.diff(frames).all():
      raise BadRecord(
        f"{name} lacks {lacking} of {count} frames, and its trigger times do not tell which"
      )
    # later than the others: no first
    late = np.rint(starts[name] - usual_start)
    frames += np.clip(late, 0, spare)
    latest = np.searchsorted(frames, np.arange(count), side="right") - 1
    source[name] = np.maximum(latest, 0)
    missing.append(f"{name} ({lacking})")
  if missing:
    flags.append(f"missing frames filled by the one before: {', '.join(missing)}")
  return source


def _frame_s(slices, count):
  """Seconds between frames, the mean of slices; NaN = not known."""
  steps, beats = [], []
  for images in slices.values():
    beats += [image.beat_ms / count for image in images]
    if len(images) > 1:
      between = np.diff([image.trigger_ms for image in images])
      steps.append(np.median(between))
  for times in steps, beats:
    positive = [ms for ms in times if ms > 0]
    if positive:
      return np.mean(positive) / 1000
  return math.nan


def _base_first(slices):
  """As in Cine; None where positions are missing."""
  positions = [images[0].position for images in slices.values()]
  first = positions[0]
  last = positions[-1]
  if first is None or last is None:
    return None
  return base_first(last - first)


def _placed(images):
  """Whether all images say where they lie."""
  return all(image.position is not None and image.axes is not None for image in images)


def _spacing(slices, flags):
  """mm between slices, rows, columns, where the slices form a stack."""
  images = [image for each in slices.values() for image in each]
  pixel_mm = images[0].pixel_mm
  for image in images:
    if image.pixel_mm is None or not np.allclose(image.pixel_mm, pixel_mm, rtol=1e-3):
      raise BadRecord("PixelSpacing is missing or differs between images")
  if len(slices) == 1 or not _placed(images):
    if not images[0].distance:
      raise BadRecord("no slice positions, no SpacingBetweenSlices, no SliceThickness")
    tag, mm = images[0].distance
    flags.append(f"slice distance taken from {tag}")
    return mm, *pixel_mm
  normal = _normal(slices, images)
  return _slice_distance(slices, normal, flags), *pixel_mm


def _normal(slices, images):
  """The unit vector [3] that all slices are perpendicular to."""
  axes = images[0].axes
  row, column = np.split(axes, 2)
  products = row @ row, column @ column, row @ column
  if not np.allclose(products, (1, 1, 0), atol=TILT):
    raise BadRecord("ImageOrientationPatient is no pair of perpendicular unit vectors")
  for image in images:
    if np.abs(image.axes - axes).max() > TILT:
      raise BadRecord("the slices are not parallel")
  for name, each in slices.items():
    extent = np.ptp([image.position for image in each], axis=0)
    if extent.max() > SAME_SLICE_MM:
      raise BadRecord(f"{name} holds images of several positions")
  return np.cross(row, column)


def _slice_distance(slices, normal, flags):
  """mm; remarked where it varies, or where slices are shifted in their plane."""
  positions = [images[0].position for images in slices.values()]
  steps = np.diff(positions, axis=0)
  along = steps @ normal
  mm = np.median(along)
  distances = np.abs(along)
  apart = f"slices lie {distances.min():.1f} to {distances.max():.1f} mm apart"
  if abs(mm) < SAME_SLICE_MM:
    raise BadRecord(f"{apart}, not in one direction or not evenly")
  unevenness = np.abs(along / mm - 1).max()
  if unevenness > UNEVEN:
    raise BadRecord(f"{apart}, not in one direction or not evenly")
  if unevenness > UNEVEN_FLAG:
    flags.append(apart)
  in_plane = steps - np.outer(along, normal)
  shift = np.linalg.norm(in_plane, axis=1).max()
  if shift > SHIFT_FLAG_MM:
    flags.append(f"slices are shifted in their plane by up to {shift:.1f} mm from one to the next")
  return abs(mm)
