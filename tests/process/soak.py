"""Trains for an hour beside evaluations and checkpoints, and watches what must not grow: memory,
open files, disk.

    python tests/process/soak.py --minutes=60 --out=soak        # soak.jsonl, soak.svg and a table

Samples the process (Linux's /proc) every few seconds; slopes are least squares over the second
half, when everything has been compiled, drawn and cached once. The rate is that of the log of
training, its drift the change of a straight line over the second half. Other work on the machine
shows in the rate, less in the processor time of a step; the load is printed beside them.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
for folder in ("tests/helpers", "."):
  sys.path.insert(0, str(ROOT / folder))  # this checkout, whatever is installed

import common
import numpy as np
from tqdm import tqdm

from mmcl_jax import prepare
from mmcl_jax.training import metrics

EVERY_S = 5.0


def sample(process: int, workdir: pathlib.Path, start: float) -> dict:
  """Resident MiB, open files, threads, processor seconds, MiB of the workdir and steps done, `s`
  seconds after the start."""
  status = dict(
    line.split(":", 1) for line in pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
  )
  # ticks
  user, system = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
  disk = 0
  for file in workdir.rglob("*"):
    with contextlib.suppress(OSError):  # an old checkpoint that goes
      disk += file.stat().st_size
  last = [record["step"] for record in metrics.read(workdir / "metrics.jsonl")][-1:] or [0]
  return {
    "s": round(time.monotonic() - start, 1),
    "mib": int(status["VmRSS"].split()[0]) / 1024,
    "files": len(os.listdir(f"/proc/{process}/fd")),
    "threads": int(status["Threads"]),
    "cpu_s": (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"),
    "disk_mib": round(disk / 2**20, 2),
    "step": last[0],
    "load": os.getloadavg()[0],
  }


def slope(samples: list[dict], name: str) -> float:
  """Change of `name` an hour over the second half of the samples, by least squares."""
  half = samples[len(samples) // 2 :]
  return float(np.polyfit([one["s"] / 3600 for one in half], [one[name] for one in half], 1)[0])


def drift(samples: list[dict], name: str, by: str) -> float:
  """Change of d name / d by from the first to the last of the samples, of its mean: a parabola's,
  by least squares."""
  x, y = (np.array([one[key] for one in samples], float) for key in (by, name))
  if not np.ptp(x) or not np.ptp(y):
    return np.nan
  curve = np.polynomial.Polynomial.fit(x, y, 2).deriv()
  return float((curve(x[-1]) - curve(x[0])) * (x[-1] - x[0]) / (y[-1] - y[0]))


def soak(minutes: float, out: pathlib.Path, flags: list[str]) -> list[dict]:
  """Trains for so long in a process of its own; its samples, also written to out.jsonl."""
  samples = []
  with tempfile.TemporaryDirectory(prefix="soak-") as folder, open(f"{out}.log", "w") as log:
    base = pathlib.Path(folder)
    prepare.prepare_synthetic(
      str(base / "cohort"),
      common.SUBJECTS,
      seed=7,
      shares=common.SHARES,
      profile="minimal",
      processes=2,
    )
    command = [
      sys.executable,
      "-m",
      "mmcl_jax.train",
      *common.tiny_flags(base / "cohort", base / "w"),
      "--config.steps=10000000",
      "--config.every.log=10",
      "--config.every.save=50",
      "--config.every.evaluate=50",
      *flags,
    ]
    running = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
    start = time.monotonic()
    try:
      with tqdm(total=round(minutes * 60), unit="s") as progress:
        while time.monotonic() - start < minutes * 60:
          time.sleep(EVERY_S)
          if running.poll() is not None:
            raise SystemExit(f"training ended with status {running.returncode}, see {out}.log")
          samples.append(sample(running.pid, base / "w", start))
          progress.update(min(round(samples[-1]["s"]), progress.total) - progress.n)
      stop = time.monotonic()
      running.terminate()
      status = running.wait(timeout=300)
      samples.append({"left_after_s": round(time.monotonic() - stop, 1), "status": status})
    finally:
      running.kill()
  pathlib.Path(f"{out}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
  return samples


def summary(samples: list[dict]) -> dict:
  *samples, end = samples
  half = samples[len(samples) // 2 :]
  return {
    "minutes": round(samples[-1]["s"] / 60, 1),
    "steps": samples[-1]["step"],
    "MiB at the end": round(samples[-1]["mib"]),
    "MiB an hour": round(slope(samples, "mib"), 1),
    "files at the end": samples[-1]["files"],
    "files an hour": round(slope(samples, "files"), 2),
    "threads an hour": round(slope(samples, "threads"), 2),
    "disk MiB at the end": samples[-1]["disk_mib"],
    "disk MiB an hour": round(slope(samples, "disk_mib"), 2),
    "steps/s": round((half[-1]["step"] - half[0]["step"]) / (half[-1]["s"] - half[0]["s"]), 2),
    "drift of the rate": f"{drift(half, 'step', 's'):+.1%}",
    "processor s a step": round(
      (half[-1]["cpu_s"] - half[0]["cpu_s"]) / max(half[-1]["step"] - half[0]["step"], 1), 3
    ),
    "drift of it": f"{drift(half, 'cpu_s', 'step'):+.1%}",
    "load": f"{min(one['load'] for one in half):.1f} to {max(one['load'] for one in half):.1f}",
    **end,
  }


def draw(samples: list[dict], file: str) -> None:
  import matplotlib

  matplotlib.use("svg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(4, 1, figsize=(7, 7), sharex=True, layout="constrained")
  for axis, (name, title) in zip(
    axes,
    (
      ("mib", "resident MiB"),
      ("files", "open files"),
      ("disk_mib", "MiB in the workdir"),
      ("step", "steps"),
    ),
  ):
    axis.plot(
      [one["s"] / 60 for one in samples[:-1]], [one[name] for one in samples[:-1]], "k-", lw=1
    )
    axis.set_ylabel(title)
    axis.set_ylim(0, None)
  axes[-1].set_xlabel("minutes of training")
  figure.savefig(file)


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--minutes", type=float, default=60)
  parser.add_argument("--out", default="soak")
  args, flags = parser.parse_known_args()
  samples = soak(args.minutes, pathlib.Path(args.out), flags)
  draw(samples, f"{args.out}.svg")
  found = summary(samples)
  print(
    "| "
    + " | ".join(found)
    + " |\n|"
    + "---|" * len(found)
    + "\n| "
    + " | ".join(map(str, found.values()))
    + " |"
  )


if __name__ == "__main__":
  main()
