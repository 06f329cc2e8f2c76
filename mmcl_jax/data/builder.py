"""Makes a cohort (mmcl_jax.data.cohort) of what a source plans to read.

The unit of work is a shard: some hundred records of one split, read and written by one process,
then renamed. So making a cohort goes on where it was stopped, gives the same records and
fingerprint for any number of processes or machines (mmcl_jax.data.beam), and takes memory for the
list of what to read and for one record a process, not for the records.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import pickle
import re
import secrets
import shutil
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
import threadpoolctl
from array_record.python import array_record_module
from tqdm import tqdm

from mmcl_jax.data import ecg_quality, schema, units
from mmcl_jax.data.cohort import (
  LABELS,
  NAME,
  VERSION,
  Cohort,
  checksum,
  ends,
  features,
  load,
)
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.data.sources import Item, Plan
from mmcl_jax.errors import BadRecord, UserError, check_writable, is_environment
from mmcl_jax.support import files, locks
from mmcl_jax.support.processes import exit_with_parent, signals_blocked

SHARDS_A_SPLIT = 256  # aimed at: a cluster's worth of work, and not too many files to open
RECORDS_A_SHARD = (50, 2000)  # 2,000 records of 12 x 64 x 64 volumes are about 600 MB
# beside a shard, for the reports
KEPT = ("subject", "has_ecg", "has_cmr", "phenotypes", "covariates")
FIRST_TRIES = 200  # records that may fail before the first good one


class Shard(NamedTuple):
  """Items of one split that go to one file, in order."""

  split: str
  index: int
  items: list[Item]

  @property
  def name(self) -> str:
    return f"{self.split}-{self.index:05d}"


class Job(NamedTuple):
  """What every process needs to write its shards; picklable."""

  folder: str  # of shards and their notes
  read: Callable[[Item], tuple[dict, tuple[str, ...]]]
  profile: str | None  # normalisation of the ECG; None: it comes normalised
  # of phenotypes, diseases and covariates, as the plan names them
  lengths: dict[str, int]
  # stored field -> (dtype, shape), the same in all records
  layout: dict[str, tuple[str, list[int]]] = {}


class Outcome(NamedTuple):
  """What became of a plan, for the report on its quality. Ids are salted: see schema.salted_id."""

  steps: dict[str, int]
  rejected: list[dict[str, str]]  # id, reason
  flags: list[dict[str, Any]]  # id, flags
  # float32 [N, K] of the records kept, in the order of the splits
  phenotypes: np.ndarray
  covariates: np.ndarray  # float32 [N, V]
  splits: list[str]  # [N]


def encode(record: dict[str, np.ndarray], profile: str | None) -> dict[str, np.ndarray]:
  """A reader's record -> what is stored: the ECG normalised by `profile` (None: as it is), as int16
  with its scale."""
  ecg = np.asarray(record["ecg"], np.float32)
  if profile:
    # zeros where there is no ECG: the length is the profile's
    ecg = preprocess_ecg.normalise(ecg, profile)
  if not record["has_ecg"]:
    ecg = np.zeros_like(ecg)
  largest = max(np.abs(ecg).max(), 1e-6)
  scale = np.float32(largest / 32767)
  stored = record | {
    "ecg": np.round(ecg / scale).astype(np.int16),
    "has_ecg": np.uint8(record["has_ecg"]),
    "has_cmr": np.uint8(record["has_cmr"]),
  }
  stored["ecg_scale"] = scale
  return {name: np.asarray(x) for name, x in stored.items()}


def build(
  out: str,
  plan: Plan,
  *,
  shares: tuple[float, float, float],
  profile: str,
  processes: int,
  report: Callable[[str, Cohort, Outcome], None] | None = None,
  run: Callable | None = None,
) -> Cohort:
  """Makes the cohort of a plan; `out` is complete or absent. Started again after an interruption,
  it goes on.

  Args:
    out: folder to make; it must not hold anything yet but the cohort of the same plan, which is
      opened. Work under way lies in `out`.partial.
    plan: what to read (mmcl_jax.data.sources).
    shares: of train, val and test, drawn by subject, unless the plan gives the splits.
    profile: normalisation of the ECG; of no effect where the source's ECG come normalised.
    processes: worker processes.
    report: (folder, cohort, outcome) -> None; called before the cohort gets its name, to write into
      the folder.
    run: (write, shards, processes) -> None in place of local processes (mmcl_jax.data.beam).

  Raises:
    UserError: nothing could be read, a split is empty, or `out` is taken.
  """
  check_out(out)
  target = pathlib.Path(out)
  partial = pathlib.Path(f"{out.rstrip('/')}.partial")
  profile = plan.info.get("ecg_profile", profile)
  phenotypes = plan.info["phenotypes"]
  info = plan.info | {
    "phenotypes": {name: units.spelled(unit) for name, unit in phenotypes.items()},
    "ecg_profile": profile,
    "split": list(shares),
  }
  splits = split_items(plan, shares)
  info["plan"] = digest_of(plan, info, splits)
  if (target / "cohort.json").is_file():
    return made_before(out, info["plan"])
  files.no_links(partial)
  partial.mkdir(parents=True, exist_ok=True)
  with locks.held(partial / "lock", f"another process is preparing {out}", "--out"):
    same_plan(partial, info["plan"])
    shards = partial / "shards"
    # else killed right before its name was given
    if shards.is_dir() or not (partial / "cohort.json").is_file():
      write_all(partial, plan, splits, profile, info, processes, report, run or run_locally)
      os.replace(shards, partial / "shards.done")
    shutil.rmtree(partial / "shards.done", ignore_errors=True)
    if target.exists():
      target.rmdir()
    files.publish(partial, target)
  clear(target)
  return load(out)


def made_before(out: str, plan: str) -> Cohort:
  """The cohort that is there; a UserError where it is of another plan, by its digest."""
  cohort = load(out)
  if cohort.info["plan"] != plan:
    raise UserError(
      f"{out} holds a cohort of other inputs or settings; choose another --out or remove it"
    )
  clear(pathlib.Path(out))
  print(
    f"{out} is there, of the same paths and settings: nothing was read again; remove it to make "
    "it anew"
  )
  return cohort


def clear(target: pathlib.Path) -> None:
  """Removes what only work under way needs."""
  for leftover in ("plan.json", "lock"):
    (target / leftover).unlink(missing_ok=True)


def write_all(
  partial: pathlib.Path,
  plan: Plan,
  splits: dict[str, list[Item]],
  profile: str,
  info: dict,
  processes: int,
  report,
  run,
):
  """Everything that a cohort holds, into `partial`; arguments are those of `build`."""
  job = Job(
    str(partial / "shards"),
    plan.read,
    None if plan.info.get("ecg_is_normalised") else profile,
    {name: len(plan.info[name]) for name in LABELS},
  )
  job = job._replace(layout=first_layout(job, splits))
  shards = []
  for split, items in splits.items():
    shards += shards_of(split, items)
  folder = pathlib.Path(job.folder)
  folder.mkdir(exist_ok=True)
  for abandoned in folder.glob("*.tmp*"):  # by processes that were killed
    abandoned.unlink(missing_ok=True)
  run(functools.partial(write_shard, job), shards, processes)
  notes = []
  for shard in shards:
    note = folder / f"{shard.name}.json"
    notes.append((shard, json.loads(note.read_text())))
  labels = {}
  for split in schema.SPLITS:
    of_split = [shard for shard in shards if shard.split == split]
    labels[split] = collect_labels(job, of_split)
  finish(partial, job, notes, labels, info)
  if report:
    cohort = load(str(partial))
    report(str(partial), cohort, collect(plan, notes, labels))


def shards_of(split: str, items: list[Item]) -> list[Shard]:
  fewest, most = RECORDS_A_SHARD
  size = len(items) // SHARDS_A_SPLIT
  size = min(max(size, fewest), most)
  shards = []
  for start in range(0, len(items), size):
    of_shard = items[start : start + size]
    shards.append(Shard(split, len(shards), of_shard))
  return shards


def check_out(out: str) -> None:
  """Raises a UserError where a cohort cannot get the name `out` in the end."""
  target = pathlib.Path(out)
  check_writable(f"{out.rstrip('/')}.partial")
  is_current = target.resolve() == pathlib.Path.cwd()
  if target.is_symlink() or os.path.ismount(target) or is_current:
    raise UserError(
      f"--out={out} is a link, a mount or the current folder; expected the name of a new folder"
    )
  if not target.exists():
    return
  is_cohort = (target / "cohort.json").is_file()
  is_empty = target.is_dir() and not any(target.iterdir())
  if not is_cohort and not is_empty:
    raise UserError(
      f"{out} is not empty; expected a new folder for the cohort: choose another --out or remove it"
    )


def split_items(plan: Plan, shares) -> dict[str, list[Item]]:
  """Items of each split, in the plan's order; nobody twice, nobody in two splits."""
  splits = {split: [] for split in schema.SPLITS}
  planned = set()
  split_of_subject = {}
  for item in plan.items:
    split = plan.split(item) if plan.split else schema.split_of(item.subject, shares)
    name = item.salted_id
    subject, _, _ = name.partition("/")
    if name in planned:
      raise UserError(f"record {name} is planned twice; expected one record a subject and visit")
    other = split_of_subject.setdefault(subject, split)
    if other != split:
      raise UserError(
        f"subject {subject} would be in {other} and in {split}; expected all "
        "visits of a person in one split"
      )
    planned.add(name)
    splits[split].append(item)
  empty = []
  for split, share in zip(schema.SPLITS, shares):
    if share and not splits[split] and not plan.split:
      empty.append(split)
  if empty or not plan.items:
    names = ", ".join(empty or schema.SPLITS)
    steps = [f"{len(plan.items)} records in all"]
    steps += [f"{count} {step}" for step, count in plan.steps.items()]
    raise UserError(
      f"split {names} would hold no subject ({'; '.join(steps)}): give more data or change --split"
    )
  return splits


