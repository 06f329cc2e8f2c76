"""The tiny cohort, and what is said at the end."""

import fcntl
import importlib.util
import os
import pickle
import shutil
import signal
import types

import common  # sets what JAX reads when it starts, so before anything that imports JAX
import jax
import numpy as np
import pytest
from ml_collections import config_flags  # noqa: F401  (registers its flag types once)

from mmcl_jax import prepare
from mmcl_jax.data import cohort as cohort_lib
from mmcl_jax.support import processes

# XLA reads its flags once a process: before a test that changes them, for all that come after it.
jax.devices()

# Under nohup some are ignored, and would be by the programs that tests start and signal.
for signum in processes.SIGNALS:
  if signal.getsignal(signum) is signal.SIG_IGN:
    signal.signal(signum, lambda *_: None)


@pytest.fixture(scope="session")
def once(tmp_path_factory):
  """once(name, make): the folder of that name, made by make(folder) and shared by pytest's workers:
  the first that asks makes it, and the others wait. Nobody changes what lies in it."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder of its own below the common one
    base = base.parent

  def made(name, make):
    folder, done = base / "shared" / name, base / "shared" / f"{name}.done"
    done.parent.mkdir(exist_ok=True)
    with open(done.with_suffix(".lock"), "w") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      try:
        if not done.exists():
          shutil.rmtree(folder, ignore_errors=True)
          make(folder)
          done.touch()
      finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # also where a forked process holds the file open
    return folder

  return made


@pytest.fixture(scope="session")
def cohort(once):
  """SUBJECTS synthetic subjects: enough in test for scores, enough in train for batches of 16."""

  def make(folder):
    prepare.prepare_synthetic(
      str(folder), common.SUBJECTS, seed=7, shares=common.SHARES, profile="minimal", processes=2
    )

  return cohort_lib.load(str(once("cohort", make)))


@pytest.fixture(scope="session")
def trained(cohort, once):
  """A workdir with checkpoints at steps 3 and 6, trained without a break, and its final state as
  training returned it. Whoever changes it takes a copy."""
  from mmcl_jax import train

  def make(folder):
    folder.mkdir()
    state = train.train(common.tiny_config(cohort.path), str(folder / "w"))
    (folder / "state.pickle").write_bytes(pickle.dumps(jax.device_get(state)))

  folder = once("trained", make)
  return folder / "w", pickle.loads((folder / "state.pickle").read_bytes())


@pytest.fixture(scope="session")
def evaluated(trained, once):
  """A copy of that workdir, evaluated at step 6."""
  from mmcl_jax import evaluate

  def make(folder):
    shutil.copytree(trained[0], folder)
    evaluate.main([f"--workdir={folder}"])

  return once("evaluated", make)


@pytest.fixture(scope="session")
def ecg_only(tmp_path_factory):
  """A cohort of 24 ECG without CMR, phenotypes or covariates that are known."""
  from mmcl_jax.data import builder
  from mmcl_jax.data.sources import synthetic as synthetic_source

  source = synthetic_source.plan(types.SimpleNamespace(subjects=24, seed=8))

  def read(item):
    record, _ = source.read(item)
    kept = {name: record[name] for name in ("ecg", "has_ecg", "diseases", "covariates")}
    return kept | {"has_cmr": np.False_, "phenotypes": np.zeros(0, np.float32)}, ()

  plan = source._replace(read=read, info=source.info | {"phenotypes": {}})
  out = tmp_path_factory.mktemp("ecg_only") / "c"
  return builder.build(str(out), plan, shares=(1, 0, 0), profile="minimal", processes=1)


@pytest.fixture
def config(cohort):
  return common.tiny_config(cohort.path)


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
