"""`mmcl embed`: embeddings and predicted phenotypes of ECG recordings, from a saved checkpoint.

Writes OUT/part-00000.parquet, part-00001.parquet and so on, each of the next PART recordings in the
order found; hosts take the parts in turn, so their number changes nothing. Every part says in its
footer what it was made of and from, and the same command goes on after the parts that are there.
Memory stays flat but for the list of paths. A recording that cannot be read costs one row, never
the run.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from mmcl_jax.data.ahead import LATER, TEXTS, read_ahead
from mmcl_jax.data.preprocess.ecg import samples
from mmcl_jax.data.readers import FLAG, READS, ecg_file, find_ecg, listing, parse_own
from mmcl_jax.data.schema import LEADS
from mmcl_jax.errors import UserError, check_writable, one_line, writing
from mmcl_jax.support import files
from mmcl_jax.support.paths import local
from mmcl_jax.training import distributed

EVALUATION = {
  "metavar": "DIR",
  "type": local,
  "help": "what mmcl evaluate --out wrote of this step (default: W/evaluation/STEP)",
}
PART = 4096  # recordings of a part, rounded up to the batch: what an interruption costs at most


class Probes(NamedTuple):
  """Linear read-outs: prediction = embedding @ coef [D, K] + intercept [K]; -+ half_width [K] is
  its 95 % interval."""

  columns: tuple[str, ...] = ()  # K, NAME_unit such as LVM_g
  coef: np.ndarray = np.zeros((0, 0))
  intercept: np.ndarray = np.zeros(0)
  half_width: np.ndarray = np.zeros(0)
  checksum: str | None = None  # of their file; None where there is none
  units: tuple[str, ...] = ()


def main(argv=None):
  args = parse(argv)
  # brings JAX: not before the flags are known to be right
  from mmcl_jax.training.restore import load_encoder

  own = parse_own(args.reader)
  paths = find_recordings(args.input, own)
  here = distributed.this_host
  out = Path(args.out)
  check_writable(out)
  run = {
    "--workdir": os.path.abspath(args.workdir),
    "--step": args.step,
    "--batch": args.batch,
    "the number of recordings": len(paths),
    "the hash of their names": hash_of_names(paths),
    "--reader": " ".join(args.reader),
  }
  distributed.check_same(run)
  encoder = load_encoder(args.workdir, args.step)
  folder = evaluation(args.workdir, encoder.step, args.evaluation)
  probes = load_probes(args.workdir, encoder.step, folder)
  size = math.ceil(PART / args.batch) * args.batch
  del run["--workdir"]  # the checkpoint's checksum identifies the run, wherever it lies
  run |= {
    "--step": encoder.step,
    "the checksum of the checkpoint": encoder.checkpoint,
    "the checksum of its probes": probes.checksum,
    "the number of recordings in a part": size,
  }
  parts = [paths[start : start + size] for start in range(0, len(paths), size)]
  with writing(out):
    out.mkdir(parents=True, exist_ok=True)
    done = finished_parts(out, run)
  to_do = [number for number in range(len(parts)) if number not in done]
  distributed.check_same(run | {f"the number of parts to do in {args.out}": len(to_do)})
  distributed.check_shared(out)
  if done and here.index == 0:
    print(f"{len(done)} of {len(parts)} parts are in {out}, {len(to_do)} to do", flush=True)

  counts = sum(done.values()) if here.index == 0 else 0
  mine = {number: parts[number] for number in to_do[here.index :: here.count]}
  counts += embed_parts(encoder, probes, out, run, mine, args.batch, own)
  distributed.barrier()
  embedded, later = sum(distributed.gather(counts))
  if here.index > 0:
    return
  summary = f"{embedded} of {len(paths)} recordings embedded"
  if not embedded:
    table = pq.read_table(out / "part-00000.parquet", columns=["path", "reason"])
    (first,) = table.slice(0, 1).to_pylist()
    raise UserError(
      f"{summary}; the first, {first['path']}: {first['reason']}. All reasons: the column `reason` "
      f"of {out}"
    )
  print(f"{summary} with step {encoder.step}: {out}, one table to pandas.read_parquet")
  if later:
    print(f"{later} {LATER}; the same command tries their parts again")


def hash_of_names(paths: list[str]) -> str:
  names = hashlib.sha256()
  for path in paths:
    names.update(f"{os.path.abspath(path)}\0".encode("utf-8", "surrogateescape"))
  return names.hexdigest()[:16]


def parse(argv):
  parser = argparse.ArgumentParser(
    prog="mmcl embed", description=__doc__.partition("\n\n")[0], allow_abbrev=False
  )
  parser.add_argument("--workdir", type=local, required=True, help="folder of the training run")
  parser.add_argument(
    "--input",
    type=local,
    nargs="+",
    action="extend",
    default=[],
    metavar="PATH",
    help=f"ECGs, and folders to search for them: {READS}",
  )
  parser.add_argument(
    "--out",
    type=local,
    required=True,
    help="folder for the table, in Parquet; a part of it there is gone on from",
  )
  parser.add_argument("--reader", **FLAG)
  parser.add_argument("--evaluation", **EVALUATION)
  parser.add_argument(
    "--step",
    type=int,
    help="checkpoint (default: the best of a run that stops early, else the last)",
  )
  parser.add_argument(
    "--batch", type=int, default=32, help="recordings per call of the encoder (default: 32)"
  )
  parser.add_argument("more", type=local, nargs="*", metavar="PATH", help="more inputs")
  args = parser.parse_intermixed_args(argv)
  args.input += args.more
  if not args.input:
    parser.error("no recordings: give --input=PATH")
  if args.batch < 1:
    parser.error(f"--batch={args.batch}; expected at least 1")
  return args


def find_recordings(inputs, own: Mapping[str, str] | None = None) -> list[str]:
  """The recordings that files, stems and folders name, in that order, each once; folders sorted.

  `own`: readers from outside, as of data.readers.read_ecg.

  A record's header and samples (`folder/*`) are one recording. Paths that do not exist and folders
  without an ECG stay in, to be rejected by name. Other files in folders are counted in one line of
  output.
  """
  by_file = {}  # file of a recording -> how it is named
  others = Counter()
  for path in map(Path, inputs):
    if os.path.isdir(path):
      recordings, passed_over = find_ecg(path, own)
      others += passed_over
      for recording in map(str, recordings or [path]):
        by_file.setdefault(recording, recording)
    else:
      by_file.setdefault(str(ecg_file(path, own)), str(path))
  if others and distributed.this_host.index == 0:
    print(f"{others.total()} files of other kinds, passed over: {listing(others)}", flush=True)
  return list(by_file.values())


def evaluation(workdir, step, given: str | None) -> Path:
  """The folder of a step's evaluation: `given` (--evaluation), which must be of this checkpoint, or
  the workdir's own."""
  if not given:
    return Path(workdir) / "evaluation" / str(step)
  from mmcl_jax.training import restore

  try:
    results = json.loads((Path(given) / "results.json").read_bytes())
    of = results["checkpoint"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f"--evaluation={given} is not what this version of mmcl evaluate writes ({error!r}); "
      f"expected the folder of an evaluation of {workdir}"
    ) from None
  if of != restore.checksum(workdir, step):
    raise UserError(
      f"--evaluation={given} is of another checkpoint than step {step} of {workdir}; expected the "
      "same"
    )
  return Path(given)