def digest_of(plan: Plan, info: dict, splits: dict[str, list[Item]]) -> str:
  """Of all that a record depends on before its files are read: paths, values from tables,
  settings."""
  settings = json.dumps([schema.SCHEMA_VERSION, info], sort_keys=True)
  digest = hashlib.blake2b(settings.encode(), digest_size=16)
  digest.update(pickle.dumps(getattr(plan.read, "args", ())))
  for split, items in splits.items():
    for item in items:
      digest.update(f"{split} {item.salted_id} ".encode())
      digest.update(pickle.dumps(item.key))
  return digest.hexdigest()


def same_plan(partial: pathlib.Path, digest: str) -> None:
  """Writes what `partial` is the beginning of; refuses to go on with something else."""
  file = partial / "plan.json"
  if file.is_file() and json.loads(file.read_text()) != digest:
    raise UserError(
      f"{partial} was begun with other inputs or settings; give the same ones, or remove it to "
      "begin anew"
    )
  with files.atomic(file) as f:
    f.write(json.dumps(digest))


def first_layout(job: Job, splits: dict[str, list[Item]]) -> dict[str, tuple[str, list[int]]]:
  """Fields, types and shapes of the records, read off the first one that can be read."""
  reasons = []
  items = itertools.chain(*splits.values())
  for item in itertools.islice(items, FIRST_TRIES):
    try:
      stored, _ = read_item(job, item)
      return layout_of(stored)
    except BadRecord as error:
      reasons.append(f"{item.salted_id}: {error}")
  raise UserError(
    f"none of the first {len(reasons)} records can be read; {'; '.join(reasons[:3])}: check --input"
  )


