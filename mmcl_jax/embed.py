"""`mmcl embed`: embeddings and predicted phenotypes of ECG recordings, from a saved checkpoint.

A recording that cannot be read costs one row of the table, never the run. Several hosts take the recordings in turn, and
the first one writes.
"""

import argparse
import csv
import hashlib
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mmcl_jax.data.preprocess.ecg import normalise, samples, to_standard
from mmcl_jax.data.readers import ecg_file, find_ecg, read_ecg
from mmcl_jax.data.schema import LEADS
from mmcl_jax.errors import BadRecord, UserError, writing
from mmcl_jax.training import distributed

COLUMNS = ("path", "status", "reason", "flags")


class Probes(NamedTuple):
  """Linear read-outs: prediction = embedding @ coef [D, K] + intercept [K], one column name a phenotype (LVM_g)."""
  columns: tuple[str, ...]
  coef: np.ndarray
  intercept: np.ndarray


def main(argv=None):
  args = parse(argv)
  from mmcl_jax.training.restore import load_encoder  # brings JAX: not before the flags are known to be right
  paths, here = find_recordings(args.input), distributed.here
  names = hashlib.sha256("\0".join(map(str, paths)).encode("utf-8", "surrogateescape")).hexdigest()
  distributed.agree({"--workdir": os.path.abspath(args.workdir), "--step": args.step, "the number of recordings": len(paths),
                     "the hash of their names": names})
  encoder = load_encoder(args.workdir, args.step)
  probes = load_probes(args.workdir, encoder.step) if here.index == 0 else None
  out = Path(args.out)
  with writing(out):
    out.mkdir(parents=True, exist_ok=True)

  rows, embeddings = together(*embed(encoder, paths[here.index::here.count], args.batch))
  if here.index > 0:
    return
  if len(embeddings):
    predict(probes, embeddings, [row for row in rows if row["status"] == "ok"])
  with writing(out):
    write(out, rows, embeddings, probes.columns)

  counts = f"{len(embeddings)} of {len(rows)} recordings"
  if not len(embeddings):
    raise UserError(f"{counts} embedded; the first, {rows[0]['path']}: {rows[0]['reason']}. All reasons: "
                    f"{out / 'records.csv'}")
  print(f"{counts} embedded with step {encoder.step}: {out / 'embeddings.npy'}, {out / 'records.csv'}")


def parse(argv):
  parser = argparse.ArgumentParser(prog="mmcl embed", description=__doc__.partition("\n\n")[0], allow_abbrev=False)
  parser.add_argument("--workdir", required=True, help="folder of the training run")
  parser.add_argument("--input", nargs="+", action="extend", default=[], metavar="PATH",
                      help="ECGs, and folders to search for them: WFDB (.hea, .mat, .dat or stem), GE CardioSoft "
                           "(.xml), DICOM (.dcm), arrays (.csv, .npy) with a .json that gives their rate")
  parser.add_argument("--out", required=True, help="folder for embeddings.npy and records.csv")
  parser.add_argument("--step", type=int, help="checkpoint to use; the newest unless given")
  parser.add_argument("--batch", type=int, default=32, help="recordings per call of the encoder (default: 32)")
  parser.add_argument("more", nargs="*", metavar="PATH", help="more inputs")
  args = parser.parse_intermixed_args(argv)
  args.input += args.more
  if not args.input:
    parser.error("no recordings: give --input=PATH")
  if args.batch < 1:
    parser.error(f"--batch={args.batch}; expected at least 1")
  return args


def find_recordings(inputs) -> list[Path]:
  """The recordings that files, stems and folders name, in that order, each once; folders sorted.

  A record's header and samples (`folder/*`) are one recording. What does not exist stays in, to be rejected by name.
  """
  found = {}
  for path in map(Path, inputs):
    for recording in (find_ecg(path) or [path]) if os.path.isdir(path) else [path]:
      found.setdefault(ecg_file(recording), recording)
  return list(found.values())


