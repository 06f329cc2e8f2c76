"""A cohort on disk: ArrayRecord files written by TFDS, one record a recording, and `cohort.json` that says what they hold.

    COHORT/cohort.json               written last: its presence means the cohort is whole
    COHORT/ecg_cmr/1.0.0/...         TFDS's own layout (features.json, dataset_info.json, ArrayRecord shards)
"""

import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from mmcl_jax.data import schema
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.errors import UserError


RECORDS_A_SHARD = 2000  # about 600 MB of 12 x 64 x 64 volumes


class Cohort(NamedTuple):
  """An opened cohort: `info` is cohort.json; `splits[name]` is a random-access, picklable source of records."""

  path: str
  info: dict[str, Any]
  splits: dict[str, Any]

  @property
  def fingerprint(self) -> str:
    return self.info["fingerprint"]


def features(example: dict[str, np.ndarray]) -> dict[str, tfds.features.Tensor]:
  """TFDS features of a record as it is stored, read off one encoded example.

  `encoding="bytes"` is 10 to 20 times faster to write than none; ArrayRecord compresses by itself.
  """
  return {name: tfds.features.Tensor(shape=x.shape, dtype=x.dtype, encoding="bytes" if x.size else "none")
          for name, x in example.items()}


def encode(record: dict[str, np.ndarray], profile: str) -> dict[str, np.ndarray]:
  """A reader's record -> what is stored: the ECG normalised by `profile`, as int16 with its scale."""
  normalised = preprocess_ecg.normalise(record["ecg"], profile) if record["has_ecg"] else record["ecg"]
  scale = np.float32(max(np.abs(normalised).max(), 1e-6) / 32767)
  stored = {name: np.asarray(x) for name, x in record.items()}
  stored["ecg"] = np.round(normalised / scale).astype(np.int16)
  stored["ecg_scale"] = np.asarray(scale)
  stored["has_ecg"], stored["has_cmr"] = np.uint8(record["has_ecg"]), np.uint8(record["has_cmr"])
  return {name: np.asarray(x) for name, x in stored.items()}


def write(directory: pathlib.Path, splits: dict[str, Iterable[dict]], example: dict) -> None:
  """Writes the records of each split, in the order they come, as a TFDS dataset of ArrayRecord shards.

  TFDS's sequential writer streams: its usual one holds a split in memory and, above 1 GB, calls TensorFlow.
  """
  directory.mkdir(parents=True)
  identity = tfds.core.DatasetIdentity(name="ecg_cmr", version=tfds.core.Version("1.0.0"), data_dir=str(directory),
                                       module_name=__name__)
  info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features(example)),
                               description="ECG with cardiac MRI of the same person.", disable_shuffling=True)
  writer = tfds.core.SequentialWriter(info, max_examples_per_shard=RECORDS_A_SHARD, file_format="array_record")
  writer.initialize_splits(list(splits))
  for split, records in splits.items():
    for record in records:
      writer.add_examples({split: [record]})
  writer.close_all()


def build(out: str, keys: dict[str, list], read: Callable[[Any], dict], *, info: dict[str, Any], processes: int) -> Cohort:
  """Writes a cohort, atomically: `out` is complete or absent.

  Args:
    out: folder to make; it must not hold anything yet.
    keys: split name -> what `read` takes, one a recording.
    read: key -> stored record (see `encode`), picklable; run in worker processes.
    info: goes to cohort.json: `ecg_profile`, `phenotypes` (name -> unit), `diseases`, `covariates`, where it came from.
    processes: worker processes.
  """
  target = pathlib.Path(out)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"{out} is not empty; expected a new folder for the cohort: choose another --out or remove it")
  empty = [split for split in schema.SPLITS if not keys.get(split)]
  if empty:
    raise UserError(f"split {', '.join(empty)} would hold no subject ({sum(map(len, keys.values()))} in all): "
                    "prepare more subjects or change --split")
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.with_name(target.name + f".partial-{os.getpid()}")
  try:
    example = read(keys["train"][0])
    # Spawned: fork is unsafe beside JAX's threads. One pool for all splits: starting one takes seconds.
    with (multiprocessing.get_context("spawn").Pool(processes) as pool,
          tqdm(total=sum(map(len, keys.values())), desc="prepare", unit="subject", mininterval=1) as progress):

      def records(split):
        for record in pool.imap(read, keys[split], chunksize=8):
          progress.update()
          yield record

      write(partial / "ecg_cmr" / "1.0.0", {split: records(split) for split in keys}, example)
    digest, files = hashlib.blake2b(digest_size=16), sorted(partial.rglob("*array_record*"))
    for file in files:
      with open(file, "rb") as f:
        digest.update(file.name.encode() + hashlib.file_digest(f, "blake2b").digest())
    whole = {"schema_version": schema.SCHEMA_VERSION, **info, "counts": {s: len(k) for s, k in keys.items()},
             "shapes": {name: list(x.shape) for name, x in example.items()},
             "files": {str(file.relative_to(partial)): file.stat().st_size for file in files},
             "fingerprint": digest.hexdigest()}
    (partial / "cohort.json").write_text(json.dumps(whole, indent=1) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return load(out)


def load(path: str) -> Cohort:
  """Opens a cohort; a UserError says what is missing or of another version."""
  folder = pathlib.Path(path)
  if not path or not folder.is_dir():
    raise UserError(f"no cohort at {path!r}: expected a folder made by `mmcl prepare`; set --config.data.cohort or --cohort")
  file = folder / "cohort.json"
  if not file.is_file():
    raise UserError(f"{path} holds no cohort.json, so it is empty or its preparation did not finish; "
                    "make it with `mmcl prepare synthetic --out=DIR`")
  try:
    info = json.loads(file.read_text())
    version = info["schema_version"]
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{file} is not a cohort description ({error!r}); prepare the cohort again") from None
  if version != schema.SCHEMA_VERSION:
    raise UserError(f"{file} has schema version {version}, this program reads {schema.SCHEMA_VERSION}; "
                    "prepare the cohort again with this version")
  for name, size in info["files"].items():
    found = (folder / name).stat().st_size if (folder / name).is_file() else None
    if found != size:
      raise UserError(f"{folder / name} {'is missing' if found is None else f'has {found} bytes'}; cohort.json says {size} "
                      "bytes: copy the file again or prepare the cohort again")
  try:
    read_only = tfds.builder_from_directory(str(next(folder.glob("ecg_cmr/*"))))
    splits = {split: read_only.as_data_source(split) for split in schema.SPLITS}
  except Exception as error:  # tfds raises whatever the broken file leads to
    raise UserError(f"the records under {path} cannot be opened ({type(error).__name__}: {str(error)[:200]}); "
                    "prepare the cohort again") from None
  return Cohort(str(path), info, splits)