def load_probes(workdir, step, folder: Path) -> Probes:
  """The phenotype probes in the `folder` of an evaluation; none, with a line that says so, if there
  are none."""
  path = folder / "probes.npz"
  evaluate = f"mmcl evaluate --workdir={workdir} --step={step}"
  if not path.exists():
    if distributed.this_host.index == 0:
      print(
        f"no phenotypes will be predicted: {path} is missing; {evaluate} makes it (with "
        "--cohort=DIR where the cohort has moved or the weights come from elsewhere)",
        flush=True,
      )
    return Probes()
  try:
    arrays = files.arrays(path)
    units = tuple(map(one_line, arrays["units"]))
    named = zip(arrays["names"], units, strict=True)
    columns = tuple(f"{one_line(name)}_{unit}" for name, unit in named)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    coef, intercept, half_width = (
      np.asarray(arrays[name], np.float64) for name in ("coef", "intercept", "half_width")
    )
    probes = Probes(columns, coef, intercept, half_width, checksum, units)
    note = str(arrays["note"]) if "note" in arrays else ""
  except Exception as error:  # see `files.arrays`; a KeyError where an array is missing
    raise UserError(f"cannot read {path} ({error}); {evaluate} makes it anew") from error
  lengths = {probes.coef.shape[1:], probes.intercept.shape, probes.half_width.shape}
  if lengths != {(len(columns),)}:
    raise UserError(
      f"{path}: {len(columns)} names, coef {probes.coef.shape}, intercept "
      f"{probes.intercept.shape}, half_width {probes.half_width.shape}; expected [D, names] and "
      f"[names]; {evaluate} makes it anew"
    )
  if not columns and distributed.this_host.index == 0:
    print(f"no phenotypes will be predicted: {folder} is of a cohort without them", flush=True)
  if note and distributed.this_host.index == 0:
    print(f"predicted phenotypes and their intervals: {note}", flush=True)
  return probes


