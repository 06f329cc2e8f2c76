"""What the loop keeps account of: metrics of the steps behind it, what they left out, losses that
stand out, and the best evaluation.

The step itself keeps the old state where the loss or a gradient is not finite, and rows with mask 0
are out of every loss (training/step.py). Here both are counted, from globally reduced numbers, so
that all hosts stop at the same step.
"""

import collections
import json
import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from mmcl_jax.data import schema
from mmcl_jax.errors import UserError
from mmcl_jax.training import checkpoint, distributed, metrics, step as step_lib

# what a host may ask of all; of several requests the largest counts
NOTHING, SAVE, STOP = 0, 1, 2
# losses that a spike stands out from: how many at most, and at least
WINDOW, ENOUGH = 50, 20
# times the usual deviation (1.48 of the median absolute one, that of a normal distribution)
SPIKE = 8.0


class Skipped(NamedTuple):
  """What has been left out so far; kept in every checkpoint, so that a resumed run counts on."""

  rows: int = 0  # since the start, whatever the epoch
  steps: int = 0  # in a row, up to now


class Best(NamedTuple):
  """Step and loss of the best evaluation so far, None where no loss was finite, and the evaluations
  in a row since. A score to stop on is a loss: lower is better."""

  step: int | None = None
  loss: float | None = None
  since: int = 0


class Monitor:
  """Follows a run: fetches the metrics of a step one step late, so that fetching never stalls the
  device; counts, writes and prints.

  Args:
    job: the run (setup.Job).
    begun: where it begins or resumes (setup.Start).
    spent: what the time goes to (goodput.Goodput).
  """

  def __init__(self, job, begun, checkpoints, spent):
    config = job.config
    self.config, self.workdir, self.objectives = config, job.workdir, job.objectives
    self.checkpoints, self.spent = checkpoints, spent
    self.best, self.skipped = begun.best, begun.skipped
    self.first_process = jax.process_index() == 0
    self.writer = metrics.create_writer(
      config.writers, job.workdir, job.start, just_logging=not self.first_process
    )
    self.spikes = Spikes()
    self.progress = metrics.Progress(job.start, config.steps, config.batch)
    self.pending = None  # (step, metrics) on the device
    # a step's products at the devices' published peak, where that is known (loop.seconds_at_peak)
    self.at_peak_s = None
    # step and seconds of steps when utilisation was last computed
    self.looked = job.start, 0.0

  def add(self, step: int, values) -> None:
    """The metrics of `step`, which may not be computed yet."""
    self.pending = step, values

  def is_computing(self) -> bool:
    """Whether the devices are still busy with a step that was added."""
    return self.pending is not None and not self.pending[1].words.is_ready()

  def flush(self) -> int:
    """Fetches the metrics that are pending; returns what a host had asked for by then.

    Raises:
      UserError: more was left out than the config allows; nothing is saved after it.
    """
    if self.pending is None:
      return NOTHING
    (step, values), self.pending = self.pending, None
    values, subjects = step_lib.unpack(values)
    request = int(values.pop("request"))
    self.count_skipped(step, values, subjects)
    message = self.spikes.message(step, values["loss"], subjects)
    if not values.pop("finite"):
      message = skipped_message(step, self.skipped, values, subjects, self.config, self.objectives)
    if message and self.first_process:
      print(message, flush=True)
    if step % self.config.every.log == 0 or step == self.config.steps:
      self.write(step, values)
    return request

  def count_skipped(self, step: int, values: dict[str, float], subjects: np.ndarray) -> None:
    if not values["finite"] or values["rows_left_out"]:
      self.checkpoints.finish()  # what is said about the last good one must be true,
      distributed.barrier()  # and host 0 has signed it before another host ends all
    try:
      self.skipped = update_skipped(
        self.skipped, step, values, subjects, self.config, self.objectives, self.workdir
      )
    except UserError:
      self.checkpoints.close()
      raise

  def write(self, step: int, values: dict[str, float]) -> None:
    self.writer.write_scalars(step, values)
    if self.first_process:
      shown = {"loss": values["loss"]}
      for objective in self.objectives:
        shown[objective.name] = values[f"{objective.name}/loss"]
      self.progress.report(step, shown, self.utilisation(step))

  def utilisation(self, step: int) -> str:
    """Such as `MFU 38.2%`, since it was last asked for: products at peak, as a share of the time
    that steps took. "" where no peak is known.

    Model FLOP/s utilisation; hardware FLOP/s utilisation, HFU, where products are computed again
    for the backward pass and count again (Chowdhery et al. 2022).
    """
    (earlier, before), self.looked = self.looked, (step, self.spent.stepping())
    if self.at_peak_s is None:
      return ""
    share = (step - earlier) * self.at_peak_s / max(self.looked[1] - before, 1e-9)
    again = self.config.model.remat != "none" or self.config.accumulation > 1
    return f"{'HFU' if again else 'MFU'} {share:.1%}"

  def evaluated(self, step: int, scores_of_each: Iterable[dict[str, float]]) -> None:
    """Writes and prints what each evaluator finds, as it is found, and keeps the best step."""
    scores = {}
    with self.spent.on("evaluating"):
      for of_evaluator in scores_of_each:
        self.writer.write_scalars(step, of_evaluator)
        if self.first_process:
          shown = "  ".join(f"{name} {value:.3f}" for name, value in of_evaluator.items())
          print(f"validation {step}/{self.config.steps}  {shown}", flush=True)
        scores |= of_evaluator
    if self.config.stop_after and self.config.stop_on in scores:
      # by the first host's number: hosts that differed by a rounding would part for good
      mine = np.float32([scores[self.config.stop_on]])
      first, *_ = distributed.gather(mine)
      self.best = update_best(self.best, step, float(first[0]))

  def is_over(self, step: int) -> bool:
    """Whether training ends with `step`: it is the last, or nothing was gained for long enough.

    Raises:
      UserError: it ends, should keep its best step, and no evaluation was finite.
    """
    over = step == self.config.steps or stops(self.best, self.config.stop_after)
    if over and self.config.stop_after and self.best.step is None:
      self.checkpoints.close()
      raise UserError(
        f"{self.config.stop_on} was not finite at any evaluation up to step {step}, so no step is "
        f"the best; does the val split of {self.config.data.cohort} know what it is a loss of? "
        "--config.stop_after=0 trains without it"
      )
    return over

  def close(self) -> None:
    self.writer.close()


