"""What training does about bad data and bad numbers: how much it leaves out before it stops, and
whom a spike names.

The step itself keeps the old state where the loss or a gradient is not finite, and rows with mask 0
are out of every loss (training/steps.py). Here the loop counts both, from globally reduced numbers,
so that all hosts stop at the same step.
"""

import collections
import json
import math
import statistics
from typing import NamedTuple

import numpy as np

from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.training import checkpoint

WINDOW, ENOUGH = 50, 20  # losses that a spike is told by, and how many of them must be known
# times the usual deviation (1.48 of the median absolute one, that of a normal distribution)
SPIKE = 8.0


class Skipped(NamedTuple):
  """What has been left out so far; kept in every checkpoint, so that a resumed run counts on."""

  rows: int = 0  # since the start, whatever the epoch
  steps: int = 0  # in a row, up to now


def judged(
  skipped: Skipped,
  step: int,
  values: dict[str, float],
  worst: np.ndarray,
  config,
  objectives,
  workdir: str,
) -> Skipped:
  """Counts what `step` left out.

  Args:
    values: metrics of the step, with `finite` and `rows_left_out`.
    worst: subjects of the rows that are not finite or add most to the loss, uint32 [N, 2].

  Raises:
    UserError: it is more than config.bad_rows or config.bad_steps allow; nothing is saved after it.
  """
  rows = skipped.rows + round(values["rows_left_out"])
  steps = 0 if values["finite"] else skipped.steps + 1
  if rows > config.bad_rows:
    raise UserError(
      f"step {step}: {rows} rows were left out so far, and config.bad_rows is {config.bad_rows}; the lines above "
      "(of every host) name the records; copy the cohort's files again, prepare it again, or go on without these by "
      f"--config.bad_rows=N; {last_good(workdir)}"
    )
  if steps > config.bad_steps:
    before = f", as the {steps - 1} before" if steps > 1 else ""
    raise UserError(
      f"step {step}: {not_finite(values, objectives)}{before} (loss {json.dumps(values['loss'])}; subjects with the "
      f"largest share {names(worst)}); {last_good(workdir)}; lower the learning rate, look for broken recordings, or "
      "skip such steps by --config.bad_steps=N"
    )
  return Skipped(rows, steps)


def skipped_step(
  step: int, skipped: Skipped, values: dict[str, float], worst: np.ndarray, config, objectives
) -> str:
  """A line on a step that changed nothing."""
  return (
    f"step {step} skipped, {skipped.steps} in a row of {config.bad_steps} allowed: {not_finite(values, objectives)}; subjects "
    f"with the largest share: {names(worst)}"
  )


def not_finite(values: dict[str, float], objectives) -> str:
  guilty = [o.name for o in objectives if not math.isfinite(values[f"{o.name}/loss"])]
  return f"objective {', '.join(guilty)} is not finite" if guilty else "the gradient is not finite"


def last_good(workdir: str) -> str:
  last = checkpoint.latest(workdir)
  return f"the last good checkpoint is {f'{workdir}/checkpoints/{last}' if last else 'none, nothing was saved yet'}"


class Spikes:
  """Tells losses that stand out from the WINDOW before them. It begins anew where a run resumes:
  only what is told hangs on it."""

  def __init__(self):
    self.losses = collections.deque(maxlen=WINDOW)

  def tell(self, step: int, loss: float, worst: np.ndarray) -> str | None:
    """A line about a spike, which names the subjects `worst`, uint32 [N, 2] (hashes, as in
    reports), or None."""
    if not math.isfinite(loss):  # told as a step that is skipped
      return None
    usual = sorted(self.losses)
    self.losses.append(loss)
    if len(usual) < ENOUGH:
      return None
    median = statistics.median(usual)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in usual)
    if loss - median <= SPIKE * max(deviation, 1e-6 * abs(median)):
      return None
    return (
      f"step {step}: the loss {loss:.4g} stands out from the {len(usual)} before (median {median:.4g}, deviation "
      f"{deviation:.2g}); subjects with the largest share: {names(worst)}"
    )


def names(subjects: np.ndarray) -> str:
  """Hashes of subjects, uint32 [N, 2], as the reports of `mmcl prepare` write them."""
  return ", ".join(dict.fromkeys(map(schema.hash_name, subjects)))