def layout_of(stored: dict[str, np.ndarray]) -> dict[str, tuple[str, list[int]]]:
  return {name: (x.dtype.name, list(x.shape)) for name, x in stored.items()}


def read_item(job: Job, item: Item) -> tuple[dict[str, np.ndarray], list[str]]:
  """Stored record and remarks of an item; BadRecord, free of all that identifies a person, where it
  cannot be read."""
  try:
    record, flags = job.read(item)
    check(record, job)
    flags = [*flags, *more_remarks(record, flags, job)]
    identity = {"subject": item.subject, "visit": np.uint16(item.visit)}
    stored = encode(identity | record, job.profile)
  except BadRecord as error:
    raise BadRecord(scrub(str(error), item)) from None
  except UserError:
    raise
  except Exception as error:
    if is_environment(error):  # a disk or a network that fails is no reason to leave a person out
      reason = getattr(error, "strerror", "") or type(error).__name__
      raise UserError(
        f"reading record {item.salted_id} failed ({reason}); the same command goes on from here"
      ) from None
    # A reader's own mistake: one record must not cost a long run.
    raise BadRecord(scrub(f"unexpected {type(error).__name__}: {error}", item)) from None
  return stored, [scrub(flag, item) for flag in flags]


def check(record: dict[str, np.ndarray], job: Job) -> None:
  """A source's record against what its plan and the schema say: UserError where every one would be
  wrong."""
  ecg = np.asarray(record["ecg"])
  expected = [len(schema.LEADS), schema.ECG_SAMPLES]
  if job.profile and list(ecg.shape) != expected:
    raise UserError(
      f"the source gives ECG of shape {list(ecg.shape)}; expected {expected}: "
      f"10 s at {schema.ECG_RATE_HZ} Hz (mmcl_jax.data.preprocess.ecg.to_standard)"
    )
  for name, length in job.lengths.items():
    shape = list(np.shape(record[name]))
    if shape != [length]:
      raise UserError(
        f"the source gives {name} of shape {shape} and names {length} of them in its plan"
      )
  if not_finite := np.sum(~np.isfinite(ecg)):
    raise BadRecord(f"{not_finite} samples of the ECG are not finite")