# -- Bad rows and steps --


def update_skipped(
  skipped: Skipped,
  step: int,
  values: dict[str, float],
  subjects: np.ndarray,
  config,
  objectives,
  workdir: str,
) -> Skipped:
  """Counts what `step` left out.

  Args:
    values: metrics of the step, with `finite` and `rows_left_out`.
    subjects: subjects of the rows that are not finite or add most to the loss, uint32 [N, 2].

  Raises:
    UserError: it is more than config.bad_rows or config.bad_steps allow; nothing is saved after it.
  """
  rows = skipped.rows + round(values["rows_left_out"])
  steps = 0 if values["finite"] else skipped.steps + 1
  if rows > config.bad_rows:
    raise UserError(
      f"step {step}: {rows} rows were left out so far, and config.bad_rows is {config.bad_rows}; "
      "the lines above (of every host) name the records; copy the cohort's files again, prepare it "
      "again, or go on without these by "
      f"--config.bad_rows=N; {last_good(workdir)}"
    )
  if steps > config.bad_steps:
    before = f", as the {steps - 1} before" if steps > 1 else ""
    raise UserError(
      f"step {step}: {not_finite(values, objectives)}{before} (loss {json.dumps(values['loss'])}; "
      f"subjects with the largest share {names(subjects)}); {last_good(workdir)}; lower the "
      "learning rate, look for broken recordings, or skip such steps by --config.bad_steps=N"
    )
  return Skipped(rows, steps)


def skipped_message(
  step: int,
  skipped: Skipped,
  values: dict[str, float],
  subjects: np.ndarray,
  config,
  objectives,
) -> str:
  """A line on a step that changed nothing."""
  return (
    f"step {step} skipped, {skipped.steps} in a row of {config.bad_steps} allowed: "
    f"{not_finite(values, objectives)}; subjects with the largest share: {names(subjects)}"
  )


def not_finite(values: dict[str, float], objectives) -> str:
  """What of a step is not finite: some objectives, else the gradient."""
  names = [objective.name for objective in objectives]
  guilty = [name for name in names if not math.isfinite(values[f"{name}/loss"])]
  if guilty:
    return f"objective {', '.join(guilty)} is not finite"
  return "the gradient is not finite"


def last_good(workdir: str) -> str:
  last = checkpoint.latest(workdir)
  where = f"{workdir}/checkpoints/{last}" if last else "none, nothing was saved yet"
  return f"the last good checkpoint is {where}"


# -- Spikes --


class Spikes:
  """Finds losses that stand out from the WINDOW before them. It begins anew where a run resumes:
  only messages depend on it."""

  def __init__(self):
    self.losses = collections.deque(maxlen=WINDOW)

  def message(self, step: int, loss: float, subjects: np.ndarray) -> str | None:
    """A line about a spike, which names the `subjects`, uint32 [N, 2] (hashes, as in reports), or
    None."""
    if not math.isfinite(loss):  # reported as a step that is skipped
      return None
    usual = sorted(self.losses)
    self.losses.append(loss)
    if len(usual) < ENOUGH:
      return None
    median = statistics.median(usual)
    distances = [abs(x - median) for x in usual]
    deviation = 1.4826 * statistics.median(distances)
    if loss - median <= SPIKE * max(deviation, 1e-6 * abs(median)):
      return None
    return (
      f"step {step}: the loss {loss:.4g} stands out from the {len(usual)} before (median "
      f"{median:.4g}, deviation {deviation:.2g}); subjects with the largest share: "
      f"{names(subjects)}"
    )


def names(subjects: np.ndarray) -> str:
  """Hashes of subjects, uint32 [N, 2], as the reports of `mmcl prepare` write them."""
  return ", ".join(dict.fromkeys(map(schema.hash_name, subjects)))


# -- Early stopping --


def check_stopping(config) -> None:
  """Is there such a score as config.stop_on?"""
  scores = [f"validation/{name}" for name in sorted(config.objectives)]
  if config.stop_after and config.stop_on not in scores:
    raise UserError(
      f"config.stop_on is {config.stop_on!r}; expected a loss on validation, of which lower is "
      f"better: {', '.join(scores)}"
    )
  watching = []
  for entry in config.evaluators.values():
    if entry.get("every", -1) != 0:
      watching.append(str(entry.get("fn")))
  if config.stop_after and "losses" not in watching:
    raise UserError(
      f"config.stop_on is {config.stop_on}, which the evaluator 'losses' computes while training; "
      f"config.evaluators has {', '.join(watching) or 'nothing'} with an `every` that is not 0"
    )


def update_best(best: Best, step: int, loss: float) -> Best:
  """The best after one more evaluation. Equal is no better, and neither is what is not finite."""
  better = math.isfinite(loss) and (best.loss is None or loss < best.loss)
  return Best(step, loss) if better else best._replace(since=best.since + 1)


def stops(best: Best, patience: int) -> bool:
  """Has nothing been gained for `patience` evaluations? 0: never."""
  return 0 < patience <= best.since
