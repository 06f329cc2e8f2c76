"""What a run costs beside its steps: the start with and without the compilation cache, checkpoints,
validation, evaluation.

    source launch/env.sh && python benchmarks/run.py --cohort=demo/cohort --out=study/run

Every line is JSON. `start`: seconds of whole programs of one step, from the first process on, the
compilation cache (JAX_COMPILATION_CACHE_DIR) off, empty and filled. `checkpoint`: seconds for which
saving holds up the loop, by which the steps that run beside the writing are slower, and both as
shares of a run that saves as often as the recipe does by default. `evaluation`: recordings a second
through the encoder and an untrained one beside it, all splits, after compilation; and seconds of
the whole of `mmcl evaluate`.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed
# training alone, without evaluations in between
UNWATCHED = ("--config.evaluators.losses.every=0", "--config.evaluators.probes.every=0")


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--cohort", required=True)
  parser.add_argument("--recipe", default=f"{ROOT}/configs/joint.py:demo,steps=120")
  parser.add_argument(
    "--save", type=int, default=40, help="steps between two saves in the timed run"
  )
  parser.add_argument("--out", default="study/run")
  parser.add_argument(
    "--only",
    nargs="+",
    choices=("start", "checkpoint", "evaluation"),
    default=("start", "checkpoint", "evaluation"),
  )
  args = parser.parse_args()
  shutil.rmtree(args.out, ignore_errors=True)
  shared = {"recipe": pathlib.Path(args.recipe).name, "cpus": len(os.sched_getaffinity(0))}
  for name in args.only:
    found = {"start": start, "checkpoint": checkpoint, "evaluation": evaluation}[name](args)
    print(
      json.dumps({"what": name, **found, **shared, "load": [round(x, 2) for x in os.getloadavg()]}),
      flush=True,
    )


def command(args, workdir, *more):
  return [
    f"--config={args.recipe}",
    f"--workdir={args.out}/{workdir}",
    f"--config.data.cohort={args.cohort}",
    *more,
  ]


def start(args) -> dict:
  """Whole programs of one step that neither validate nor log more than it."""
  found = {}
  for name, cache in (
    ("no_cache_s", ""),
    ("empty_cache_s", f"{args.out}/cache"),
    ("filled_cache_s", f"{args.out}/cache"),
  ):
    env = os.environ | {
      "PYTHONPATH": str(ROOT),
      "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(cache).absolute()) if cache else "",
    }
    begun = time.perf_counter()
    subprocess.run(
      [
        sys.executable,
        "-m",
        "mmcl_jax.train",
        *command(args, name, "--config.steps=1", *UNWATCHED),
      ],
      check=True,
      env=env,
      stdout=subprocess.DEVNULL,
    )
    found[name] = round(time.perf_counter() - begun, 1)
  begun = time.perf_counter()
  subprocess.run(
    [sys.executable, "-c", "import mmcl_jax.train"],
    check=True,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  return found | {"imports_s": round(time.perf_counter() - begun, 1)}


def checkpoint(args) -> dict:
  """Steps are timed from batch to batch, and `Checkpoints.save` by itself."""
  from mmcl_jax import configuration, train
  from mmcl_jax.training import checkpoint as room, parallel

  config, flags = configuration.from_flags(
    "run",
    "",
    command(args, "checkpoint", f"--config.every.save={args.save}", *UNWATCHED),
    {"workdir": ""},
  )
  default, _ = configuration.from_flags(
    "run", "", [f"--config={re.sub(',(steps|batch)=[0-9]+', '', args.recipe)}"], {}
  )
  began, held, polls, signed = [], [], [], []
  to_global, save = parallel.to_global, room.Checkpoints.save
  poll, sign = room.Checkpoints.poll, room.Checkpoints.sign

  def timed_to_global(*given):
    began.append(time.perf_counter())
    return to_global(*given)

  def timed_save(self, step, *given, **named):
    at = time.perf_counter()
    save(self, step, *given, **named)
    held.append((step, time.perf_counter() - at))

  def timed_poll(self):
    at = time.perf_counter()
    poll(self)
    polls.append(time.perf_counter() - at)

  def noted_sign(self, step, *given):
    sign(self, step, *given)
    signed.append((step, len(began)))

  parallel.to_global, room.Checkpoints.save = timed_to_global, timed_save
  room.Checkpoints.poll, room.Checkpoints.sign = timed_poll, noted_sign
  with contextlib.redirect_stdout(io.StringIO()):
    train.train(config, flags.workdir)
  # took[i]: step i + 1 and what came between it and the next batch
  took = [b - a for a, b in zip(began, began[1:])]
  # steps that ran while it was written
  beside = {step: range(step, last) for step, last in signed if step < config.steps}
  saving = {step - 1 for step, _ in held} | {0, 1}
  calm = statistics.median(
    t
    for i, t in enumerate(took)
    if i not in saving and not any(i in steps for steps in beside.values())
  )
  slower = [sum(took[i] - calm for i in steps if i < len(took)) for steps in beside.values()]
  polling = sum(polls) / len(held)
  stall = statistics.median(seconds for step, seconds in held if step < config.steps)
  size = sum(
    f.stat().st_size
    for f in pathlib.Path(flags.workdir, "checkpoints", str(config.steps)).rglob("*")
    if f.is_file()
  )
  # the steps beside are slower by the noise, or more
  whole = stall + max(statistics.median(slower), polling)
  return {
    "step_ms": round(1e3 * calm, 1),
    "save_call_s": round(stall, 3),
    "polling_s": round(polling, 3),
    "slower_beside_s": round(statistics.median(slower), 3),
    "mib": round(size / 2**20, 1),
    "saves": len(slower),
    "steps_beside": statistics.median(len(steps) for steps in beside.values()),
    "default_interval_steps": default.every.save,
    "share_at_default": round(whole / calm / default.every.save, 5),
  }


def evaluation(args) -> dict:
  from mmcl_jax import evaluate, train
  from mmcl_jax.data import cohort as cohort_lib, schema
  from mmcl_jax.evaluators import embeddings
  from mmcl_jax.evaluators.context import Context
  from mmcl_jax.training import checkpoint as room, restore

  workdir, collect, timed = f"{args.out}/checkpoint", embeddings.collect, []
  if not room.latest(workdir):
    train.main(command(args, "checkpoint"))

  def twice(*given, **named):
    """The first time compiles."""
    collect(*given, **named)
    begun = time.perf_counter()
    found = collect(*given, **named)
    timed.append((len(found["subject"]), time.perf_counter() - begun))
    return found

  begun = time.perf_counter()
  with contextlib.redirect_stdout(io.StringIO()):
    evaluate.evaluate(workdir)
  whole = time.perf_counter() - begun
  run, cohort = restore.load_run(workdir), cohort_lib.load(args.cohort)
  embeddings.collect = twice
  with contextlib.redirect_stdout(io.StringIO()):
    for split in schema.SPLITS:
      Context(run, cohort, "test", workdir, 64).features(split)
  rows = sum(n for n, _ in timed)
  return {
    "evaluate_s": round(whole, 1),
    "recordings": rows,
    "recordings_per_s": round(rows / sum(seconds for _, seconds in timed), 1),
  }


if __name__ == "__main__":
  main()
