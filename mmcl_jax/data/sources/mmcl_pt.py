"""The prepared files of the MMCL reference project (oetu/MMCL-ECG-CMR): ECG, images and labels, by
position.

    mmcl prepare mmcl_pt --input=FOLDER --out=COHORT

    ecgs_SPLIT_*.pt              [12, T] each, baseline removed and normalised: taken as they are
    images_SPLIT_*.pt            [C, H, W] each, may be absent; all channels are kept
    labels_SPLIT_TARGET_all.pt   a number or [K] each: a disease where all are 0 or 1,
                                 else a phenotype without unit

SPLIT is train, val or test. No participant is named in the files: position i of a split is one
person in all of them, each position counts as a person of its own, and the splits are the files'.
"""

import functools
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmcl_jax.data import schema
from mmcl_jax.data.readers import mmcl_pt as reader
from mmcl_jax.data.readers.files import walk
from mmcl_jax.data.sources import Item, Plan
from mmcl_jax.errors import BadRecord, UserError

_SPLIT = "|".join(schema.SPLITS)
NAMES = (  # kind and split of the names of files
  re.compile(rf"(?P<kind>ecgs|images)_(?P<split>{_SPLIT})_.+\.pt"),
  re.compile(rf"labels_(?P<split>{_SPLIT})_(?P<kind>.+)_all\.pt"),
)
TAKES = ("input",)
PROFILE = "mmcl"  # of mmcl_jax.data.preprocess.ecg: what "noBase_gn" in the files' names stands for
# mapped: an open file takes little memory, whatever its size
load = functools.lru_cache(maxsize=16)(reader.load)


class Key(NamedTuple):
  """What `read` needs."""

  paths: tuple[str, str | None]  # of the ECGs and of the images
  split: str
  index: int
  phenotypes: np.ndarray  # float32 [K]
  diseases: np.ndarray  # float32 [C]


def plan(options, identify) -> Plan:
  """`options`: `input` (folders, or the files themselves)."""
  files, unused = _files(options.input)
  parts = {}  # split -> kind -> tensors, by position
  for split, paths in files.items():
    part = {kind: _open(path) for kind, path in paths.items()}
    _check_lengths(split, part, paths)
    parts[split] = part
  samples, shape = _shapes(parts.values())
  diseases, phenotypes = _labels(parts, files)

  items = []
  for split, part in parts.items():
    paths = str(files[split]["ecgs"]), None
    if "images" in part:
      paths = str(files[split]["ecgs"]), str(files[split]["images"])
    count = len(part["ecgs"])
    values = _columns(phenotypes, split, count)
    states = _columns(diseases, split, count)
    for index in range(count):
      key = Key(paths, split, index, values[index], states[index])
      subject = identify(f"{split}/{index}")
      items.append(Item(subject, 0, key))
  info = {
    "source": "files of oetu/MMCL-ECG-CMR",
    "splits_given": True,
    "ecg_profile": PROFILE,
    "ecg_is_normalised": True,
    "phenotypes": dict.fromkeys(phenotypes, ""),
    "diseases": list(diseases),
    "covariates": schema.COVARIATES,
  }
  images = [part["images"] for part in parts.values() if "images" in part]
  steps = {
    "recordings": len(items),
    "with an image": sum(map(len, images)),
    ".pt files of other names, not used": unused,
  }
  reads = functools.partial(read, samples, shape)
  return Plan(items, reads, info, steps, split=split_of)


def _shapes(parts):
  """(samples of the ECGs, the commonest shape of the images or None)."""
  lengths = Counter()
  shapes = Counter()
  for part in parts:
    for ecg in part["ecgs"]:
      lengths[_shape(ecg)[-1:]] += 1
    for image in part.get("images", ()):
      shapes[_shape(image)] += 1
  samples = schema.ECG_SAMPLES
  if len(lengths) == 1 and max(lengths):
    (samples,) = max(lengths)
  if not shapes:
    return samples, None
  [(shape, _)] = shapes.most_common(1)
  return samples, shape


def _check_lengths(split, part, paths):
  lengths = {paths[kind].name: len(tensors) for kind, tensors in part.items()}
  if len(set(lengths.values())) > 1:
    listed = [f"{length} in {name}" for name, length in lengths.items()]
    raise UserError(
      f"the files of {split} are not of one length: {', '.join(listed)}; they are joined by "
      "position, so give those that were made together"
    )


def _columns(labels, split, count):
  """float32 [count, len(labels)] of the labels of a split."""
  columns = np.empty((count, len(labels)), np.float32)
  for place, by_split in enumerate(labels.values()):
    columns[:, place] = by_split[split]
  return columns


def split_of(item: Item) -> str:
  return item.key.split


