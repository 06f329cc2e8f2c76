"""Everything that is to be known of one GPU, in one command and 8 minutes: our step against another
program's, the limits.

    python benchmarks/gpu.py collect --wheels=wheels                   # where there is a network: what the GPU machine lacks
    python benchmarks/gpu.py --wheels=wheels --against="python torch_baseline.py" --out=gpu.json

The second line runs on a machine without one that has JAX for its GPU, flax, optax, orbax and, for
--against, PyTorch; the wheels are unpacked into a folder of their own and nothing is installed.
--against is a command that takes --case --batch
--steps --device=cuda --amp --compile and ends with a JSON line like benchmarks/step.py's.

In order of weight, as far as --minutes allow (what is left out is named): `joint` and `mae_medium`
in bfloat16 at an equal batch, ours and theirs in turn; the same at larger batches, for the best of
each; the base size, whose matrix products `matmul_share_of_peak` holds against a measured peak; the
step fed by the pipeline against one on a resident batch. OUT is written after every measurement.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What the step and the pipeline import beside JAX, flax, optax, orbax and what these need.
PACKAGES = (
  "grain",
  "array_record",
  "tensorflow-datasets",
  "clu",
  "ml-collections",
  "importlib_resources",
  "dm-tree",
  "etils",
  "immutabledict",
  "promise",
  "simple-parsing",
  "docstring-parser",
  "tensorflow-metadata",
  "googleapis-common-protos",
  "toml",
  "dill",
  "absl-py",
  "fsspec",
  "zipp",
  "typing-extensions",
  "wrapt",
  "psutil",
  "tqdm",
  "protobuf",
  "more-itertools",
  "tensorboardX",
  "wfdb",
  "pydicom",
  "nibabel",
  "defusedxml",
  "packaging",
  "six",
  "portpicker",
)
# the first: equal for both
BATCHES = {"joint": (64, 128, 256, 512), "mae_medium": (256, 512, 1024, 2048)}


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("verb", nargs="?", choices=("measure", "collect"), default="measure")
  parser.add_argument("--wheels", help="folder of wheels that this machine lacks")
  parser.add_argument("--python", default="3.12", help="of the GPU machine, for collect")
  parser.add_argument("--against", help="the other program")
  parser.add_argument("--minutes", type=float, default=8)
  parser.add_argument("--device", default="gpu")
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument(
    "--batches", type=json.loads, default=BATCHES, help='{"joint": [64, 128], "mae_medium": [256]}'
  )
  parser.add_argument("--out", default="gpu.json")
  args = parser.parse_args()
  if args.verb == "collect":
    collect(args)
  else:
    measure(args)


def collect(args) -> None:
  platforms = [f"--platform=manylinux_2_{n}_x86_64" for n in (34, 31, 28, 27, 24, 17)] + [
    "--platform=manylinux2014_x86_64",
    "--platform=manylinux1_x86_64",
  ]
  versions = {
    line.partition("==")[0]: line for line in (ROOT / "launch/constraints.txt").read_text().split()
  }
  wanted = [versions.get(name, name) for name in PACKAGES]
  for one in wanted:  # one by one: some have no wheel, and are made into one here
    found = subprocess.run(
      [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        f"--python-version={args.python}",
        "--implementation=cp",
        *platforms,
        "-d",
        args.wheels,
        one,
      ]
    )
    if found.returncode:
      subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", args.wheels, one],
        check=True,
      )
  size = sum(file.stat().st_size for file in pathlib.Path(args.wheels).glob("*.whl"))
  print(
    f"{len(list(pathlib.Path(args.wheels).glob('*.whl')))} wheels, {size / 2**20:.0f} MiB in "
    f"{args.wheels}"
  )


def environment(wheels: str | None, scratch: str) -> dict[str, str]:
  """The environment of the commands; with `wheels`, what lies there is installed into `scratch`."""
  env = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": f"{scratch}/jax",
    "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/torch",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "PYTHONPATH": str(ROOT),
  }
  if wheels:
    subprocess.run(
      [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--target",
        f"{scratch}/site",
        *map(str, pathlib.Path(wheels).glob("*.whl")),
      ],
      check=True,
    )
    env["PYTHONPATH"] += f"{os.pathsep}{scratch}/site"
  return env


def measure(args) -> None:
  ends = time.monotonic() + 60 * args.minutes
  scratch = tempfile.TemporaryDirectory()
  env = environment(args.wheels, scratch.name)
  found = {"cpus": len(os.sched_getaffinity(0)), "measured": [], "left_out": [], "failed": []}

  def run(name: str, command: list[str], needs_s: float) -> dict | None:
    """The last line of a command, kept under `name`; None where time is short or it failed."""
    left = ends - time.monotonic()
    if left < needs_s:
      found["left_out"].append(name)
      return None
    begun, one = time.monotonic(), None
    try:
      done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=left)
      if done.returncode == 0:
        one = json.loads(done.stdout.strip().splitlines()[-1])
        found["measured"].append(
          {"name": name, "seconds": round(time.monotonic() - begun, 1), **one}
        )
      else:
        found["failed"].append(
          {"name": name, "status": done.returncode, "said": done.stderr[-1000:]}
        )
    except subprocess.TimeoutExpired:
      found["left_out"].append(name)
    pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
    said = f"{one['samples_per_s']} a second, {one['step_ms']}" if one else "none"
    print(f"{name}: {said}; {ends - time.monotonic():.0f} s left", flush=True)
    return one

  dtype = "float32" if args.device == "cpu" else "bfloat16"  # a CPU only rehearses

  def ours(case, batch, *more):
    return [
      sys.executable,
      f"{ROOT}/benchmarks/step.py",
      f"--case={case}",
      f"--batch={batch}",
      f"--steps={args.steps}",
      f"--device={args.device}",
      f"--config.model.dtype={dtype}",
      *more,
    ]

  def theirs(case, batch):
    return [
      *shlex.split(args.against),
      f"--case={case}",
      f"--batch={batch}",
      f"--steps={args.steps}",
      f"--device={'cuda' if args.device == 'gpu' else args.device}",
      "--amp",
      "--compile",
    ]

  sides = {"ours": ours} | ({"theirs": theirs} if args.against else {})
  for round_ in (1, 2):  # the second finds everything compiled
    for case, batches in args.batches.items():
      for side, command in sides.items():
        run(
          f"{side} {case} {batches[0]} {round_}",
          command(case, batches[0]),
          60 if round_ == 1 else 25,
        )
  case, batch = "joint", args.batches["joint"][0]
  run(f"base {case} {batch}", ours(case, batch, "--config.model.towers.ecg.size=base"), 60)
  if ends - time.monotonic() > 90:
    done = subprocess.run(
      [
        sys.executable,
        f"{ROOT}/benchmarks/input.py",
        f"--out={scratch.name}",
        "--subjects=512",
        "--seconds=2",
      ],
      env=env | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )
    found["input"] = done.stdout.splitlines() if done.returncode == 0 else done.stderr[-1000:]
    fed = (
      f"--cohort={scratch.name}/cohort",
      "--config.loader.threads=8",
      "--config.loader.buffer=16",
    )
    run(f"pipeline {case} {batch}", ours(case, batch, *fed), 60)
  else:
    found["left_out"] += ["input", f"pipeline {case} {batch}"]
  for i in range(1, max(map(len, args.batches.values()))):
    for case, batches in args.batches.items():
      for side, command in sides.items():
        if i < len(batches):
          run(f"{side} {case} {batches[i]}", command(case, batches[i]), 60)
  found["summary"] = {
    case: summary(found["measured"], case, batches[0]) for case, batches in args.batches.items()
  }
  pathlib.Path(args.out).write_text(json.dumps(found, indent=1) + "\n")
  print(json.dumps(found["summary"]))


def summary(measured: list[dict], case: str, equal: int) -> dict:
  """Least step times at the equal batch, and the best rates at any, each side's and their ratio
  (above 1: ours is faster)."""

  def best(side, of):
    return max(
      (of(one) for one in measured if one["name"].startswith(f"{side} {case} ")), default=None
    )

  def rate(one):
    return 1e3 * one["batch"] / one["step_ms"]["min"]

  def at_equal(one):
    return rate(one) if one["batch"] == equal else 0

  found = {}
  for name, of in (("equal_batch", at_equal), ("best_batch", rate)):
    a, b = best("ours", of), best("theirs", of)
    found[name] = {
      "ours_per_s": a and round(a, 1),
      "theirs_per_s": b and round(b, 1),
      "ratio": a and b and round(a / b, 3),
    }
  return found


if __name__ == "__main__":
  main()
