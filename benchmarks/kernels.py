"""What each function of models/kernels.py gives a training step: the step with all of them against
the step without one.

    source launch/env.sh && python benchmarks/kernels.py --case=mae --batch=64

One process holds all forms of the step and runs them in turn, --rounds times. A JSON line a form:
least and median ms, the share of the full form's median, processor seconds a step, temporary
memory. Ends with a Markdown table.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # this checkout, whatever is installed

import jax

import step as benchmark
from mmcl_jax.models import kernels


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--case", choices=benchmark.CASES, default="mae")
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=6)
  args = parser.parse_args()
  every = frozenset(kernels.OWN)
  forms = (
    {"all": every}
    | {f"without {name}": every - {name} for name in sorted(every)}
    | {"none": frozenset()}
  )
  built, took, busy = {}, {name: [] for name in forms}, {name: [] for name in forms}
  for name, own in forms.items():
    kernels.OWN = own
    jax.clear_caches()
    built[name] = benchmark.build(args.case, args.batch, 100, [])
  for _ in range(args.rounds + 1):
    for name, one in built.items():
      begun, before = time.perf_counter(), os.times()
      one.state, _ = jax.block_until_ready(one.step(one.state, one.rows))
      took[name].append(1e3 * (time.perf_counter() - begun))
      after = os.times()
      busy[name].append(after.user + after.system - before.user - before.system)
  lines, whole = [], statistics.median(took["all"][1:])
  for name, times in took.items():
    times = times[1:]  # the first touches its memory for the first time
    median = statistics.median(times)
    lines.append(
      {
        "form": name,
        "min_ms": round(min(times)),
        "median_ms": round(median),
        "of_all": round(median / whole, 2),
        "cpu_s": round(statistics.median(busy[name][1:]), 2),
        "temporary_mib": built[name].step.memory_analysis().temp_size_in_bytes >> 20,
      }
    )
    print(json.dumps({"case": args.case, "batch": args.batch, **lines[-1]}), flush=True)
  print("\n| form | " + " | ".join(list(lines[0])[1:]) + " |\n|" + "---|" * len(lines[0]))
  print("\n".join("| " + " | ".join(map(str, line.values())) + " |" for line in lines))


if __name__ == "__main__":
  main()