def read(
  samples: int,
  shape: tuple[int, ...] | None,
  item: Item,
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """(record, flags) of one position; its ECG must have `samples` samples, its image the shape
  `shape`."""
  key, flags = item.key, ()
  ecgs, images = key.paths
  tensor = load(ecgs)[key.index]
  expected = len(schema.LEADS), samples
  if _shape(tensor) != expected:
    raise BadRecord(f"an ECG of shape {_shape(tensor)}; expected {expected}")
  ecg = np.array(tensor, np.float32).reshape(expected)
  if not np.isfinite(ecg).all() or not np.ptp(ecg):
    raise BadRecord("an ECG with values that are not finite, or all the same")
  record = {
    "has_ecg": np.True_,
    "has_cmr": np.bool_(images),
    "ecg": ecg,
    "phenotypes": key.phenotypes,
    "diseases": key.diseases,
    "covariates": np.full(len(schema.COVARIATES), np.nan, np.float32),
  }
  if shape:
    image = np.zeros(shape, np.uint8)
    if images:
      tensor = load(images)[key.index]
      image, flags = to_uint8(tensor, shape)
    record["three_frames"] = image
  return record, flags


def to_uint8(image, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
  """(uint8 [C, H, W], flags): uint8 as it is, values from 0 to 1 times 255, others from minimum to
  maximum."""
  if len(shape) != 3 or _shape(image) != shape:
    expected = shape if len(shape) == 3 else "[C, H, W]"
    raise BadRecord(f"an image of shape {_shape(image)}; expected {expected}")
  image = image.reshape(shape)
  if image.dtype == np.uint8:
    return image.copy(), ()
  image = image.astype(np.float64)
  low = image.min()
  high = image.max()
  if not np.isfinite([low, high]).all():
    raise BadRecord("an image with values that are not finite")
  if low >= 0 and high <= 1:
    grey = np.round(image * 255)
    return grey.astype(np.uint8), ()
  if low == high:
    raise BadRecord("an image whose values are all the same")
  share = (image - low) / (high - low)
  grey = np.round(share * 255)
  return grey.astype(np.uint8), ("image scaled from its minimum to its maximum",)


def _files(inputs):
  """({split: {"ecgs", "images" or a target: path}}, number of .pt files with other names)."""
  paths = [path for path in map(Path, walk(inputs)) if path.suffix == ".pt"]
  files, unused = {}, 0
  for path in sorted(paths):
    matches = [pattern.fullmatch(path.name) for pattern in NAMES]
    match = matches[0] or matches[1]
    if not match:
      unused += 1
      continue
    kind = match["kind"]
    split = match["split"]
    other = files.setdefault(split, {}).setdefault(kind, path)
    if other != path:
      raise UserError(
        f"{other.name} and {path.name} are both {kind} of {split}; expected one: give "
        "the files that belong together in --input"
      )
  without = [split for split, paths_of in files.items() if "ecgs" not in paths_of]
  if without or not files:
    given = " ".join(map(str, inputs))
    splits = "/".join(without or schema.SPLITS)
    raise UserError(
      f"--input={given}: {len(paths)} .pt files, {unused} of other names, and "
      f"no ecgs_{splits}_*.pt; expected them beside images_* and labels_*"
    )
  in_order = {split: files[split] for split in schema.SPLITS if split in files}
  return in_order, unused


def _open(path):
  """A list of tensors, or one tensor whose first axis counts the people."""
  try:
    part = load(str(path))
  except BadRecord as error:
    raise UserError(f"{path}: {error}") from None
  of_one_tensor = isinstance(part, np.ndarray) and part.ndim > 0
  if not of_one_tensor and not isinstance(part, list | tuple):
    raise UserError(
      f"{path} holds a {type(part).__name__}; expected a list of tensors, or one tensor of them all"
    )
  return part


def _shape(tensor):
  """Without leading axes of length 1; () for what is no tensor."""
  if not isinstance(tensor, np.ndarray):
    return ()
  shape = tensor.shape
  while len(shape) > 2 and shape[0] == 1:
    is_image = len(shape) == 3 and shape[1] != len(schema.LEADS)
    if is_image:
      break
    shape = shape[1:]
  return shape


def _labels(parts, files):
  """Two dicts, of diseases and of phenotypes: name -> {split: float64 [N]}, NaN where a split lacks
  it."""
  columns = {}
  for split, part in parts.items():
    for target in part.keys() - {"ecgs", "images"}:
      values = _numbers(part[target], files[split][target])
      several = values.shape[1] != 1
      for k, column in enumerate(values.T):
        name = f"{target}_{k}" if several else target
        columns.setdefault(name, {})[split] = column
  diseases, phenotypes = {}, {}
  for name, by_split in sorted(columns.items()):
    for split in parts.keys() - by_split.keys():
      count = len(parts[split]["ecgs"])
      by_split[split] = np.full(count, np.nan)
    values = np.concatenate(list(by_split.values()))
    stated = values[~np.isnan(values)]
    if np.isin(stated, (0, 1)).all():
      diseases[name] = by_split
    else:
      phenotypes[name] = by_split
  return diseases, phenotypes


def _numbers(labels, path):
  """float64 [N, K]"""
  try:
    values = np.asarray([np.asarray(label, np.float64) for label in labels])
    return values.reshape(len(values), -1)
  except (TypeError, ValueError):
    raise UserError(f"{path} holds what are not numbers; expected one, or K, a person") from None
