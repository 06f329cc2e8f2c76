"""Rate of the input pipeline, by reading threads and processes, on records of a published size.

    python benchmarks/input.py --out=study/input

Makes OUT/cohort once (synthetic, 10 s of ECG, ED and ES stacks of 6 x 96 x 96 with their labels, a
cine of 9 frames), then reads it as `mmcl train` does: shuffled, decoded, batched on the host,
nothing sent to a device. Files were just written or read before, so they come from memory, not from
a disk. Every line is JSON: records_per_s and mb_per_s (stored bytes) of the wall clock, cpu_ms per
record of this process and its children, first_batch_s; the last line sums up. cpu_ms says what a
core can do however busy the machine is.
"""

import argparse
import json
import os
import pathlib
import resource
import sys
import time
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import numpy as np

from mmcl_jax.data import builder, cohort as cohort_lib, pipeline, synthetic
from mmcl_jax.data.sources import synthetic as source

READERS = ((1, 0), (2, 0), (4, 0), (1, 1), (1, 2))  # threads, processes
FIELDS = ("ed_es_volumes",)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", default="study/input")
  parser.add_argument("--subjects", type=int, default=800)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--seconds", type=float, default=8, help="of every measurement")
  args = parser.parse_args()
  folder = pathlib.Path(args.out) / "cohort"
  if not (folder / "cohort.json").is_file():
    plan = source.plan(types.SimpleNamespace(subjects=args.subjects, seed=0))._replace(
      read=full_size
    )
    builder.build(
      str(folder),
      plan,
      shares=(1.0, 0.0, 0.0),
      profile="minimal",
      processes=len(os.sched_getaffinity(0)),
    )
  cohort = cohort_lib.load(str(folder))
  records = cohort.splits["train"]
  stored = sum(file.stat().st_size for file in folder.rglob("*.array_record*")) / len(records)
  found = [
    measure(records, threads, workers, args) | {"stored_kb": round(stored / 1e3, 1)}
    for threads, workers in READERS
  ]
  for line in found:
    line["mb_per_s"] = round(line["records_per_s"] * stored / 1e6, 1)
    print(json.dumps(line), flush=True)
  best = max(found, key=lambda line: line["records_per_s"])
  print(
    json.dumps(
      {
        "best": best,
        "records": len(records),
        "shapes": cohort.info["shapes"],
        "cpus": len(os.sched_getaffinity(0)),
        "load": [round(x, 2) for x in os.getloadavg()],
      }
    )
  )


def full_size(item):
  """A synthetic heart with an edge around it: 6 slices of 96 x 96 at ED and ES, and every third
  frame of the cine."""
  record = synthetic.subject(0, item.key)

  def edge(x):
    return np.pad(x, [(0, 0)] * (x.ndim - 2) + [(16, 16)] * 2, mode="edge")

  for name in ("ed_es_volumes", "labels"):
    record[name] = edge(record[name][:, 3:9])
  for name in ("cine_slice", "three_frames"):
    record[name] = edge(record[name][::3] if name == "cine_slice" else record[name])
  return record, ()


def measure(source, threads: int, workers: int, args) -> dict:
  before, begun = cpu_seconds(), time.perf_counter()
  batches = pipeline.train_batches(
    source, seed=0, batch=args.batch, fields=FIELDS, threads=threads, buffer=4, workers=workers
  )
  next(batches)
  first = time.perf_counter() - begun
  count, begun = 0, time.perf_counter()
  while time.perf_counter() - begun < args.seconds:
    next(batches)
    count += args.batch
  took = time.perf_counter() - begun
  del batches  # ends reading processes, whose time counts once they have ended
  return {
    "threads": threads,
    "workers": workers,
    "records_per_s": round(count / took, 1),
    "first_batch_s": round(first, 2),
    "cpu_ms": round(1e3 * (cpu_seconds() - before) / (count + args.batch), 3),
  }


def cpu_seconds() -> float:
  return sum(
    use.ru_utime + use.ru_stime
    for use in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
  )


if __name__ == "__main__":
  main()