def more_remarks(record: dict[str, np.ndarray], flags: tuple[str, ...], job: Job) -> list[str]:
  """Remarks on an ECG in mV that its source has not made: one of a user's own may judge nothing."""
  if not record["has_ecg"] or not job.profile:
    return []

  def without_numbers(text):  # the readers' are from before resampling
    return re.sub(r"[\d.]+", "", text)

  said = without_numbers("; ".join(flags))
  remarks = ecg_quality.judge(np.asarray(record["ecg"]), schema.ECG_RATE_HZ)
  return [remark for remark in remarks if without_numbers(remark) not in said]


def scrub(text: str, item: Item) -> str:
  """One line without the names that identify the person."""
  names = [name for name in item.private if name]
  for name in sorted(names, key=len, reverse=True):
    alone = rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
    text = re.sub(alone, "<id>", text, flags=re.IGNORECASE)
  return " ".join(text.split())[:300]


@contextlib.contextmanager
def record_writer_errors(folder: pathlib.Path):
  """Turns what ArrayRecord makes of a full disk into a UserError."""
  try:
    yield
  except RuntimeError as error:
    reason = " ".join(str(error).split())[:150]
    raise UserError(
      f"cannot write to {folder}: {reason}; the same command goes on from what is done"
    ) from None


@threadpoolctl.threadpool_limits.wrap(limits=1)  # as many processes as cores already compute
def write_shard(
  job: Job,
  shard: Shard,
  progress: Callable[[], None] | None = None,
) -> None:
  """Reads the items of a shard and writes its file, then its note, each under a temporary name
  first. Calls `progress` after each item."""
  folder = pathlib.Path(job.folder)
  file = folder / f"{shard.name}.array_record"
  note = folder / f"{shard.name}.json"
  if note.is_file():
    return
  described = features(job.layout)
  serializer = tfds.core.example_serializer.ExampleSerializer(described.get_serialized_info())
  digest = hashlib.blake2b(digest_size=16)
  rejected, flagged = [], []
  kept = {name: [] for name in KEPT}
  # a cluster may run one shard twice at a time
  temporary = f"{folder / shard.name}.{secrets.token_hex(4)}.tmp"
  # Snappy: read twice as fast as the default (zstd:3), a tenth larger.
  writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1,snappy")
  for item in shard.items:
    try:
      stored, flags = read_item(job, item)
      check_layout(stored, job.layout)
    except BadRecord as error:
      rejected.append({"id": item.salted_id, "reason": str(error)})
    else:
      example = described.encode_example(stored)
      with record_writer_errors(folder):
        writer.write(serializer.serialize_example(example))
      # Of the arrays, not of the file: protocol buffers give the same record other bytes in another
      # process.
      digest.update(b"".join(stored[name].tobytes() for name in job.layout))
      for name, values in kept.items():
        values.append(stored[name])
      if flags:
        flagged.append({"id": item.salted_id, "flags": flags})
    if progress:
      progress()
  with record_writer_errors(folder):
    writer.close()
  count = len(kept["subject"])
  if count:
    files.publish(temporary, file)
    np.savez(temporary, **kept)
    files.publish(f"{temporary}.npz", file.with_suffix(".npz"))
  else:
    os.remove(temporary)
  outcome = {
    "kept": count,
    "rejected": rejected,
    "flags": flagged,
    "digest": digest.hexdigest(),
  }
  pathlib.Path(temporary).write_text(json.dumps(outcome))
  files.publish(temporary, note)


