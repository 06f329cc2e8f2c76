"""Evaluators that run while training, on the validation split only.

Each is built once and then is `run(state) -> iterator of (name, value)`.
"""

from collections.abc import Callable

import jax
import numpy as np

from mmcl_jax.data import pipeline
from mmcl_jax.errors import UserError
from mmcl_jax.evaluators import embeddings, phenotypes, statistics
from mmcl_jax.models import pretrainer
from mmcl_jax.training import parallel, steps


def build(config, model, objectives, cohort, source, scales, mesh) -> list[Callable]:
  """The evaluators that `config.evaluators` names; `source` are the records of the validation
  split."""
  return [
    EVALUATORS[name](config, model, objectives, cohort, source, scales, mesh)
    for name in config.evaluators
  ]


def check(config) -> None:
  if unknown := [name for name in config.evaluators if name not in EVALUATORS]:
    raise UserError(
      f"config.evaluators has {', '.join(unknown)}; expected some of {', '.join(EVALUATORS)}"
    )
  if "phenotypes" in config.evaluators and not config.model.towers:
    raise UserError(
      "config.evaluators has phenotypes, and this model has no embedding to probe; set evaluators=('losses',)"
    )


def losses(config, model, objectives, cohort, source, scales, mesh):
  """`validation/OBJECTIVE`: mean loss over validation, with the padding of the last batch left out.

  A contrastive loss depends on the batch: compare it only between runs of one batch size.
  """
  step = jax.jit(steps.make_loss_step(model, objectives, config, scales))

  def run(state):
    total = None
    for rows in pipeline.one_pass(
      source,
      batch=config.batch,
      fields=pretrainer.fields(config.model, only=pretrainer.learning(config.model)),
      host=jax.process_index(),
      hosts=jax.process_count(),
      threads=config.loader.threads,
    ):
      found = step(state, parallel.to_global(rows, mesh))
      total = found if total is None else {name: total[name].merge(x) for name, x in found.items()}
    for name, average in total.items():
      yield f"validation/{name}", float(average.compute())

  return run


def phenotype_probes(config, model, objectives, cohort, source, scales, mesh):
  """`validation/r2/NAME`: ridge probes fitted on one half of validation and scored on the other.

  Rough (strength is chosen on the half that is scored) and cheap: for watching a run, not for a
  paper.
  """
  embed = jax.jit(steps.make_embed(model, config, scales))
  names = list(cohort.info["phenotypes"])
  reads_ecg = "ecg" in config.model.towers
  if not names:
    if jax.process_index() == 0:
      print(
        f"no validation/r2 will be told: the cohort {cohort.path} has no phenotypes", flush=True
      )
    return lambda state: iter(())

  def run(state):
    found = embeddings.collect(
      embed,
      state.variables,
      source,
      mesh=mesh,
      batch=config.batch,
      needs="has_ecg" if reads_ecg else "has_cmr",
      fields=()
      if reads_ecg
      else pretrainer.fields(config.model, only=pretrainer.learning(config.model)),
      threads=config.loader.threads,
    )
    x, y = found["embedding"].astype(np.float64), found["phenotypes"]
    half = found["subject"][:, 0] % 2 == 0  # by subject: visits of one person stay on one side
    probe = phenotypes.fit_probe(x[half], y[half], x[~half], y[~half])
    scores = statistics.r2(y[~half], phenotypes.predict(probe, x[~half]))
    yield from ((f"validation/r2/{name}", float(score)) for name, score in zip(names, scores))

  return run


EVALUATORS = {"losses": losses, "phenotypes": phenotype_probes}
