"""A cohort on disk: ArrayRecord files that TFDS reads, one record a recording, and `cohort.json` that says what they hold.

    COHORT/cohort.json               written last: its presence means the cohort is whole
    COHORT/ecg_cmr/1.0.0/...         TFDS's own layout (features.json, dataset_info.json, ArrayRecord shards)
    COHORT/subjects.npz              hashes of the subjects of each split
    COHORT/quality.{json,html}       what was read, what was rejected and why

Opened here; mmcl_jax.data.builder makes it.
"""

import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from mmcl_jax.data import schema
from mmcl_jax.errors import DamagedRecord, UserError, is_environment

LABELS = ("phenotypes", "diseases", "covariates")  # whose columns cohort.json names


class Cohort(NamedTuple):
  """An opened cohort: `info` is cohort.json; `splits[name]` is a random-access, picklable source of records."""

  path: str
  info: dict[str, Any]
  splits: dict[str, Any]

  @property
  def fingerprint(self) -> str:
    return self.info["fingerprint"]


class Records:
  """The records of a split, random-access and picklable; one that cannot be read is a UserError that names it."""

  def __init__(self, source, name: str):
    self.source, self.name = source, name

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    if not -len(self) <= i < len(self):
      raise IndexError(i)
    try:
      return self.source[i]
    except Exception as error:  # what ArrayRecord and tfds make of a damaged chunk, which carries a hash, or of a lost disk
      text = " ".join(str(error).split())[:150]
      if is_environment(error) or re.search(r"\b(open|p?read|stat|mmap)\(\) failed", text):
        raise UserError(f"record {i} of {self.name} cannot be read now ({text}); the same command goes on when the disk is there "
                        "again") from None
      raise DamagedRecord(f"record {i} of {self.name} cannot be read ({text}); copy the cohort's files again or prepare it "
                          "again") from None


def load(path: str) -> Cohort:
  """Opens a cohort; a UserError says what is missing or of another version."""
  folder = pathlib.Path(path)
  if not path or not folder.is_dir():
    raise UserError(f"no cohort at {path!r}: expected a folder made by `mmcl prepare`; set --config.data.cohort or --cohort")
  file = folder / "cohort.json"
  if not file.is_file():
    raise UserError(f"{path} holds no cohort.json, so it is empty or its preparation did not finish; "
                    "make it with `mmcl prepare`")
  try:
    info = json.loads(file.read_text())
    version = info["schema_version"]
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise UserError(f"{file} is not a cohort description ({error!r}); prepare the cohort again") from None
  if version != schema.SCHEMA_VERSION:
    raise UserError(f"{file} has schema version {version}, this program reads {schema.SCHEMA_VERSION}; "
                    "prepare the cohort again with this version")
  if wrong := malformed(info):
    raise UserError(f"{file}: {', '.join(wrong)} is missing or not in the form that `mmcl prepare` writes; copy the file again or "
                    "prepare the cohort again")
  for name, size in info["files"].items():
    try:
      found = (folder / name).stat().st_size
    except OSError:
      found = None
    if found != size:
      raise UserError(f"{folder / name} {'is missing' if found is None else f'has {found} bytes'}; cohort.json says {size} "
                      "bytes: copy the file again or prepare the cohort again")
  # Cohorts that were made before these were counted hold pairs only.
  info = {"with_ecg": info["counts"], "with_cmr": info["counts"], **info}
  try:
    read_only = tfds.builder_from_directory(str(next(folder.glob("ecg_cmr/*"))))
    if set(read_only.info.features) != set(info["shapes"]):
      raise ValueError("features.json and cohort.json list different fields")
    splits = {split: Records(read_only.as_data_source(split), f"{split} in {path}") if info["counts"][split] else []
              for split in schema.SPLITS}
  except Exception as error:  # tfds raises whatever the broken file leads to
    raise UserError(f"the records under {path} cannot be opened ({type(error).__name__}: {str(error)[:200]}); "
                    "prepare the cohort again") from None
  if wrong := [split for split in schema.SPLITS if len(splits[split]) != info["counts"][split]]:
    raise UserError(f"{path} has another number of records in {', '.join(wrong)} than cohort.json says; copy its files again or "
                    "prepare the cohort again")
  return Cohort(str(path), info, splits)


