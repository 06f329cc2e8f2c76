"""A cohort on disk: ArrayRecord files that TFDS reads, one record a recording, and `cohort.json`
that says what they hold.

    COHORT/cohort.json             written last: its presence means the cohort is complete
    COHORT/ecg_cmr/1.0.0/...       TFDS's own layout: features.json, dataset_info.json, shards
    COHORT/subjects.npz            hashes of the subjects of each split
    COHORT/quality.{json,html}     what was read, what was rejected and why

Opened here; mmcl_jax.data.builder makes it. TFDS can open it, but is not used for that: it imports
whatever module features.json names.
"""

import hashlib
import json
import os
import pathlib
import re
from concurrent import futures
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source

from mmcl_jax.data import schema
from mmcl_jax.errors import DamagedRecord, UserError, is_environment
from mmcl_jax.support.files import arrays
from mmcl_jax.support.typed import wrong_entries

NAME, VERSION = "ecg_cmr", "1.0.0"
SHARD = re.compile(
  rf"{NAME}/\d+\.\d+\.\d+/{NAME}-({'|'.join(schema.SPLITS)})\.array_record-\d{{5}}-of-\d{{5}}"
)
CHECKED = re.compile(rf"subjects\.npz|{SHARD.pattern}")  # what cohort.json has checksums of
LABELS = ("phenotypes", "diseases", "covariates")  # whose columns cohort.json names
FEATURES = "tensorflow_datasets.core.features"
DTYPES = {np.dtype(name).name for name in "?bBhHiIqQefd"}  # of the fields of a record
# bytes at both ends of a file, compared at every opening; ArrayRecord's table of records is there
ENDS = 2**17


class CohortInfo(TypedDict):
  """cohort.json: what a cohort holds. By kind of label, in the order of the columns: {name: unit}
  of phenotypes and covariates (a list of names where the units are not known), and the names of
  diseases; by split: how many records there are, and how many with an ECG and with CMR."""

  schema_version: int
  fingerprint: str  # of what the records hold, wherever they lie
  plan: str  # digest of the inputs and settings that it was made of
  source: str
  ecg_profile: str  # normalisation of the ECG (mmcl_jax.data.preprocess.ecg)
  phenotypes: dict[str, str]
  diseases: list[str]
  covariates: dict[str, str] | list[str]
  counts: dict[str, int]
  with_ecg: dict[str, int]
  with_cmr: dict[str, int]
  shapes: dict[str, list[int]]  # of the fields of a record
  # "phenotypes", "covariates" -> name -> [mean, SD] in train, None where there is no spread
  train_statistics: dict[str, dict[str, list[float] | None]]
  files: dict[str, int]  # shard -> its length in bytes
  checksums: dict[str, list[str]]  # file -> checksum of its ends, and of the whole
  salt_tag: NotRequired[str]  # tells cohorts whose subjects have one salt
  synthetic: NotRequired[bool]


class Cohort(NamedTuple):
  """An opened cohort: `info` is cohort.json; `splits[name]` is a random-access, picklable source of
  records.

  `content` is a digest of the lengths and ends of the files as this host finds them, whatever
  cohort.json says.
  """

  path: str
  info: CohortInfo
  splits: dict[str, Any]
  content: str = ""

  @property
  def fingerprint(self) -> str:
    return self.info["fingerprint"]


class Records:
  """The records of a split, random-access and picklable; one that cannot be read is a UserError
  that names it."""

  def __init__(self, files: list[str], described: tfds.features.FeaturesDict, name: str):
    self.source = array_record_data_source.ArrayRecordDataSource(files)
    self.described = described
    self.name = name

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    if not -len(self) <= i < len(self):
      raise IndexError(i)
    try:
      return self.described.deserialize_example_np(self.source[i])
    # what ArrayRecord and tfds make of a damaged chunk, which carries a hash, or of a lost disk
    except Exception as error:
      text = " ".join(str(error).split())[:150]
      if is_environment(error) or re.search(r"\b(open|p?read|stat|mmap)\(\) failed", text):
        raise UserError(
          f"record {i} of {self.name} cannot be read now ({text}); the same command goes on when "
          "the disk is there again"
        ) from None
      raise DamagedRecord(
        f"record {i} of {self.name} cannot be read ({text}); copy the cohort's files again or "
        "prepare it again"
      ) from None


def load(path: str) -> Cohort:
  """Opens a cohort.

  Args:
    path: a folder made by `mmcl prepare`.

  Raises:
    UserError: what is missing, damaged or of another version.
  """
  folder = pathlib.Path(path)
  if not path or not folder.is_dir():
    raise UserError(
      f"no cohort at {path!r}: expected a folder made by `mmcl prepare`; set --config.data.cohort "
      "or --cohort"
    )
  file = folder / "cohort.json"
  if not file.is_file():
    raise UserError(
      f"{path} holds no cohort.json, so it is empty or its preparation did not finish; "
      "make it with `mmcl prepare`"
    )
  try:
    info = json.loads(file.read_text())
    version = info["schema_version"]
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(
      f"{file} is not a cohort description ({error!r}); prepare the cohort again"
    ) from None
  if version != schema.SCHEMA_VERSION:
    raise UserError(
      f"{file} has schema version {version}, this program reads {schema.SCHEMA_VERSION}; "
      "prepare the cohort again with this version"
    )
  if wrong := malformed(info):
    raise UserError(
      f"{file}: {', '.join(wrong)} is missing or not in the form that `mmcl prepare` writes; copy "
      "the file again or prepare the cohort again"
    )
  content = check_ends(folder, info)
  described = features(read_layout(folder, info))
  splits = {}
  try:
    for split, files in shards(folder, info).items():
      splits[split] = []
      if files:
        splits[split] = Records(files, described, f"{split} in {path}")
  except Exception as error:  # ArrayRecord raises whatever the broken file leads to
    raise UserError(
      f"the records under {path} cannot be opened ({type(error).__name__}: {str(error)[:200]}); "
      "prepare the cohort again"
    ) from None
  if wrong := [split for split in schema.SPLITS if len(splits[split]) != info["counts"][split]]:
    raise UserError(
      f"{path} has another number of records in {', '.join(wrong)} than cohort.json says; copy its "
      "files again or prepare the cohort again"
    )
  return Cohort(str(path), info, splits, content)


def features(layout: dict[str, tuple[str, list[int]]]) -> tfds.features.FeaturesDict:
  """TFDS features of a stored record of the fields {name: (dtype, shape)}.

  `encoding="bytes"` is 10 to 20 times faster to write than none.
  """
  tensors = {}
  for name, (dtype, shape) in layout.items():
    tensors[name] = tfds.features.Tensor(
      shape=shape,
      dtype=np.dtype(dtype),
      encoding="bytes" if np.prod(shape) else "none",
    )
  return tfds.features.FeaturesDict(tensors)


