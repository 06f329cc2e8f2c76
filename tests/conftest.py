"""The tiny cohort, and what is said at the end."""

import importlib.util
import signal

import common  # sets what JAX reads when it starts, so before anything that imports JAX
import pytest
from ml_collections import config_flags  # noqa: F401  (registers its flag types once)

from mmcl_jax import prepare
from mmcl_jax.support import processes

# Under nohup some are ignored, and would be by the programs that tests start and signal.
for signum in processes.SIGNALS:
  if signal.getsignal(signum) is signal.SIG_IGN:
    signal.signal(signum, lambda *_: None)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
  """SUBJECTS synthetic subjects: enough in test for scores, enough in train for batches of 16."""
  out = tmp_path_factory.mktemp("data") / "cohort"
  return prepare.prepare_synthetic(
    str(out), common.SUBJECTS, seed=7, shares=common.SHARES, profile="minimal", processes=2
  )


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