def malformed(info: dict[str, Any]) -> list[str]:
  """The entries of cohort.json that a program would stumble over."""
  is_a = lambda kind: lambda x: isinstance(x, kind) and not isinstance(x, bool)
  of = lambda key, value: lambda x: isinstance(x, dict) and all(key(k) and value(v) for k, v in x.items())
  listed = lambda one, lengths=None: lambda x: isinstance(x, list) and all(map(one, x)) and (lengths is None or len(x) == lengths)
  word, natural, number = is_a(str), lambda x: is_a(int)(x) and x >= 0, is_a((int, float))
  counts = lambda x: of(word, natural)(x) and set(x) == set(schema.SPLITS)
  named = lambda x: of(word, word)(x) or listed(word)(x)
  moments = lambda x: x is None or listed(number, 2)(x)
  known = lambda x: of(word, of(word, moments))(x) and {"phenotypes", "covariates"} <= set(x)
  form = {"fingerprint": word, "source": word, "ecg_profile": word, "phenotypes": of(word, word), "diseases": listed(word),
          "covariates": named, "counts": counts, "shapes": of(word, listed(natural)), "files": of(word, natural)}
  later = {"with_ecg": counts, "with_cmr": counts, "train_statistics": known, "salt_tag": word}  # absent from older cohorts
  wrong = [name for name, right in form.items() if name not in info or not right(info[name])]
  wrong += [name for name, right in later.items() if info.get(name) is not None and not right(info[name])]
  if not wrong:  # what one entry says of another
    wrong += [name for name in LABELS if info["shapes"].get(name) != [len(info[name])]]
    wrong += [f"train_statistics of {kind}" for kind, found in (info.get("train_statistics") or {}).items()
              if kind in info and set(found) != set(info[kind])]
  return wrong


def subjects(cohort: Cohort) -> dict[str, np.ndarray]:
  """{split: uint32 [N, 2]}, the hashes of its subjects, without reading a record."""
  path = pathlib.Path(cohort.path) / "subjects.npz"
  if not path.is_file():
    raise UserError(f"{path} is missing: copy it again, or prepare the cohort again with this version")
  try:
    with np.load(path, allow_pickle=False) as file:
      found = {split: np.asarray(file[split], np.uint32).reshape(-1, 2) for split in schema.SPLITS}
  except Exception as error:  # a damaged archive raises zlib's, zipfile's and NumPy's errors alike
    raise UserError(f"{path} is not readable ({error}); copy it again, or prepare the cohort again") from None
  if wrong := [split for split, rows in found.items() if len(rows) != cohort.info["counts"][split]]:
    raise UserError(f"{path} does not list the subjects of {', '.join(wrong)}; copy it again, or prepare the cohort again")
  return found


def train_statistics(cohort: Cohort, field: str) -> tuple[np.ndarray, np.ndarray]:
  """Mean and SD over the training split of the columns of `field`, "phenotypes" or "covariates".

  Returns:
    mean, sd: float32 [K], in the cohort's order and units; NaN where fewer than two values are known or all are equal.

  Raises:
    UserError: the cohort was made before these were kept.
  """
  if "train_statistics" not in cohort.info:
    raise UserError(f"{cohort.path}/cohort.json has no train_statistics, so an earlier version made it; expected means and "
                    f"SDs of its {field}: prepare the cohort again")
  found = cohort.info["train_statistics"][field]
  mean, sd = np.array([found[name] or (np.nan, np.nan) for name in cohort.info[field]], np.float32).reshape(-1, 2).T
  return mean, sd
