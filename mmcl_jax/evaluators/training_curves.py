"""Every metric of metrics.jsonl over the steps."""

import pathlib

from mmcl_jax.evaluators.base import Result
from mmcl_jax.evaluators.context import Context
from mmcl_jax.reports import figures
from mmcl_jax.training import metrics


def training_curves(context: Context) -> Result:
  """A figure of what training logged; nothing of weights from elsewhere, which have no log."""
  records = metrics.read(pathlib.Path(context.workdir) / "metrics.jsonl")
  if not records:
    return Result()
  figure = figures.training_curves(records, context.note)
  figure.set_label("Training curves")
  return Result(figures={"training_curves": figure})
