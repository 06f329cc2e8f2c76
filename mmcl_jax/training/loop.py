"""The parts of the training loop that are not the step: requests of hosts, the peak that it is held
against, what a checkpoint says, the last lines."""

import json
import os

import jax
import numpy as np

from mmcl_jax import configuration
from mmcl_jax.training import chips, distributed, flops, goodput, restore, step as step_lib
from mmcl_jax.training.monitor import NOTHING, SAVE, STOP


class Requests:
  """What this host asks of all: to save, because that is overdue, or to save and stop.

  A request travels with the batch and comes back with the metrics of its step (`jit_step`), so that
  all hosts learn of it at the same step.

  Args:
    asked_to_stop: () -> bool, such as of `signals.stops`.
    clock: () -> seconds; host 0 keeps the time of all.
    save_minutes: without a save, after which one is asked for; 0: never.
  """

  def __init__(self, asked_to_stop, clock, save_minutes: float):
    self.asked_to_stop, self.clock = asked_to_stop, clock
    self.seconds = 60 * save_minutes
    self.last_save = clock()

  def saved(self) -> None:
    self.last_save = self.clock()

  def now(self) -> int:
    if self.asked_to_stop():
      return STOP
    keeps_time = distributed.this_host.index == 0 and self.seconds > 0
    return SAVE if keeps_time and self.clock() - self.last_save >= self.seconds else NOTHING

  def add_to(self, rows: dict) -> dict:
    """This host's rows with its request in `request` [B]."""
    return rows | {"request": np.full(len(rows["mask"]), self.now(), np.float32)}


def jit_step(train_step, shardings):
  """`train_step` jitted, which gives its state's memory to the new one; the largest request of the
  hosts is among its metrics."""

  def step(state, batch):
    request = batch.pop("request").max()
    state, values = train_step(state, batch)
    return state, step_lib.pack(values | {"request": request})

  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def seconds_at_peak(train_step, state, batch) -> float | None:
  """What a step would take if all devices did its matrix products (flops.matmul_flops) at their
  published peak; None, and a line that says so, where none is known of them."""
  kind = jax.devices()[0].device_kind
  chip = chips.of_kind(kind)
  if chip is None:
    if jax.process_index() == 0:
      print(f"no peak is known of the device {kind!r}, so the log has no MFU", flush=True)
    return None
  count = flops.matmul_flops(train_step.trace(state, batch).jaxpr)
  return count / (jax.device_count() * chip.flops)


def is_due(job, step: int, every: int) -> bool:
  """Whether something is done every so many steps at this one; always at the last, never where a
  run begins or resumes."""
  return step > job.start and (step % every == 0 or step == job.config.steps)


def position(config, step: int) -> dict:
  """Where in the stream of data a checkpoint stands."""
  return {"next_step": step, "batch": config.batch, "seed": config.seed}


def meta(job, step: int, best, skipped, spacing: dict) -> dict:
  """What the manifest of a checkpoint says of a run."""
  return restore.meta(
    step,
    job.cohort.fingerprint,
    job.cohort.info["shapes"],
    job.standardiser,
    config=json.loads(job.config.to_json()),
    best=best._asdict(),
    skipped=skipped._asdict(),
    mixed=[other.fingerprint for other, _ in job.others],
    cohort_path=os.path.abspath(job.cohort.path),
    stages=job.stages,
    **spacing,
  )


def finish(job, step: int, over: bool, best, spent: goodput.Goodput) -> None:
  """The last lines of a run, which has saved `step`; SystemExit 75 where it was asked to stop."""
  workdir, config = job.workdir, job.config
  saved = f"{workdir}/checkpoints/{step}"
  if jax.process_index() == 0:
    if step > job.start:
      print(goodput.describe(spent.shares(), sum(spent.seconds.values())))
      spent.write(workdir, job.start, step)
    if not over:
      print(f"asked to stop: saved {saved}; the same command goes on from there", flush=True)
    else:
      early = ""
      if step < config.steps:
        early = f" (of {config.steps}: no better {config.stop_on} in {best.since} evaluations)"
      print(f"trained to step {step}{early}: {saved}")
      if best.step is not None:
        print(
          f"the best {config.stop_on} was {best.loss:.4f} at step {best.step}: "
          f"{workdir}/checkpoints/{best.step}"
        )
      print(configuration.longer(config, workdir))
  if not over:
    raise SystemExit(os.EX_TEMPFAIL)
