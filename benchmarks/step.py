"""Time of one training step, in the shapes of the published systems, against whatever else does the
same.

    python benchmarks/step.py --case=joint --batch=8 --steps=12
    python benchmarks/step.py --case=mae --batch=64 --rounds=5 --against="python other.py --case mae --batch 64 --steps 12"

Cases: mae (MMCL's ECG encoder, 2,500 samples), mae_medium (dual-phase's, 5,000 samples), mmcl (ECG
encoder + ResNet-50 on three frames of 210 x 210), dual_phase (medium encoder + two slow-R50 on 6 x
85 x 92, all trained), joint (dual_phase and the reconstruction). It is the program's own step:
int16 and uint8 in, forward, backward, AdamW. Augmentation and drop-path are off, as in a plain
reference step; --config.x=y words change anything else (--config.model.dtype=bfloat16).

Data are random and lie on the device already. Steps are timed one by one, each waited for, after
the compilation and --warmup further ones. Last line: JSON with samples_per_s (of the median), step_ms, params_m
(trained parameters), the compile time, load of the machine; and how far from the limit it is: the
FLOPs of the step's matrix products (as written) and the bytes that its program reads and writes
(XLA's count), against peaks measured here (`peaks`), and of_roofline, the longer of the two bounds
as a share of the median step.

--cohort=DIR takes the shapes of a cohort (mmcl prepare), and also runs the steps as `mmcl train`
does, fed by the pipeline: pipeline_step_ms against resident_step_ms, both means of the same loop
without a wait a step.

--against alternates this measurement with another command, each in a process of its own, --rounds
times, and prints the rates best against best; that command's last line must be JSON with
samples_per_s and step_ms.min.
"""

import argparse
import itertools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed
CASES = ("mae", "mae_medium", "mmcl", "dual_phase", "joint")


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--case", choices=CASES, default="mae")
  parser.add_argument("--batch", type=int, default=32)
  parser.add_argument("--steps", type=int, default=12)
  parser.add_argument("--warmup", type=int, default=2)
  parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: what jax finds")
  parser.add_argument("--cohort", help="take its shapes, and time the step fed by the pipeline too")
  parser.add_argument("--against", help="another command to alternate with")
  parser.add_argument("--rounds", type=int, default=5, help="of the alternation")
  args, overrides = parser.parse_known_args()
  if args.against:
    alternate(args, overrides)
  else:
    print(json.dumps(measure(args, overrides)))


def measure(args, overrides) -> dict:
  if args.device:
    os.environ["JAX_PLATFORMS"] = {"gpu": "cuda"}.get(args.device, args.device)
  import jax

  from mmcl_jax.tools import hlo
  from mmcl_jax.training import flops as flops_lib, parallel

  built = build(args.case, args.batch, args.warmup + args.steps, overrides, args.cohort)
  config, mesh, step, state, rows = built.config, built.mesh, built.step, built.state, built.rows
  with jax.set_mesh(mesh):
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    times = []
    for _ in range(args.warmup + args.steps):
      begun = time.perf_counter()
      state, values = jax.block_until_ready(step(state, rows))
      times.append(1e3 * (time.perf_counter() - begun))
    times, fed = times[args.warmup :], {}
    if args.cohort:
      for name, source in (
        ("resident", itertools.repeat(rows)),
        ("pipeline", (parallel.to_global(x, mesh) for x in built.batches)),
      ):
        state, ms = run_through(step, state, source, args.steps, args.warmup)
        fed[f"{name}_step_ms"] = round(ms, 2)
  memory, device = step.memory_analysis(), jax.devices()[0]
  median = statistics.median(times)
  flops, moved = (
    flops_lib.matmul_flops(built.jaxpr) / jax.device_count(),
    hlo.costs(step)["bytes_accessed"],
  )
  peak = peaks(config.model.dtype)
  bound = max(flops / peak["flops"], moved / peak["bytes"])
  return {
    "case": args.case,
    "batch": config.batch,
    "device": device.device_kind,
    "platform": device.platform,
    "devices": jax.device_count(),
    "jax": jax.__version__,
    "dtype": config.model.dtype,
    "steps": args.steps,
    "overrides": overrides,
    "loss": round(float(values["loss"]), 4),
    "step_ms": {
      "median": round(median, 2),
      "min": round(min(times), 2),
      "max": round(max(times), 2),
    },
    "samples_per_s": round(1e3 * config.batch / median, 2),
    "params_m": round(parameters / 1e6, 2),
    "compile_s": round(built.compile_s, 1),
    "matmul_gflop": round(flops / 1e9, 1),
    "moved_gb": round(moved / 1e9, 2),
    "peak_gflop_per_s": round(peak["flops"] / 1e9),
    "peak_gb_per_s": round(peak["bytes"] / 1e9, 1),
    "matmul_share_of_peak": round(flops / peak["flops"] / (median / 1e3), 3),
    "of_roofline": round(bound / (median / 1e3), 3),
    **fed,
    "temporary_mib": round(memory.temp_size_in_bytes / 2**20),
    "peak_mib": round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20) or None,
    "load": [round(x, 2) for x in os.getloadavg()],
    "cpus": len(os.sched_getaffinity(0)),
  }


