"""`mmcl train`: the training loop of every recipe.

    mmcl train --config=joint:demo --workdir=W --config.data.cohort=DIR

Running the same command again goes on from the last checkpoint, and ends in the same state bit for
bit as if it had never stopped (same devices; to float tolerance on others). SIGTERM, SIGHUP,
SIGUSR1 or SIGUSR2 to any host, or Ctrl-C, saves a checkpoint on all and exits with status 75
(EX_TEMPFAIL: run the command again); a second Ctrl-C ends at once. On several hosts, see
training/distributed.py and docs/multi_host.md.
"""

import contextlib
import time

import jax

from mmcl_jax import configuration, evaluators
from mmcl_jax.errors import writing
from mmcl_jax.training import (
  checkpoint,
  goodput,
  loop,
  monitor,
  parallel,
  people,
  profile,
  setup,
  signals,
)
from mmcl_jax.training.step import make_train_step

USAGE = (
  "usage: mmcl train --config=joint:demo --workdir=W --config.data.cohort=DIR [--config.x.y=V ...]"
)


def main(argv):
  config, flags = configuration.from_flags(
    "mmcl train", USAGE, argv, {"workdir": "folder of the run, made if absent"}
  )
  with signals.stops() as asked_to_stop, writing(flags.workdir):
    train(config, flags.workdir, asked_to_stop)


def train(config, workdir: str, asked_to_stop=lambda: False, clock=time.monotonic):
  """Runs or resumes a run; returns its final state.

  Where config.stop_after is set, that is the last state of training, not the best one, which is
  kept beside it.

  Args:
    asked_to_stop: read before every step; once it is true on any host, all save after the next step
      and exit with 75.
    clock: seconds, by which host 0 knows that config.every.save_minutes are over, and what the time
      went to.
  """
  spent = goodput.Goodput(clock)
  job = setup.check(config, workdir)
  with setup.hold(job), jax.set_mesh(job.mesh), contextlib.ExitStack() as at_the_end:
    begun = setup.state(job)
    state = begun.state
    data = setup.open_data(job, state.variables)
    context = setup.context(job, data)
    setup.announce(job, begun)

    train_step = loop.jit_step(
      make_train_step(job.model, job.objectives, begun.optimizer, config, job.standardiser),
      begun.shardings,
    )
    checkpoints = checkpoint.Checkpoints(workdir, config.keep, people.as_arrays(job.people))
    at_the_end.callback(checkpoints.release)  # before another run may hold the workdir
    requests = loop.Requests(asked_to_stop, clock, config.every.save_minutes)
    watch = monitor.Monitor(job, begun, checkpoints, spent)
    trace = profile.Profile(config.profile, workdir)

    # Evaluate -> save -> take the next batch -> step -> write the metrics of the step before. What
    # is saved holds the word of its own evaluation, so that a resumed run repeats none and misses
    # none.
    request = monitor.NOTHING
    spent.switch("training")
    for step in range(job.start, config.steps + 1):
      begins = step == job.start
      with spent.on("saving"):
        trace.end(step, state)
      watching = [one for one in job.evaluators if loop.is_due(job, step, one.every)]
      saving = loop.is_due(job, step, config.every.save)
      if watching or saving or request:
        request = max(request, watch.flush())
      if watching:
        watch.evaluated(step, evaluators.scores(watching, context.at(step, state)))
      over = watch.is_over(step)
      if saving or (not begins and (request or over or step == watch.best.step)):
        about = loop.meta(job, step, watch.best, watch.skipped, data.spacing)
        with spent.on("saving"):
          checkpoints.save(step, state, loop.position(config, step), about)
        requests.saved()
      if over or request == monitor.STOP:
        break
      trace.begin(step + 1)
      with spent.on("waiting_for_data", unless=watch.is_computing):
        rows = requests.add_to(next(data.batches))
        batch = parallel.to_global(rows, job.mesh)
      with spent.on("compiling" if begins else "training"), trace.step(step + 1):
        if begins:
          watch.at_peak_s = loop.seconds_at_peak(train_step, state, batch)
        state, values = train_step(state, batch)
      request = watch.flush()
      with spent.on("saving"):
        checkpoints.poll()
      watch.add(step + 1, values)
    with spent.on("saving"):
      trace.end(step, state, over=True)
      checkpoints.close()
    watch.close()
  loop.finish(job, step, over, watch.best, spent)
  return state


if __name__ == "__main__":
  from mmcl_jax import cli

  cli.run(main, hosts=True)