def finished_parts(out, run) -> dict[int, np.ndarray]:
  """{number: counts as of `write`} of the parts that need no more work; UserError for whatever is
  no part of this run."""
  finished = {}
  for file in sorted(out.iterdir()):
    # a part that was not finished; readers of the folder pass over it
    if file.name.startswith((".", "_")):
      continue
    match = re.fullmatch(r"part-(\d{5,})\.parquet", file.name)
    if not match:
      raise UserError(
        f"{out} holds {file.name}, which is no part of an embedding; name a folder of its own with "
        "--out"
      )
    differing = []
    try:
      about = json.loads(pq.read_metadata(file).metadata[b"mmcl_jax"])
      counts = np.array(about["counts"])
      for fact, now in run.items():
        before = about["run"].get(fact)
        if before != now:
          differing.append(f"{fact} is {before} there, {now} now")
      to_retry = counts[1]
    # Arrow's own are ValueErrors
    except (ValueError, KeyError, TypeError, AttributeError, OSError, IndexError):
      raise UserError(
        f"{file} is damaged, or not of mmcl embed; remove it, and the same command makes it anew"
      ) from None
    if differing:
      raise UserError(
        f"{file} is of another run: {'; '.join(differing)}; name another folder with --out, or "
        f"remove {out}"
      )
    if not to_retry:
      finished[int(match[1])] = counts
  return finished


def embed_parts(encoder, probes, out, run, parts, batch, own=None) -> np.ndarray:
  """Embeds and writes parts, {number: paths}; the sum of their counts."""
  counts = np.zeros(2, int)
  if not parts:
    return counts
  profile = encoder.config.data.ecg_profile
  shape = (batch, len(LEADS), samples(profile))
  width = encoder.embed(np.zeros(shape, np.float32)).shape[1]
  if probes.columns and len(probes.coef) != width:
    raise UserError(
      f"the probes take embeddings of width {len(probes.coef)}, the encoder gives {width}; "
      "mmcl evaluate fits them anew"
    )
  all_paths = itertools.chain.from_iterable(parts.values())
  recordings = read_ahead(all_paths, profile, 2 * batch, own)
  progress = tqdm(
    total=sum(map(len, parts.values())),
    desc="embed",
    unit="ECG",
    mininterval=1,
    disable=distributed.this_host.index > 0,
  )
  with contextlib.closing(recordings), progress:
    for number, paths in parts.items():
      rows = []
      embeddings = np.zeros((len(paths), width), np.float32)
      for start in range(0, len(paths), batch):
        count = min(batch, len(paths) - start)
        read = list(itertools.islice(recordings, count))
        embeddings[start : start + count] = embed(encoder, read, shape)
        rows += [row for row, _ in read]
        progress.update(count)
      with writing(out):
        counts += write(out / f"part-{number:05d}.parquet", rows, embeddings, probes, run)
  return counts


def embed(encoder, recordings, shape) -> np.ndarray:
  """float32 [N, D] of recordings as `read` gives them; one that gets none is rejected in its row.

  Every call of the encoder has the same `shape`, filled up with zeros, so that it compiles once;
  and a recording's place in it depends on no other, so that the parts do not depend on where an
  interruption fell.
  """
  signals = np.zeros(shape, np.float32)
  for place, (_, ecg) in zip(signals, recordings):
    if ecg is not None:
      place[:] = ecg
  embeddings = encoder.embed(signals)[: len(recordings)]
  for (row, ecg), embedding in zip(recordings, embeddings):
    if ecg is not None and not np.isfinite(embedding).all():
      row.update(status="rejected", reason="the encoder's output is not finite")
  return embeddings


def write(file, rows, embeddings, probes, run) -> np.ndarray:
  """Writes a part whole or not at all; counts int [2]: recordings embedded, and those that could
  not be read now (LATER).

  Columns: TEXTS, embedding float32 [D], and float64 NAME_unit, NAME_unit_low, NAME_unit_high; null
  where rejected.
  """
  rejected = np.array([row["status"] != "ok" for row in rows])
  embedded = int(np.sum(~rejected))
  later = sum(row["reason"].startswith(LATER) for row in rows)
  columns = {}
  for name in TEXTS:
    columns[name] = pa.array([row[name] for row in rows], pa.string())
  columns["embedding"] = pa.FixedSizeListArray.from_arrays(
    embeddings.ravel(), embeddings.shape[1], mask=pa.array(rejected)
  )
  for place, name in enumerate(probes.columns):
    coef = probes.coef[:, place]
    intercept = probes.intercept[place]
    value = embeddings.astype(np.float64) @ coef + intercept
    half_width = probes.half_width[place]
    columns[name] = pa.array(value, mask=rejected)
    columns[f"{name}_low"] = pa.array(value - half_width, mask=rejected)
    columns[f"{name}_high"] = pa.array(value + half_width, mask=rejected)
  about = json.dumps({"run": run, "counts": [embedded, later]})
  table = pa.table(columns).replace_schema_metadata({"mmcl_jax": about})
  with files.atomic(file, "wb") as f:
    pq.write_table(table, f)
  return np.array([embedded, later])


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main, hosts=True)
