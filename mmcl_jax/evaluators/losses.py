"""The objectives of the run on the validation split, while training."""

import jax

from mmcl_jax import models, objectives
from mmcl_jax.data import pipeline
from mmcl_jax.evaluators.base import Result
from mmcl_jax.evaluators.context import Context
from mmcl_jax.training import parallel, step as step_lib


def losses(context: Context) -> Result:
  """`validation/OBJECTIVE`: mean loss over validation, with the padding of the last batch left out.

  A contrastive loss depends on the batch: compare it only between runs of one batch size. In `mmcl
  evaluate`, whose batch is not that of training, there is none.
  """
  if context.split != "val":
    return Result()
  run = context.run
  config = context.run.config

  def make():
    losses = objectives.build(config.objectives)
    return jax.jit(step_lib.make_loss_step(run.model, losses, config, run.standardiser))

  step = context.once_a_run("losses", make)
  total = {}
  for rows in pipeline.one_pass(
    context.records["val"],
    batch=context.batch,
    fields=models.fields(config.model, only=models.learning(config.model)),
    host=jax.process_index(),
    hosts=jax.process_count(),
    threads=config.loader.threads,
  ):
    for name, average in step(run.state, parallel.to_global(rows, run.mesh)).items():
      total[name] = total[name].merge(average) if name in total else average
  return Result({name: float(average.compute()) for name, average in total.items()})