def read_layout(folder: pathlib.Path, info: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
  """{field: (dtype, shape)} from features.json; a UserError for anything but tensors, and no class
  is looked up."""
  shard = folder / next(iter(info["files"]))
  file = shard.parent / "features.json"
  layout, wrong = {}, []
  try:
    described = json.loads(file.read_text())
    if described["pythonClassName"] != f"{FEATURES}.features_dict.FeaturesDict":
      wrong.append(described["pythonClassName"])
    for name, entry in described["featuresDict"]["features"].items():
      if entry["pythonClassName"] != f"{FEATURES}.tensor_feature.Tensor":
        wrong.append(entry["pythonClassName"])
      tensor = entry["tensor"]
      shape = [int(length) for length in tensor["shape"].get("dimensions", [])]
      layout[name] = tensor["dtype"], shape
  except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    if not wrong:
      raise UserError(
        f"{file} is not readable ({type(error).__name__}); copy it again or prepare the cohort "
        "again"
      ) from None
  if wrong:
    raise UserError(
      f"{file} names {str(wrong[0])[:100]!r}, a class that mmcl prepare does not write and that is "
      "not loaded; expected tensors: copy it again, and use no cohort from a source that you do "
      "not trust"
    )
  shapes = {name: shape for name, (_, shape) in layout.items()}
  dtypes = [dtype for dtype, _ in layout.values()]
  storable = all(isinstance(dtype, str) and dtype in DTYPES for dtype in dtypes)
  if not storable or shapes != info["shapes"]:
    raise UserError(
      f"{file} and cohort.json list different fields; copy them again or prepare the cohort again"
    )
  return layout


def shards(folder: pathlib.Path, info: dict[str, Any]) -> dict[str, list[str]]:
  """The files of each split, in order."""
  files = {split: [] for split in schema.SPLITS}
  for name in sorted(info["files"]):
    split = SHARD.fullmatch(name)[1]
    files[split].append(str(folder / name))
  return files


def check_ends(folder: pathlib.Path, info: dict[str, Any]) -> str:
  """The digest of what is there (Cohort.content); a UserError where a file's length or ends are not
  as written."""
  written = info["checksums"]

  def of(name: str) -> str:
    file = folder / name
    expected = info["files"].get(name)
    size = None
    try:
      size = file.stat().st_size
      if file.is_file() and expected in (None, size):
        return ends(file)
    except OSError:
      size = None
    problem = "is missing" if size is None else f"has {size} bytes"
    says = "" if expected is None else f"; cohort.json says {expected} bytes"
    raise UserError(f"{file} {problem}{says}: copy the file again or prepare the cohort again")

  names = sorted({*info["files"], *written})
  with futures.ThreadPoolExecutor(16) as threads:  # on a network file system each takes a while
    present = dict(zip(names, threads.map(of, names)))
  if wrong := [name for name in written if written[name][0] != present[name]]:
    raise UserError(
      f"{folder / wrong[0]} is not the file that was written with this cohort: its beginning or "
      "end differs from what cohort.json says; copy it again or prepare the cohort again"
    )
  return hashlib.sha256(json.dumps(present).encode()).hexdigest()


def ends(file: pathlib.Path) -> str:
  """Checksum of the length of a file and of ENDS bytes at its beginning and its end."""
  with open(file, "rb") as f:
    size = os.fstat(f.fileno()).st_size
    digest = hashlib.sha256(b"%d " % size + f.read(ENDS))
    f.seek(max(size - ENDS, 0))
    digest.update(f.read())
    return digest.hexdigest()


def checksum(file: pathlib.Path) -> str:
  with open(file, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def check(cohort: Cohort) -> int:
  """Compares every file with its checksum and returns their number; a UserError names the first
  that differs."""
  for name, (_, written) in cohort.info["checksums"].items():
    if checksum(pathlib.Path(cohort.path, name)) != written:
      raise UserError(
        f"{cohort.path}/{name} is not the file that was written with this cohort: its checksum "
        "differs; copy it again or prepare the cohort again"
      )
  return len(cohort.info["checksums"])


def malformed(info) -> list[str]:
  """The entries of cohort.json that a program would stumble over."""
  wrong = wrong_entries(info, CohortInfo)
  if wrong:
    return wrong
  for name in ("counts", "with_ecg", "with_cmr"):
    if set(info[name]) != set(schema.SPLITS) or min(info[name].values()) < 0:
      wrong.append(name)
  if any(size < 0 for shape in info["shapes"].values() for size in shape):
    wrong.append("shapes")
  files = info["files"]
  if not files or not all(map(SHARD.fullmatch, files)) or min(files.values()) < 0:
    wrong.append("files")
  for name, pair in info["checksums"].items():
    if not CHECKED.fullmatch(name) or len(pair) != 2:
      wrong.append("checksums")
      break
  # what one entry says of another
  for name in LABELS:
    if info["shapes"].get(name) != [len(info[name])]:
      wrong.append(name)
  for kind, moments in info["train_statistics"].items():
    lengths = [len(pair) for pair in moments.values() if pair is not None]
    other_names = kind in info and set(moments) != set(info[kind])
    if other_names or any(length != 2 for length in lengths):
      wrong.append(f"train_statistics of {kind}")
  if not {"phenotypes", "covariates"} <= set(info["train_statistics"]):
    wrong.append("train_statistics")
  return wrong


def subjects(cohort: Cohort) -> dict[str, np.ndarray]:
  """{split: uint32 [N, 2]}, the hashes of its subjects, without reading a record."""
  path = pathlib.Path(cohort.path) / "subjects.npz"
  if not path.is_file():
    raise UserError(
      f"{path} is missing: copy it again, or prepare the cohort again with this version"
    )
  try:
    content = arrays(path)
    hashes = {}
    for split in schema.SPLITS:
      hashes[split] = np.asarray(content[split], np.uint32).reshape(-1, 2)
  except Exception as error:  # see `arrays`
    raise UserError(
      f"{path} is not readable ({error}); copy it again, or prepare the cohort again"
    ) from None
  counts = cohort.info["counts"]
  if wrong := [split for split, rows in hashes.items() if len(rows) != counts[split]]:
    raise UserError(
      f"{path} does not list the subjects of {', '.join(wrong)}; copy it again, or prepare the "
      "cohort again"
    )
  return hashes


def train_statistics(cohort: Cohort, field: str) -> tuple[np.ndarray, np.ndarray]:
  """Mean and SD over the training split of the columns of `field`, "phenotypes" or "covariates".

  Returns:
    mean, sd: float32 [K], in the cohort's order and units; NaN where fewer than two values are
      known or all are equal.
  """
  moments = cohort.info["train_statistics"][field]
  unknown = np.nan, np.nan
  pairs = [moments[name] or unknown for name in cohort.info[field]]
  mean, sd = np.array(pairs, np.float32).reshape(-1, 2).T
  return mean, sd