def build(
  name: str, batch: int, steps: int, overrides: list[str], cohort: str | None = None
) -> types.SimpleNamespace:
  """The compiled step of a case: config, mesh, step, state, rows, batches (of the cohort), jaxpr,
  compile_s."""
  import jax

  from mmcl_jax import models, objectives as objective_lib
  from mmcl_jax.data import standardise
  from mmcl_jax.models import inputs
  from mmcl_jax.training import parallel, state as state_lib, step as step_lib

  config, shapes = case(name, batch, steps, overrides)
  mesh, standardiser, batches = (
    parallel.make_mesh(**config.mesh),
    standardise.as_they_are([], covariates=("none",)),
    None,
  )
  if cohort:
    from mmcl_jax.data import cohort as cohort_lib, pipeline

    cohort = cohort_lib.load(cohort)
    shapes, standardiser = cohort.info["shapes"], standardise.of_cohort(cohort, config.data.targets)
    batches = pipeline.train_batches(
      cohort.splits["train"],
      seed=0,
      batch=config.batch,
      fields=models.fields(config.model),
      **config.loader,
    )
  model = models.build(
    config.model, config.data.samples, len(standardiser.targets), len(standardiser.diseases)
  )
  objectives = objective_lib.build(config.objectives)
  with jax.set_mesh(mesh):
    example = inputs.example(config, shapes, len(standardiser.targets), config.batch)
    tx = state_lib.optimizer_for(model, example, config)
    state, where = state_lib.create(model, tx, example, 0, mesh, config.sharding)
    rows = parallel.to_global(next(batches) if cohort else random_rows(config, shapes), mesh)
    begun = time.perf_counter()
    traced = jax.jit(
      step_lib.make_train_step(model, objectives, tx, config, standardiser),
      donate_argnums=0,
      out_shardings=(where, None),
    ).trace(state, rows)
    step = traced.lower().compile()
  return types.SimpleNamespace(
    config=config,
    mesh=mesh,
    step=step,
    state=state,
    rows=rows,
    batches=batches,
    jaxpr=traced.jaxpr,
    compile_s=time.perf_counter() - begun,
  )


def run_through(step, state, batches, count: int, warmup: int):
  """The state after a loop like that of `mmcl train`, which reads a batch while the step before
  runs; its ms a step, mean."""
  import jax

  pending = None
  for i in range(warmup + count):
    if i == warmup:
      jax.block_until_ready(state)
      begun = time.perf_counter()
    state, values = step(state, next(batches))
    jax.device_get(pending)
    pending = values
  jax.block_until_ready(state)
  return state, 1e3 * (time.perf_counter() - begun) / count


def peaks(dtype: str) -> dict[str, float]:
  """FLOP/s of a large matrix product with float32 sums and bytes/s of a large copy (read and
  written), best of 10 each."""
  import jax
  import jax.numpy as jnp

  def seconds(function, x):
    jax.block_until_ready(function(x))
    times = []
    for _ in range(10):
      begun = time.perf_counter()
      jax.block_until_ready(function(x))
      times.append(time.perf_counter() - begun)
    return min(times)

  small = jax.default_backend() == "cpu"
  n, m = (2048, 2**26) if small else (8192, 2**30)
  x = jax.random.normal(jax.random.key(0), (n, n), dtype)
  product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
  copied = jax.random.normal(jax.random.key(1), (m,), jnp.float32 if small else jnp.bfloat16)
  return {
    "flops": 2 * n**3 / seconds(product, x),
    "bytes": 2 * copied.nbytes / seconds(jax.jit(lambda x: -x), copied),
  }