def check_layout(stored: dict[str, np.ndarray], layout: dict) -> None:
  """BadRecord where a record's fields, types or shapes are not those of the first one."""
  differing = []
  for name, (dtype, shape) in layout_of(stored).items():
    if (dtype, shape) != tuple(layout.get(name, ())):
      differing.append(f"{name} {dtype} {shape}")
  if differing:
    raise BadRecord(f"its {', '.join(differing)} differ from the first record's")
  if missing := layout.keys() - stored.keys():
    raise BadRecord(f"no {', '.join(sorted(missing))}, which the first record has")


_count = None  # of records done, shared by the local processes


def _begin_worker(count):
  global _count
  _count = count
  exit_with_parent()


def _write_counting(write, shard):
  def one_more():
    with _count.get_lock():
      _count.value += 1

  write(shard, one_more)


def run_locally(write: Callable[[Shard], None], shards: list[Shard], processes: int) -> None:
  """Writes shards in processes of this machine, with progress, rate and ETA; what an earlier run
  has written is kept."""
  job, *_ = write.args
  left = []
  done = 0
  for shard in shards:
    if pathlib.Path(job.folder, f"{shard.name}.json").is_file():
      done += len(shard.items)
    else:
      left.append(shard)
  total = sum(len(shard.items) for shard in shards)
  with tqdm(total=total, initial=done, desc="prepare", unit="record", mininterval=1) as progress:
    if processes == 1 or len(left) <= 1:
      for shard in left:
        write(shard, progress.update)
      return
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside JAX's threads
    count = context.Value("q", 0)
    workers = min(processes, len(left))
    pool = futures.ProcessPoolExecutor(workers, context, _begin_worker, (count,))
    with signals_blocked():
      waiting = {pool.submit(_write_counting, write, shard) for shard in left}
    try:
      while waiting:
        finished, waiting = futures.wait(waiting, timeout=1, return_when=futures.FIRST_COMPLETED)
        for future in finished:
          future.result()
        progress.update(done + count.value - progress.n)
    except futures.process.BrokenProcessPool:
      raise UserError(
        "a worker process died, as when memory runs out; the same command goes on from what is "
        f"done, give it fewer --processes than {processes}"
      ) from None
    finally:
      pool.shutdown(wait=not waiting, cancel_futures=True)
      if waiting:  # stopped: a shard may take minutes more
        for process in multiprocessing.active_children():
          process.terminate()


def collect_labels(job: Job, shards: list[Shard]) -> dict[str, np.ndarray]:
  """{field of KEPT: [N, ...]} of all records that these shards hold."""
  labels = {}
  for name in KEPT:
    dtype, shape = job.layout[name]
    labels[name] = [np.zeros((0, *shape), dtype)]
  for shard in shards:
    file = pathlib.Path(job.folder, f"{shard.name}.npz")
    if file.is_file():  # else nothing of it was kept
      of_shard = np.load(file)
      for name, arrays in labels.items():
        arrays.append(of_shard[name])
  return {name: np.concatenate(arrays) for name, arrays in labels.items()}


def collect(
  plan: Plan,
  notes: list[tuple[Shard, dict]],
  labels: dict[str, dict[str, np.ndarray]],
) -> Outcome:
  """What became of the plan, as the notes and labels of all shards say."""
  rejected, flags, splits = [], [], []
  for item, reason in plan.rejected:
    reason = scrub(reason, item)
    rejected.append({"id": item.salted_id, "reason": reason})
  for _, note in notes:
    rejected += note["rejected"]
    flags += note["flags"]
  for split, kept in labels.items():
    splits += [split] * len(kept["subject"])
  return Outcome(
    steps=plan.steps | {"read": len(plan.items), "kept": len(splits)},
    rejected=rejected,
    flags=flags,
    phenotypes=np.concatenate([kept["phenotypes"] for kept in labels.values()]),
    covariates=np.concatenate([kept["covariates"] for kept in labels.values()]),
    splits=splits,
  )


def finish(
  partial: pathlib.Path,
  job: Job,
  notes: list[tuple[Shard, dict]],
  labels: dict,
  info: dict,
) -> None:
  """Gives the shards their final names and writes what TFDS and `load` want to know of them."""
  lengths = {split: [] for split in schema.SPLITS}
  for shard, note in notes:
    lengths[shard.split].append((shard, note["kept"]))
  counts, empty = {}, []
  for split, pairs in lengths.items():
    counts[split] = sum(kept for _, kept in pairs)
    if pairs and not counts[split]:
      empty.append(split)
  if empty:
    raise UserError(
      f"every record of split {', '.join(empty)} was rejected; the reasons are in "
      f"{job.folder}/*.json"
    )
  shards = name_shards(partial, job, lengths)
  subjects = partial / "subjects.npz"
  np.savez(subjects, **{split: kept["subject"] for split, kept in labels.items()})
  sizes, checksums = {}, {}
  for file in (*shards, subjects):
    name = str(file.relative_to(partial))
    checksums[name] = [ends(file), checksum(file)]
    if file != subjects:
      sizes[name] = file.stat().st_size
  statistics = {}
  for field in ("phenotypes", "covariates"):
    statistics[field] = dict(zip(info[field], moments(labels["train"][field])))
  cohort = {
    "schema_version": schema.SCHEMA_VERSION,
    **info,
    "counts": counts,
    "with_ecg": {split: int(kept["has_ecg"].sum()) for split, kept in labels.items()},
    "with_cmr": {split: int(kept["has_cmr"].sum()) for split, kept in labels.items()},
    "shapes": {name: shape for name, (_, shape) in job.layout.items()},
    "train_statistics": statistics,
    "files": sizes,
    "checksums": checksums,
    "fingerprint": fingerprint(job, notes, info),
  }
  text = json.dumps(cohort, indent=1) + "\n"
  (partial / "cohort.json").write_text(text)


def name_shards(partial: pathlib.Path, job: Job, lengths: dict) -> list[pathlib.Path]:
  """Moves shards to the names under which TFDS looks for them, and describes them to it.

  `lengths`: split -> (shard, records kept) of each shard.
  """
  folder = partial / NAME / VERSION
  folder.mkdir(parents=True, exist_ok=True)
  named, split_infos = [], []
  for split, pairs in lengths.items():
    full = [(shard, kept) for shard, kept in pairs if kept]
    if not full:
      continue
    template = tfds.core.ShardedFileTemplate(
      dataset_name=NAME, data_dir=folder, split=split, filetype_suffix="array_record"
    )
    num_bytes = 0
    for i, (shard, _) in enumerate(full):
      path = template.sharded_filepath(shard_index=i, num_shards=len(full))
      file = pathlib.Path(path)
      source = pathlib.Path(job.folder, f"{shard.name}.array_record")
      if source.exists():  # else moved before an interruption
        os.replace(source, file)
      num_bytes += file.stat().st_size
      named.append(file)
    split_infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[kept for _, kept in full],
        num_bytes=num_bytes,
        filename_template=template,
      )
    )
  identity = tfds.core.DatasetIdentity(
    name=NAME,
    version=tfds.core.Version(VERSION),
    data_dir=str(folder),
    module_name=__name__,
  )
  described = tfds.core.DatasetInfo(
    builder=identity,
    features=features(job.layout),
    disable_shuffling=True,
    description="ECG with cardiac MRI of the same person.",
  )
  described.set_file_format("array_record")
  described.set_splits(tfds.core.splits.SplitDict(split_infos))
  described.write_to_directory(folder)
  return named


def fingerprint(job: Job, notes: list[tuple[Shard, dict]], info: dict) -> str:
  """Of all that the records hold and are called."""
  content = [
    job.layout,
    info["ecg_profile"],
    [(name, list(info[name])) for name in LABELS],
    [(shard.split, note["digest"]) for shard, note in notes],
  ]
  text = json.dumps(content)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def moments(values: np.ndarray) -> list[list[float] | None]:
  """[mean, SD] of each column of [N, K] in float64, NaN left out; None where fewer than two values
  or no spread."""
  pairs = []
  for column in values.astype(np.float64).T:
    finite = column[np.isfinite(column)]
    if finite.size > 1 and np.ptp(finite):
      pairs.append([finite.mean(), finite.std()])
    else:
      pairs.append(None)
  return pairs
