"""Quick probes of phenotypes on the validation split, for watching a run."""

import jax
import numpy as np

from mmcl_jax import models
from mmcl_jax.evaluators import embeddings, ridge, statistics
from mmcl_jax.evaluators.base import Result
from mmcl_jax.evaluators.context import Context
from mmcl_jax.models import inference


def probes(context: Context) -> Result:
  """`validation/r2/NAME`: ridge probes fitted on one half of validation and scored on the other.

  Rough (strength is chosen on the half that is scored) and cheap: for watching a run, not for a
  paper. In `mmcl evaluate` `phenotypes` takes its place.
  """
  if context.split != "val":
    return Result()
  run = context.run
  config = context.run.config
  names = list(context.cohort.info["phenotypes"])
  if not names:
    context.say(
      f"validation/r2 is not measured: the cohort {context.cohort.path} has no phenotypes"
    )
    return Result()

  def make():
    return jax.jit(inference.make_embed(run.model, config, run.standardiser))

  fields = ()
  if context.reads == "CMR":
    fields = models.fields(config.model, only=models.learning(config.model))
  features = embeddings.collect(
    context.once_a_run("probes", make),
    run.state.variables,
    context.records["val"],
    mesh=run.mesh,
    batch=context.batch,
    needs=f"has_{context.reads.lower()}",
    fields=fields,
    threads=config.loader.threads,
  )
  x = features["embedding"].astype(np.float64)
  y = features["phenotypes"]
  half = features["subject"][:, 0] % 2 == 0  # by subject: visits of one person stay on one side
  probe = ridge.fit_probe(x[half], y[half], x[~half], y[~half])
  scores = statistics.r2(y[~half], ridge.predict(probe, x[~half]))
  return Result({"r2": {name: float(score) for name, score in zip(names, scores)}})