def embed(encoder, paths, batch):
  """Reads, normalises and embeds recordings; holds one batch of signals at a time.

  Args:
    encoder: `config.data.ecg_profile`, and `embed`: float32 [batch, 12, samples of the profile] -> float32 [batch, D].
    paths: recordings.
    batch: size of every call of the encoder, the last one padded with zeros, so that it compiles once.

  Returns:
    (rows, embeddings): one dict of COLUMNS a path in order; float32 [N, D] of the rows whose status is ok, in order.
  """
  profile = encoder.config.data.ecg_profile
  rows, waiting, embeddings = [], [], []

  def flush():
    signals = np.zeros((batch, len(LEADS), samples(profile)), np.float32)
    signals[:len(waiting)] = [signal for _, signal in waiting]
    for (row, _), embedding in zip(waiting, np.asarray(encoder.embed(signals))):
      if np.isfinite(embedding).all():
        embeddings.append(embedding)
      else:
        row.update(status="rejected", reason="the encoder's output is not finite")
    waiting.clear()

  for path in tqdm(paths, desc="embed", unit="ECG", disable=distributed.here.index > 0):
    row = {"path": str(path), "status": "ok", "reason": "", "flags": ""}
    rows.append(row)
    try:
      recording = read_ecg(path)
      signal = normalise(to_standard(recording.ecg_mv, recording.rate_hz), profile)
    except BadRecord as error:
      row.update(status="rejected", reason=" ".join(str(error).split()))
      continue
    except (OSError, MemoryError) as error:
      row.update(status="rejected", reason=f"could not be read now ({getattr(error, 'strerror', '') or type(error).__name__})")
      continue
    row["flags"] = "; ".join(recording.flags)
    waiting.append((row, signal))
    if len(waiting) == batch:
      flush()
  if waiting:
    flush()
  return rows, np.array(embeddings, np.float32)


def together(rows, embeddings):
  """The rows and embeddings of all hosts, which took the recordings in turn, in the order of the recordings."""
  if distributed.here.count == 1:
    return rows, embeddings
  texts = distributed.gather(np.frombuffer(json.dumps(rows).encode(), np.uint8))
  tables = [iter(json.loads(text.tobytes())) for text in texts]
  numbers = distributed.gather(embeddings.ravel())
  rows = [row for turn in itertools.zip_longest(*tables) for row in turn if row]
  ok = [row["status"] == "ok" for row in rows]
  width = sum(map(len, numbers)) // max(sum(ok), 1) or 1  # 1: none was ok
  vectors = [iter(part.reshape(-1, width)) for part in numbers]
  found = [next(vectors[i % len(vectors)]) for i in np.flatnonzero(ok)]
  return rows, np.array(found, np.float32)


def load_probes(workdir, step) -> Probes:
  """The phenotype probes that `mmcl evaluate` left for a step; none, and a line that says so, where it has not run."""
  path = Path(workdir) / "evaluation" / str(step) / "probes.npz"
  if not path.exists():
    print(f"no phenotypes will be predicted: {path} is missing; mmcl evaluate --workdir={workdir} makes it "
          "(with --cohort=DIR where the weights come from elsewhere)")
    return Probes((), np.zeros((0, 0)), np.zeros(0))
  try:
    with np.load(path, allow_pickle=False) as arrays:
      columns = tuple(f"{name}_{unit}" for name, unit in zip(arrays["names"], arrays["units"], strict=True))
      probes = Probes(columns, arrays["coef"], arrays["intercept"])
  except Exception as error:  # a damaged archive raises zlib's, zipfile's and NumPy's errors alike
    raise UserError(f"cannot read {path} ({error}); mmcl evaluate --workdir={workdir} makes it anew") from error
  if probes.coef.shape[1:] != (len(columns),) or probes.intercept.shape != (len(columns),):
    raise UserError(f"{path}: {len(columns)} names, coef {probes.coef.shape}, intercept {probes.intercept.shape}; "
                    "expected coef [D, names] and intercept [names]")
  return probes


def predict(probes, embeddings, rows):
  """Puts the predicted phenotypes of `embeddings` [N, D] into `rows` [N]."""
  if not probes.columns:
    return
  if len(probes.coef) != embeddings.shape[1]:
    raise UserError(f"the probes take embeddings of width {len(probes.coef)}, the encoder gives {embeddings.shape[1]}; "
                    "mmcl evaluate fits them anew")
  for row, values in zip(rows, embeddings.astype(np.float64) @ probes.coef + probes.intercept):
    row.update(zip(probes.columns, (f"{value:.6g}" for value in values)))


def write(out, rows, embeddings, predicted):
  """Writes `records.csv` and `embeddings.npy` whole or not at all; an earlier run's go, also where nothing was ok."""
  with tempfile.TemporaryDirectory(dir=out, prefix=".embed-") as staging:
    np.save(Path(staging, "embeddings.npy"), embeddings)
    with open(Path(staging, "records.csv"), "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
      table = csv.DictWriter(file, COLUMNS + predicted)
      table.writeheader()
      table.writerows(rows)
    (out / "embeddings.npy").unlink(missing_ok=True)  # never new embeddings beside an old table, nor the reverse
    os.replace(Path(staging, "records.csv"), out / "records.csv")
    if len(embeddings):
      os.replace(Path(staging, "embeddings.npy"), out / "embeddings.npy")


if __name__ == "__main__":
  from mmcl_jax import cli
  cli.run(main, hosts=True)
