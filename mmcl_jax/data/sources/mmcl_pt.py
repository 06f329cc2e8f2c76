"""The prepared files of the MMCL reference project (oetu/MMCL-ECG-CMR): ECG, images and labels, by
position.

    mmcl prepare mmcl_pt --input=FOLDER --out=COHORT

    ecgs_SPLIT_*.pt              [12, T] each, baseline removed and normalised already: taken as
    they are images_SPLIT_*.pt            [C, H, W] each, may be absent; all channels are kept
    labels_SPLIT_TARGET_all.pt   a number or [K] each: a disease where all are 0 or 1, else a
      phenotype without unit

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

NAME = re.compile(
  rf"(ecgs|images)_({'|'.join(schema.SPLITS)})_.+\.pt|labels_({'|'.join(schema.SPLITS)})_(.+)_all\.pt"
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
  parts = {
    split: {kind: _open(path) for kind, path in found.items()} for split, found in files.items()
  }
  for split, found in parts.items():
    if len({len(part) for part in found.values()}) > 1:
      raise UserError(
        f"the files of {split} are not of one length: "
        + ", ".join(f"{len(part)} in {files[split][kind].name}" for kind, part in found.items())
        + "; they are joined by position, so give those that were made together"
      )
  lengths = Counter(_shape(ecg)[-1:] for part in parts.values() for ecg in part["ecgs"])
  samples = max(lengths)[0] if len(lengths) == 1 and max(lengths) else schema.ECG_SAMPLES
  shapes = Counter(_shape(image) for part in parts.values() for image in part.get("images", ()))
  shape = shapes.most_common(1)[0][0] if shapes else None
  diseases, phenotypes = _labels(parts, files)

  items = []
  for split, part in parts.items():
    paths = str(files[split]["ecgs"]), str(files[split]["images"]) if "images" in part else None
    columns = [
      np.stack([known[split] for known in group.values()], 1)
      if group
      else np.empty((len(part["ecgs"]), 0))
      for group in (phenotypes, diseases)
    ]
    for index, (values, states) in enumerate(
      zip(*(x.astype(np.float32) for x in columns), strict=True)
    ):
      items.append(Item(identify(f"{split}/{index}"), 0, Key(paths, split, index, values, states)))
  info = {
    "source": "files of oetu/MMCL-ECG-CMR",
    "splits_given": True,
    "ecg_profile": PROFILE,
    "ecg_is_normalised": True,
    "phenotypes": dict.fromkeys(phenotypes, ""),
    "diseases": list(diseases),
    "covariates": schema.COVARIATES,
  }
  steps = {
    "recordings": len(items),
    "with an image": sum(item.key.paths[1] is not None for item in items),
    ".pt files of other names, not used": unused,
  }
  return Plan(items, functools.partial(read, samples, shape), info, steps, split=split_of)


def split_of(item: Item) -> str:
  return item.key.split


def read(
  samples: int, shape: tuple[int, ...] | None, item: Item
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """(record, flags) of one position; its ECG must have `samples` samples, its image the shape
  `shape`."""
  key, flags = item.key, ()
  found = load(key.paths[0])[key.index]
  if _shape(found) != (len(schema.LEADS), samples):
    raise BadRecord(f"an ECG of shape {_shape(found)}; expected {(len(schema.LEADS), samples)}")
  ecg = np.array(found, np.float32).reshape(len(schema.LEADS), samples)
  if not np.isfinite(ecg).all() or not np.ptp(ecg):
    raise BadRecord("an ECG with values that are not finite, or all the same")
  record = {
    "has_ecg": np.True_,
    "has_cmr": np.bool_(key.paths[1]),
    "ecg": ecg,
    "phenotypes": key.phenotypes,
    "diseases": key.diseases,
    "covariates": np.full(len(schema.COVARIATES), np.nan, np.float32),
  }
  if shape:
    image = np.zeros(shape, np.uint8)
    if key.paths[1]:
      image, flags = to_uint8(load(key.paths[1])[key.index], shape)
    record["three_frames"] = image
  return record, flags


def to_uint8(image, shape: tuple[int, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
  """(uint8 [C, H, W], flags): uint8 as it is, values from 0 to 1 times 255, others from minimum to
  maximum."""
  if len(shape) != 3 or _shape(image) != shape:
    raise BadRecord(
      f"an image of shape {_shape(image)}; expected {shape if len(shape) == 3 else '[C, H, W]'}"
    )
  image = image.reshape(shape)
  if image.dtype == np.uint8:
    return image.copy(), ()
  image = image.astype(np.float64)
  low, high = image.min(), image.max()
  if not np.isfinite([low, high]).all():
    raise BadRecord("an image with values that are not finite")
  if low >= 0 and high <= 1:
    return np.round(image * 255).astype(np.uint8), ()
  if low == high:
    raise BadRecord("an image whose values are all the same")
  scaled = np.round((image - low) / (high - low) * 255).astype(np.uint8)
  return scaled, ("image scaled from its minimum to its maximum",)


def _files(inputs):
  """({split: {"ecgs", "images" or a target: path}}, number of .pt files with other names)."""
  paths = sorted(path for path in map(Path, walk(inputs)) if path.suffix == ".pt")
  files, unused = {}, 0
  for path in paths:
    match = NAME.fullmatch(path.name)
    if not match:
      unused += 1
      continue
    kind, split = (match[1], match[2]) if match[1] else (match[4], match[3])
    if files.setdefault(split, {}).setdefault(kind, path) != path:
      raise UserError(
        f"{files[split][kind].name} and {path.name} are both {kind} of {split}; expected one: give the "
        "files that belong together in --input"
      )
  without = [split for split, found in files.items() if "ecgs" not in found]
  if without or not files:
    raise UserError(
      f"--input={' '.join(map(str, inputs))}: {len(paths)} .pt files, {unused} of other names, and no "
      f"ecgs_{'/'.join(without or schema.SPLITS)}_*.pt; expected them beside images_* and labels_*"
    )
  return {split: files[split] for split in schema.SPLITS if split in files}, unused


def _open(path):
  """A list of tensors, or one tensor whose first axis counts the people."""
  try:
    part = load(str(path))
  except BadRecord as error:
    raise UserError(f"{path}: {error}") from None
  if not isinstance(part, list | tuple | np.ndarray) or not np.shape(
    part if isinstance(part, np.ndarray) else [0]
  ):
    raise UserError(
      f"{path} holds a {type(part).__name__}; expected a list of tensors, or one tensor of them all"
    )
  return part


def _shape(tensor):
  """Without leading axes of length 1; () for what is no tensor."""
  shape = np.shape(tensor) if isinstance(tensor, np.ndarray) else ()
  while len(shape) > 2 and shape[0] == 1 and (len(shape) > 3 or shape[1] == len(schema.LEADS)):
    shape = shape[1:]
  return shape


def _labels(parts, files):
  """Two dicts, of diseases and of phenotypes: name -> {split: float64 [N]}, NaN where a split lacks
  it."""
  columns = {}
  for split, found in parts.items():
    for target in found.keys() - {"ecgs", "images"}:
      try:
        values = np.asarray([np.asarray(x, np.float64) for x in found[target]])
        values = values.reshape(len(values), -1)
      except (TypeError, ValueError):
        raise UserError(
          f"{files[split][target]} holds what are not numbers; expected one, or K, a person"
        ) from None
      for k in range(values.shape[1]):
        columns.setdefault(target if values.shape[1] == 1 else f"{target}_{k}", {})[split] = values[
          :, k
        ]
  for known in columns.values():
    for split in parts.keys() - known.keys():
      known[split] = np.full(len(parts[split]["ecgs"]), np.nan)
  diseases, phenotypes = {}, {}
  for name in sorted(columns):
    values = np.concatenate([*columns[name].values()])
    binary = np.isin(values[~np.isnan(values)], (0, 1)).all()
    (diseases if binary else phenotypes)[name] = columns[name]
  return diseases, phenotypes
