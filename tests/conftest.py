"""A tiny cohort and a tiny config for all tests; devices are simulated only in processes of their
own."""

import atexit
import importlib.util
import os
import pathlib
import shutil
import signal
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
ROOT = pathlib.Path(__file__).resolve().parents[1]

import pytest
from ml_collections import config_flags  # noqa: F401  (registers its flag types once)

from mmcl_jax import prepare
from mmcl_jax.support import processes

# Under nohup some are ignored, and would be by the programs that tests start and signal.
for signum in processes.SIGNALS:
  if signal.getsignal(signum) is signal.SIG_IGN:
    signal.signal(signum, lambda *_: None)


SUBJECTS, SHARES = 64, (0.5, 0.2, 0.3)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
  """SUBJECTS synthetic subjects: enough in test for scores, enough in train for batches of 16."""
  out = tmp_path_factory.mktemp("data") / "cohort"
  return prepare.prepare_synthetic(
    str(out), SUBJECTS, seed=7, shares=SHARES, profile="minimal", processes=2
  )


@pytest.fixture
def config(cohort):
  return tiny_config(cohort.path)


def tiny_config(cohort_path):
  """The joint recipe at its smallest: 60 tokens an ECG, batches of 8, 6 steps."""
  from mmcl_jax import configuration

  c = configuration.recipe(str(ROOT / "configs/joint.py"), "test")
  c.data.cohort, c.data.samples = cohort_path, 500
  c.every.log, c.every.save, c.every.evaluate = 1, 3, 6
  c.evaluators = ("losses",)
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
    "--config.evaluators=('losses',)",
  ]


def alive(process: int) -> bool:
  """Whether a process runs; one that has ended and that nobody asks for stays in /proc as a
  zombie."""
  try:
    return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):  # it ends while it is read
    return False


def tiny_step(cohort_path):
  """What one training step of 16 rows is made of: config, cohort, scales, model, objectives,
  batch."""
  from mmcl_jax import objectives, train
  from mmcl_jax.data import cohort as cohort_room, pipeline
  from mmcl_jax.models import pretrainer

  config, cohort = tiny_config(cohort_path), cohort_room.load(cohort_path)
  config.batch = 16
  batch = next(
    pipeline.train_batches(cohort.splits["train"], seed=0, batch=16, fields=("ed_es_volumes",))
  )
  return (
    config,
    cohort,
    train.targets(cohort, config),
    pretrainer.build(config.model, config.data.samples),
    objectives.build(config.objectives),
    batch,
  )


def pytest_runtest_makereport(item, call):
  """Leaves the faults that a test guards against beside its outcome, for the table at the end."""
  for marker in item.iter_markers("reported") if call.when == "call" or call.excinfo else ():
    outcome = (
      "right"
      if call.excinfo is None
      else "skipped"
      if call.excinfo.errisinstance(pytest.skip.Exception)
      else "WRONG"
    )
    item.user_properties += [("reported", f"{fault} | {outcome}") for fault in marker.args]


def pytest_terminal_summary(terminalreporter, config):
  """Lists the reported faults with `-m reported`, and says what was not compared with PyTorch,
  which is no dependency."""
  if config.option.markexpr == "reported":
    for report in (
      terminalreporter.getreports("passed")
      + terminalreporter.getreports("failed")
      + terminalreporter.getreports("skipped")
    ):
      if report.when == "call" or report.outcome != "passed":
        for name, text in report.user_properties:
          if name == "reported":
            terminalreporter.write_line(f"| {text} | {report.nodeid} |")
  if not importlib.util.find_spec("torch"):
    terminalreporter.write_line(
      "the tests of parity with PyTorch were skipped; to run them: .venv/bin/pip install "
      "torch==2.13.0, then this command again"
    )


def simulated(devices: int, flags: str = FAST) -> dict[str, str]:
  """The environment of a process with that many simulated devices; launch/env.sh tells what NPROC
  is for."""
  return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"} | (
    {"NPROC": "16"} if devices > 1 else {}
  )


def python(code, *args, devices=1, timeout=1200, flags=FAST):
  """Runs code in a process of its own with that many simulated devices; returns its stdout, fails
  with its stderr."""
  env = (
    os.environ
    | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT / "configs")])}
    | simulated(devices, flags)
  )
  done = subprocess.run(
    [sys.executable, "-c", code, *map(str, args)],
    capture_output=True,
    text=True,
    env=env,
    timeout=timeout,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout
