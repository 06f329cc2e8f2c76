"""Cohort records -> host batches (grain). NumPy only: no JAX call here or in a worker.

The order of the operations carries the guarantees (each is tested):

    shuffle -> repeat -> mix cohorts -> number -> take every hosts-th -> batch -> skip to the start
      step

The global batch at step t is a function of (seed, t) alone: the same records for any number of
hosts, threads or workers, and starting at step t needs no saved state. All other randomness (crop,
augmentation, mask, dropout) is drawn on the device from (seed, index), where `index` is the
position in the stream given here.
"""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from mmcl_jax.data import schema
from mmcl_jax.errors import DamagedRecord, UserError
from mmcl_jax.support import processes

MORE_SHARED = (
  "enlarge it (docker run --shm-size=8g; Kubernetes: an emptyDir of medium Memory at /dev/shm) or "
  "read in "
  "threads alone, --config.loader.workers=0"
)
TRIED = 1000  # records of a split, before it is given up as unreadable
SMALL = ("subject", "has_ecg", "has_cmr", "phenotypes", "diseases", "covariates")


def to_example(
  index: int, record: dict[str, np.ndarray], fields: tuple[str, ...], also: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
  """One stored record -> one row of the batch, still compact (int16, uint8); the device casts."""
  example = {name: record[name] for name in SMALL}
  example |= {
    "ecg": record["ecg"],
    "ecg_scale": np.float32(record["ecg_scale"]),
    "cmr": {field: record[field] for field in fields},
    "index": np.uint32(index % 2**32),
    "mask": np.uint8(record.get("mask", 1)),
  }
  return example | {name: record[name] for name in ("features", *also) if name in record}


def element_spec(
  shapes: Mapping[str, Sequence[int]], fields: tuple[str, ...], rows: int
) -> dict[str, np.ndarray]:
  """A batch of `rows` rows as `train_batches` yields it: arrays of the same names, shapes and
  types, zeros that take no memory.

  What the model sees of it is `jax.eval_shape` of what the step does to it (training.step.example).

  Args:
    shapes: of the fields of a record, as cohort.json and the manifest of a checkpoint have them.
    fields: stored CMR fields to carry.
  """
  shapes = {"subject": (2,), "has_ecg": (), "has_cmr": (), "ecg_scale": (), **shapes}
  record = {}
  for name, dtype in schema.STORED.items():
    if name in shapes:
      record[name] = np.broadcast_to(np.zeros((), dtype), shapes[name])
  return repeated(to_example(0, record, fields), rows)


def repeated(example: dict, rows: int) -> dict:
  """A batch of which every row is `example`; its arrays are views of the example's."""
  batch = {}
  for name, x in example.items():
    if isinstance(x, dict):
      batch[name] = repeated(x, rows)
    else:
      batch[name] = np.broadcast_to(x, (rows, *np.shape(x)))
  return batch


class WithFeatures:
  """Records with what frozen towers made of their images (training.frozen) in `record["features"]`.

  Picklable, for reading processes: a file of features is mapped where it is first read.
  """

  def __init__(self, source, files: dict[str, str]):
    self.source, self.files, self.mapped = source, files, None

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    if self.mapped is None:
      self.mapped = {name: np.load(file, mmap_mode="r") for name, file in self.files.items()}
    return self.source[i] | {
      "features": {name: np.asarray(x[i]) for name, x in self.mapped.items()}
    }

  def __getstate__(self):
    return self.__dict__ | {"mapped": None}


class Rows:
  """Some records of a source, in the order of `rows`."""

  def __init__(self, source, rows):
    self.source, self.rows = source, rows

  def __len__(self):
    return len(self.rows)

  def __getitem__(self, i):
    return self.source[int(self.rows[i])]


class SkipBadRecords:
  """Records of a split for training: one that is unusable (`why_unusable`, or not readable) is
  zeros with mask 0, named on stderr.

  Every host makes the same row of it and the row keeps its place, so the order of the data does not
  change; the step counts it and the loop decides (config.bad_rows).
  """

  def __init__(self, source, name: str, reads: tuple[str, ...]):
    """`reads`: what is looked at of a record, "ecg" and stored CMR fields."""
    self.source = source
    self.name = name
    self.reads = reads
    self.reported = set()  # indices
    self.zeros = None

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    try:
      record = self.source[i]
      why = why_unusable(record, self.reads)
      if not why:
        return record
      reason = f"record {i} of {self.name}: {why}"
    except DamagedRecord as error:
      reason = str(error)
    if i not in self.reported:
      self.reported.add(i)
      print(f"mmcl: left out: {reason}", file=sys.stderr, flush=True)
    return self.blank() | {"mask": np.uint8(0)}

  def blank(self) -> dict[str, np.ndarray]:
    """Zeros in the form of the first record that can be read."""
    if self.zeros is None:
      for i in range(min(len(self.source), TRIED)):
        with contextlib.suppress(DamagedRecord):
          self.zeros = blank(self.source[i])
          break
      else:
        raise UserError(
          f"none of the first {TRIED} records of {self.name} can be read; prepare the cohort again"
        )
    return self.zeros


def why_unusable(record: dict[str, np.ndarray], reads: tuple[str, ...]) -> str | None:
  """Why a record must not be learned from by who `reads` so much of it, or None."""
  if record["has_ecg"] and "ecg" in reads:
    if not 0 < record["ecg_scale"] < np.inf:
      return f"its ECG has the scale {record['ecg_scale']}; expected a positive number"
    if not np.ptp(record["ecg"], axis=1).any():
      return "its ECG is constant in every lead"
  if record["has_cmr"]:
    images = [name for name in reads if name in schema.VIEWS.values() and name in record]
    if flat := [name for name in images if record[name].max() == record[name].min()]:
      return f"its {', '.join(flat)} has the same grey value everywhere"
  if wrong := [name for name in ("phenotypes", "covariates") if np.isinf(record[name]).any()]:
    return f"its {', '.join(wrong)} are infinite"
  return None


class Mixed(NamedTuple):
  """Another cohort's records in a stream: `share` of its rows, each brought into the first cohort's
  form."""

  source: Any
  share: float
  conform: Callable[[dict], dict]


def conforming(
  info: dict, first_info: dict, first_record: dict, fields: tuple[str, ...]
) -> Callable[[dict], dict]:
  """How to bring records of the cohort `info` into the form of `first_record`, of the cohort
  `first_info`.

  Phenotypes, diseases and covariates go by name, NaN where the cohort does not have them. Where it
  lacks one of the `fields` that towers look at, all are zeros and the row counts as without CMR:
  ECG alone trains what needs an ECG alone.
  """
  columns = {}
  for field in ("phenotypes", "diseases", "covariates"):
    names = list(info[field])
    places = []
    for name in first_info[field]:
      places.append(names.index(name) if name in names else -1)
    columns[field] = places
  kept = {}
  for name, x in first_record.items():
    if name in fields or name not in schema.VIEWS.values():
      kept[name] = x
  return functools.partial(_conform, columns, blank(kept), fields)


def _conform(columns, blank_record, fields, record):
  labels = {}
  for field, places in columns.items():
    with_nan = np.append(record[field], np.float32(np.nan))  # place -1
    labels[field] = with_nan[places]
  lacks_cmr = any(field not in record for field in fields)
  common = {}
  for name, x in record.items():
    of_cmr = name in fields or name == "features"
    if name in blank_record and not (lacks_cmr and of_cmr):
      common[name] = x
  flags = {
    "has_cmr": np.uint8(0 if lacks_cmr else record["has_cmr"]),
    "mask": record.get("mask", np.uint8(1)),
  }
  return blank_record | common | labels | flags


def train_batches(
  source,
  *,
  seed: int,
  batch: int,
  fields: tuple[str, ...] = (),
  start_step: int = 0,
  host: int = 0,
  hosts: int = 1,
  threads: int = 2,
  buffer: int = 2,
  workers: int = 0,
  mix: Sequence[Mixed] = (),
) -> Iterator[dict]:
  """This host's part of the endless stream of global batches, from `start_step` on.

  Args:
    source: random-access records (`Cohort.splits[...]`).
    seed: of the order of the records.
    batch: global batch size, a multiple of `hosts`.
    fields: stored CMR fields to carry.
    start_step: the first step to yield.
    host, hosts: this process and how many there are.
    threads, buffer: reading threads, and batches read ahead.
    workers: reading processes; 0 reads in threads of this one, which takes less processor time a
      record below 1 MB.
    mix: further cohorts; `source` has the share that they leave.

  Yields:
    dicts of NumPy arrays, leading axis batch / hosts.
  """
  records = _shuffled(source, seed)
  if mix:
    streams, shares = [records], []
    for i, other in enumerate(mix, 1):
      streams.append(_shuffled(other.source, seed + i).map(other.conform))
      shares.append(other.share)
    records = grain.MapDataset.mix(streams, [1 - sum(shares), *shares])
  to_row = functools.partial(to_example, fields=fields)
  rows = records.map_with_index(to_row)[host::hosts]
  of_host = batch // hosts
  batches = rows.batch(of_host, drop_remainder=True)[start_step:]
  if workers:
    row_bytes = sum(x.nbytes for x in arrays(rows[0]))
    check_shared_memory(workers, buffer, of_host * row_bytes)
  return iterate(batches, threads, buffer, workers)


def _shuffled(source, seed):
  """Its records without end, in another order each time."""
  return grain.MapDataset.source(source).seed(seed).shuffle().repeat()


def one_pass(
  source,
  *,
  batch: int,
  fields: tuple[str, ...] = (),
  also: tuple[str, ...] = (),
  host: int = 0,
  hosts: int = 1,
  threads: int = 2,
  buffer: int = 2,
) -> Iterator[dict]:
  """Every record once, in order; the last batch is padded with rows of mask 0, so all hosts take
  equally many steps.

  Padding has indices from len(source) on.

  Args are those of `train_batches`, and `also`: further names of the record to carry where it has
  them.
  """
  padded = -(-len(source) // batch) * batch

  def row(i: int) -> dict[str, np.ndarray]:
    example = to_example(i, source[min(i, len(source) - 1)], fields, also)
    if i >= len(source):
      example = blank(example) | {"index": np.uint32(i)}
    return example

  rows = grain.MapDataset.range(padded).map(row)[host::hosts]
  return iterate(rows.batch(batch // hosts), threads, buffer, workers=0)


def begin_reading(*_) -> None:
  """Signals that stop training must not end its readers, needed until it has saved; grain ends them
  by an event."""
  for signum in processes.SIGNALS:
    signal.signal(signum, signal.SIG_IGN)
  processes.exit_with_parent()


def check_shared_memory(workers: int, buffer: int, size: int) -> None:
  """Raises a UserError if /dev/shm is too small for the batches of `size` bytes that reading
  processes keep there."""
  try:
    volume = os.statvfs("/dev/shm")
  except OSError:  # a system without
    return
  needed = workers * (buffer + 1) * size
  free = volume.f_bavail * volume.f_frsize
  if needed > free:
    raise UserError(
      f"config.loader.workers is {workers}, and {workers} x {buffer + 1} batches of "
      f"{size / 2**20:.1f} MiB do not fit into the {free / 2**20:.0f} MiB that are free in "
      f"/dev/shm; {MORE_SHARED}"
    )


def arrays(example: dict) -> Iterator[np.ndarray]:
  for x in example.values():
    yield from arrays(x) if isinstance(x, dict) else (x,)


def blank(example: dict) -> dict:
  """A row of zeros of the same shapes; its mask is 0 too."""
  return {
    name: blank(x) if isinstance(x, dict) else np.zeros_like(x) for name, x in example.items()
  }


def iterate(batches: grain.MapDataset, threads: int, buffer: int, workers: int) -> Iterator[dict]:
  # The buffer of each reader thread counts whole batches: grain's default of 500 would hold
  # gigabytes.
  stream = batches.to_iter_dataset(
    grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer)
  )
  if not workers:
    return iter(stream)
  if not flags.FLAGS.is_parsed():
    # grain's worker processes read absl's global flags, which our programs do not use
    flags.FLAGS.mark_as_parsed()
  options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=buffer)
  return read_by_processes(stream.mp_prefetch(options, worker_init_fn=begin_reading))


def read_by_processes(stream) -> Iterator[dict]:
  try:
    yield from stream
  except RuntimeError as error:
    if "terminated unexpectedly" not in str(error):
      raise
    raise UserError(
      f"a reading process died ({' '.join(str(error).split('.')[0].split())}), as when memory or "
      f"/dev/shm runs out; {MORE_SHARED}; the same command goes on from the last checkpoint"
    ) from None
