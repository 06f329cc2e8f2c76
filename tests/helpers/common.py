"""What tests share: the tiny config and cohort's size, and processes of their own, in which alone
devices are simulated."""

import atexit
import functools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compile time is the test time: programs are compiled fast rather than well, and runs of one
# program share it, across processes too. Set once, by the first: pytest's workers (-n) inherit it,
# and so does what tests start.
FAST, CACHE = "--xla_backend_optimization_level=0", "mmcl_test_cache_"
if CACHE not in os.environ.get("JAX_COMPILATION_CACHE_DIR", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}"
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix=CACHE)
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
ROOT = pathlib.Path(__file__).resolve().parents[2]
# What a process that a test starts can import: this checkout, the recipes, and all of the tests.
FOLDERS = (".", "configs", "tests/helpers", "tests/unit", "tests/jax", "tests/process")
PATH = os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)
SUBJECTS, SHARES = 64, (0.5, 0.2, 0.3)


def tiny_config(cohort_path):
  """The joint recipe at its smallest: 60 tokens an ECG, batches of 8, 6 steps."""
  from mmcl_jax import configuration

  c = configuration.recipe(str(ROOT / "configs/joint.py"), "test")
  c.data.cohort, c.data.samples = cohort_path, 500
  c.every.log, c.every.save, c.every.evaluate = 1, 3, 6
  c.evaluators.probes.every = 0
  return c


def ecg_config(cohort_path):
  """The same with the ECG tower alone, which compiles in a third of the time."""
  c = tiny_config(cohort_path)
  del c.model.towers.ed, c.model.towers.es, c.objectives.dual_phase
  return c


def tiny_flags(cohort_path, workdir):
  """The same as command-line flags of `mmcl train`."""
  return [
    f"--config={ROOT}/configs/joint.py:test",
    f"--workdir={workdir}",
    f"--config.data.cohort={cohort_path}",
    "--config.data.samples=500",
    "--config.every.log=1",
    "--config.every.save=3",
    "--config.every.evaluate=6",
    "--config.evaluators.probes.every=0",
  ]


def tiny_step(cohort_path):
  """What one training step of 16 rows is made of: config, cohort, standardiser, model, objectives,
  batch."""
  from mmcl_jax import models, objectives
  from mmcl_jax.data import cohort as cohort_lib, pipeline, standardise

  config, cohort = tiny_config(cohort_path), cohort_lib.load(cohort_path)
  config.batch = 16
  batch = next(
    pipeline.train_batches(cohort.splits["train"], seed=0, batch=16, fields=("ed_es_volumes",))
  )
  return (
    config,
    cohort,
    standardise.of_cohort(cohort, config.data.targets),
    models.build(config.model, config.data.samples),
    objectives.build(config.objectives),
    batch,
  )


def only_evaluators(patch, *names):
  """Until `patch` is undone, `mmcl evaluate` runs none but the evaluators `names` of a run: for
  tests that look at nothing else, because all of them take a minute."""
  from mmcl_jax import evaluators

  build = evaluators.build

  def chosen(config):
    return [evaluator for evaluator in build(config) if evaluator.name in names]

  patch.setattr(evaluators, "build", chosen)


def init(model, *args, **options):
  """model.init(*args, **options), compiled as a whole: one operation at a time takes much longer."""
  import jax

  return jax.jit(functools.partial(model.init, **options))(*args)


def alive(process: int) -> bool:
  """Whether a process runs; one that has ended and that nobody asks for stays in /proc as a
  zombie."""
  try:
    return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):  # it ends while it is read
    return False


def simulated(devices: int, flags: str = FAST) -> dict[str, str]:
  """The environment of a process with that many simulated devices; launch/env.sh tells what NPROC
  is for."""
  return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"} | (
    {"NPROC": "16"} if devices > 1 else {}
  )


def python(code, *args, devices=1, timeout=1200, flags=FAST):
  """Runs code in a process of its own with that many simulated devices; returns its stdout, fails
  with its stderr."""
  env = os.environ | {"PYTHONPATH": PATH} | simulated(devices, flags)
  done = subprocess.run(
    [sys.executable, "-c", code, *map(str, args)],
    capture_output=True,
    text=True,
    env=env,
    timeout=timeout,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout
