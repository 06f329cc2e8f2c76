"""The masked autoencoder at work: one recording, and what it makes of what it does not see."""

import jax
from jax.sharding import NamedSharding, PartitionSpec as P

from mmcl_jax.data import pipeline
from mmcl_jax.data.preprocess import ecg as preprocess_ecg
from mmcl_jax.evaluators.base import Result
from mmcl_jax.evaluators.context import Context
from mmcl_jax.models import inputs
from mmcl_jax.reports import figures


def reconstruction(context: Context) -> Result:
  """A figure of the first recording of the split; nothing of a model that masks no ECG."""
  run = context.run
  config = context.run.config
  tower = config.model.towers.get("ecg", {})
  if not tower.get("mask_ratio"):
    return Result()

  def reconstruct(variables, rows):
    standardiser = run.standardiser if tower.get("film") else None
    rows = inputs.to_float(rows, standardiser)
    rows = inputs.first_window(rows, config.data.samples)
    keys = inputs.sample_keys(config.seed, rows["index"])
    outputs = run.model.apply(
      variables,
      rows["ecg"],
      keys,
      rows.get("conditions"),
      method="reconstruct",
    )
    return rows["ecg"], outputs

  def make():
    everywhere = NamedSharding(run.mesh, P())
    return jax.jit(reconstruct, out_shardings=everywhere)

  with jax.set_mesh(run.mesh):
    jitted = context.once_a_run("reconstruct", make)
    for rows in pipeline.one_pass(context.cohort.splits[context.split], batch=1):
      if rows["has_ecg"][0]:
        break
    ecg, outputs = jax.device_get(jitted(run.state.variables, rows))
  figure = figures.reconstruction(
    ecg[0],
    outputs["reconstruction"][0],
    outputs["patch_mask"][0],
    tower.patch,
    rate_hz=preprocess_ecg.rate_hz(config.data.ecg_profile),
    note=context.note,
  )
  split = {"val": "validation"}.get(context.split, context.split)
  figure.set_label(f"Masked reconstruction of a {split} recording")
  return Result(figures={"reconstruction": figure})