def case(name: str, batch: int, steps: int, overrides: list[str]):
  """The recipe closest to a case, with what makes its step that of the plain reference; shapes of
  the cohort's records."""
  from mmcl_jax import configuration
  from mmcl_jax.models import towers

  size, samples = ("tiny", 2500) if name in ("mae", "mmcl") else ("medium", 5000)
  recipe = (
    "mmcl.py:tiny"
    if name == "mmcl"
    else f"joint.py:{size}" + (",arm=mae" if name.startswith("mae") else "")
  )
  config, _ = configuration.from_flags(
    "step", "usage: step.py", [f"--config={ROOT}/configs/{recipe}"], {}
  )
  with config.unlocked():
    config.batch, config.steps, config.init_except = batch, steps, ()
    for kind in (config.augment.ecg, config.augment.cmr):
      for key, value in kind.items():
        if key != "fn":
          kind[key] = type(value)()  # 0.0 and False
    # The decoder's parameters are there in every case, whether or not its output is asked for.
    config.model.towers.ecg.update(
      size=size, mask_ratio=0.8 if size == "tiny" else 0.7, drop_path=0.0
    )
    for tower in towers.cmr(config.model).values():
      tower.width = 0  # the projection sits on the pooled features
    if name == "dual_phase":
      del config.objectives["reconstruction"]
    if "reconstruction" in config.objectives:
      config.objectives.reconstruction.update(region="all", ncc_weight=0.1)
    if "dual_phase" in config.objectives:
      config.objectives.dual_phase.temperature = 0.07
    config.model.projection.update(hidden={"mmcl": 512}.get(name, 768), width=128)
    if name.startswith("mae"):
      # a head that nothing trains is not in the reference
      config.model.projection.update(hidden=1, width=1)
    config.optimizer.update(
      learning_rate=1e-4, warmup=1, b1=0.9, b2=0.95, weight_decay=0.05, clip=0.0
    )
  for word in overrides:
    set_value(config, word)
  shapes = {"ecg": [12, samples], "phenotypes": [1], "diseases": [1], "covariates": [1]}
  return config, shapes | {"mmcl": {"three_frames": [3, 210, 210]}}.get(
    name, {"ed_es_volumes": [2, 6, 85, 92]}
  )


def set_value(config, word: str):
  """--config.a.b=VALUE, VALUE in Python's notation or a bare word."""
  import ast

  key, equals, text = word.removeprefix("--config.").partition("=")
  *path, last = key.split(".")
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  try:
    for part in path:
      config = config[part]
    if not equals or last not in config:
      raise KeyError(last)
    config[last] = value
  except (KeyError, TypeError, AttributeError) as error:
    raise SystemExit(
      f"{word}: {error}; expected --config.KEY=VALUE with a key of the recipes"
    ) from None


def random_rows(config, shapes) -> dict:
  """A batch as the pipeline hands it over."""
  import numpy as np

  from mmcl_jax import models

  rng, B = np.random.default_rng(0), config.batch

  def label(name):
    return np.zeros((B, *shapes[name]), np.float32)

  return {
    "ecg": rng.integers(-(2**15), 2**15, (B, *shapes["ecg"]), np.int16),
    "ecg_scale": np.full(B, 1e-4, np.float32),
    "cmr": {
      field: rng.integers(0, 256, (B, *shapes[field]), np.uint8)
      for field in models.fields(config.model)
    },
    "subject": np.stack([np.arange(B)] * 2, axis=1).astype(np.uint32),
    "index": np.arange(B, dtype=np.uint32),
    **{name: np.ones(B, np.uint8) for name in ("mask", "has_ecg", "has_cmr")},
    **{name: label(name) for name in ("phenotypes", "diseases", "covariates")},
  }


def alternate(args, overrides):
  """Ours and the other command in turn; the last line compares the best of each."""
  ours = [
    sys.executable,
    __file__,
    f"--case={args.case}",
    f"--batch={args.batch}",
    f"--steps={args.steps}",
    f"--warmup={args.warmup}",
    *([f"--device={args.device}"] if args.device else []),
    *overrides,
  ]
  ours = [
    "bash",
    "-c",
    f"source {shlex.quote(str(ROOT / 'launch/env.sh'))} && exec {shlex.join(ours)}",
  ]
  found = {"ours": [], "theirs": []}
  for i in range(args.rounds):
    for name, command in (("ours", ours), ("theirs", shlex.split(args.against))):
      found[name].append(last_line(command))
      print(f"round {i + 1}/{args.rounds}  {name:6s}  {json.dumps(found[name][-1])}", flush=True)
  rates = {name: [x["samples_per_s"] for x in runs] for name, runs in found.items()}
  best = {name: min(x["step_ms"]["min"] for x in runs) for name, runs in found.items()}
  print(
    json.dumps(
      {
        "case": args.case,
        "batch": args.batch,
        "rounds": args.rounds,
        "steps": args.steps,
        "best_step_ms": best,
        "ratio_best": round(best["theirs"] / best["ours"], 3),
        "ratio_median": round(
          statistics.median(rates["ours"]) / statistics.median(rates["theirs"]), 3
        ),
        "samples_per_s": {
          name: {"median": statistics.median(x), "min": min(x), "max": max(x)}
          for name, x in rates.items()
        },
        "params_m": {name: runs[0].get("params_m") for name, runs in found.items()},
        "load": [round(x, 2) for x in os.getloadavg()],
        "cpus": len(os.sched_getaffinity(0)),
      }
    )
  )


def last_line(command) -> dict:
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(
      f"{shlex.join(command)} ended with status {done.returncode}: {done.stderr[-2000:]}"
    )
  return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
  main()
