"""Rate and memory of `mmcl embed`, from WFDB files to Parquet, against its parts by themselves.

    source launch/env.sh && python benchmarks/embed.py --workdir=demo/joint --out=study/embed

Writes synthetic ECGs as WFDB once, and hard links of them for as many recordings as wanted. Every
line is JSON:

    reading   recordings/s read and normalised, without the encoder, by one thread, two threads, and
              the program's processes; cpu_ms a recording, of this process alone
    encoder   recordings/s of the encoder by itself, on arrays that lie in memory
    embed     the whole program on N and on 4 N recordings, in parts of N / 2: seconds; its memory
              after the first part, the most after a later one, and its peak, which the start may
              have made; the peak of its largest reader; recordings/s of what 4 N have more than N,
                so without the start; and that as a share of the encoder's

Files were just written or read before, so they come from memory, not from a disk.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from concurrent import futures

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

import numpy as np
import wfdb

from mmcl_jax.data import ahead, schema, synthetic

DISTINCT = 128
READERS = {
  "1 thread": lambda: futures.ThreadPoolExecutor(1),
  "2 threads": lambda: futures.ThreadPoolExecutor(2),
  "processes": ahead.readers,
}
# The program in parts of a given size, then its memory after every part, its peak and that of its
# largest reader.
MEASURED = """import pathlib, sys, threading, time
from mmcl_jax import embed

def mib(process, what="VmHWM:"):
  return int(pathlib.Path("/proc", process, "status").read_text().partition(what)[2].split()[0]) // 1024

def watch():
  while True:
    for process in [p for task in pathlib.Path("/proc/self/task").glob("*/children") for p in task.read_text().split()]:
      try:
        readers.append(mib(process))
      except (OSError, IndexError):  # it has just ended
        pass
    time.sleep(0.2)

def measured(*args):
  counts = write(*args)
  after.append(mib("self", "VmRSS:"))
  return counts

readers, after, write, embed.write = [0], [], embed.write, measured
threading.Thread(target=watch, daemon=True).start()
embed.PART = int(sys.argv.pop(1))
embed.main(sys.argv[1:])
print("MiB", after[0], max(after[1:]), mib("self"), max(readers))"""


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, help="a trained run")
  parser.add_argument("--out", default="study/embed")
  parser.add_argument(
    "--recordings", type=int, default=4 * DISTINCT, help=f"N, a multiple of {DISTINCT}"
  )
  parser.add_argument("--batch", type=int, default=32)
  args = parser.parse_args()
  folders = write(pathlib.Path(args.out) / "ecg", 4 * args.recordings // DISTINCT)
  print(
    json.dumps({"cpus": len(os.sched_getaffinity(0)), "batch": args.batch, "recipe": args.workdir}),
    flush=True,
  )
  show("reading", reading(folders, args))
  alone = show("encoder", encoder(args))
  show("embed", program(folders, alone["recordings_per_s"], args))


def show(what, found) -> dict:
  print(
    json.dumps({"what": what, **found, "load": [round(x, 2) for x in os.getloadavg()]}), flush=True
  )
  return found


def write(folder, copies) -> list:
  """Folders of DISTINCT recordings each; all but the first are links."""
  folders = [folder / f"{i:04d}" for i in range(copies)]
  for i in range(DISTINCT):
    if not (folders[0] / f"{i:03d}.hea").exists():
      folders[0].mkdir(parents=True, exist_ok=True)
      signals = synthetic.subject(0, i)["ecg"].T.astype(float)
      wfdb.wrsamp(
        f"{i:03d}",
        fs=schema.ECG_RATE_HZ,
        units=["mV"] * 12,
        sig_name=list(schema.LEADS),
        p_signal=signals,
        fmt=["16"] * 12,
        write_dir=str(folders[0]),
      )
  for copy in folders[1:]:
    copy.mkdir(exist_ok=True)
    for file in folders[0].iterdir():
      if not (copy / file.name).exists():
        os.link(file, copy / file.name)
  return folders


def reading(folders, args) -> dict:
  found, start = {}, ahead.readers
  paths = [str(path) for path in sorted(folders[0].glob("*.hea"))] * 2
  for name, readers in READERS.items():
    ahead.readers = readers
    stream = ahead.read_ahead(paths, "minimal", 2 * args.batch)
    for _ in range(16):  # processes have started
      next(stream)
    cpu, begun = time.process_time(), time.perf_counter()
    rest = sum(1 for _ in stream)
    found[name] = {
      "recordings_per_s": round(rest / (time.perf_counter() - begun), 1),
      "cpu_ms": round(1e3 * (time.process_time() - cpu) / rest, 1),
    }
  ahead.readers = start
  return found


def encoder(args) -> dict:
  from mmcl_jax.training import restore

  loaded = restore.load_encoder(args.workdir)
  signals = (
    np.random.default_rng(0).normal(size=(args.batch, 12, schema.ECG_SAMPLES)).astype(np.float32)
  )
  loaded.embed(signals)  # compiles
  took = []
  for _ in range(20):
    begun = time.perf_counter()
    loaded.embed(signals)
    took.append(time.perf_counter() - begun)
  return {
    "recordings_per_s": round(args.batch / statistics.median(took), 1),
    "best_recordings_per_s": round(args.batch / min(took), 1),
  }


def program(folders, alone, args) -> dict:
  found = {}
  for times in (1, 4):
    count, out = (
      times * args.recordings,
      pathlib.Path(args.out) / f"embedded-{times}-{time.time_ns()}",
    )
    flags = [
      f"--workdir={args.workdir}",
      f"--out={out}",
      f"--batch={args.batch}",
      *(f"--input={folder}" for folder in folders[: count // DISTINCT]),
    ]
    begun = time.perf_counter()
    done = subprocess.run(
      [sys.executable, "-c", MEASURED, str(args.recordings // 2), *flags],
      check=True,
      text=True,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      stdout=subprocess.PIPE,
    )
    seconds = time.perf_counter() - begun
    memory = dict(
      zip(("first", "later", "peak", "reader"), map(int, done.stdout.rpartition("MiB")[2].split()))
    )
    found[times] = {"recordings": count, "seconds": round(seconds, 1), "mib": memory}
  rate = 3 * args.recordings / (found[4]["seconds"] - found[1]["seconds"])
  return {
    "n": found[1],
    "4n": found[4],
    "recordings_per_s": round(rate, 1),
    "of_the_encoder": round(rate / alone, 2),
  }


if __name__ == "__main__":
  main()
