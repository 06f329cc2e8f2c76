"""Objectives: what the loop minimises, chosen and weighted by the config alone.

    config.objectives.NAME = dict(fn="dual_phase", weight=1.0, **parameters)
    config.objectives.NAME = dict(fn="my_package.my_module:my_loss", weight=1.0, **parameters)

An objective is `fn(outputs, batch, **parameters) -> Loss`. It sees the whole global batch (sharded
arrays under jit): its value is the same on 1 or 512 devices. `weight` is a number, or
`dict(steps=(0, 1000), values=(0.0, 1.0))`, a schedule that is linear in between and constant beyond
its ends. Nothing in the package changes for a new objective.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmcl_jax import registry
from mmcl_jax.errors import UserError

BUILT_IN = {
  "mae": "mmcl_jax.objectives.mae:mae",
  "dual_phase": "mmcl_jax.objectives.contrastive:dual_phase",
  "clip": "mmcl_jax.objectives.contrastive:clip",
  "nt_xent": "mmcl_jax.objectives.ntxent:nt_xent",
  "siglip": "mmcl_jax.objectives.sigmoid:siglip",
  "phenotype_weighted": "mmcl_jax.objectives.phenotypes:phenotype_weighted",
  "soft_positive": "mmcl_jax.objectives.phenotypes:soft_positive",
  "false_negative_removal": "mmcl_jax.objectives.phenotypes:false_negative_removal",
  "relational": "mmcl_jax.objectives.phenotypes:relational",
  "phenotype_regression": "mmcl_jax.objectives.supervised:phenotype_regression",
  "disease_classification": "mmcl_jax.objectives.supervised:disease_classification",
  "vicreg": "mmcl_jax.objectives.noncontrastive:vicreg",
  "simsiam": "mmcl_jax.objectives.noncontrastive:simsiam",
  "cmr_mae": "mmcl_jax.objectives.mae:cmr_mae",
  "kl_autoencoder": "mmcl_jax.projects.generation.objectives:kl_autoencoder",
  "segmentation": "mmcl_jax.projects.generation.objectives:segmentation",
  "flow_matching": "mmcl_jax.projects.generation.objectives:flow_matching",
}


class Loss(NamedTuple):
  """values [B] per row; weight [B], 0 for rows that do not count; metrics: name -> scalar, for the
  log."""

  values: jax.Array
  weight: jax.Array
  metrics: dict[str, jax.Array]


class Objective(NamedTuple):
  name: str
  loss: Callable[[dict, dict], Loss]  # (outputs, batch) -> Loss, parameters bound
  weight: Callable[[jax.Array], jax.Array]  # step -> weight


def build(config) -> list[Objective]:
  """`config.objectives` -> objectives; a UserError names what is unknown and lists what exists."""
  if not config:
    raise UserError(
      "config.objectives is empty; expected at least one entry such as reconstruction = "
      "dict(fn='mae', weight=1.0)"
    )
  entries = sorted(config.to_dict().items())
  return [build_one(name, entry) for name, entry in entries]


def build_one(name: str, entry: dict) -> Objective:
  where = f"config.objectives.{name}"
  if "fn" not in entry or "weight" not in entry:
    raise UserError(
      f"{where} has the keys {sorted(entry)}; expected fn, weight and the parameters of fn"
    )
  fn = entry.pop("fn")
  weight = entry.pop("weight")
  function = find(fn, f"{where}.fn")
  registry.check_parameters(function, entry, where, fn, passed=2)

  def loss(outputs, batch):
    return function(outputs, batch, **entry)

  return Objective(name, loss, schedule(weight, f"{where}.weight"))


def find(fn: str, where: str) -> Callable:
  """The loss function that `fn` names; `where` says so in a config, for messages."""
  return registry.resolve(fn, BUILT_IN, where)


def schedule(weight, where: str) -> Callable:
  """step -> weight, of a number or of dict(steps=(...), values=(...)), linear between the steps."""

  def constant(step):
    return jnp.asarray(float(weight))

  def linear(step):
    return jnp.interp(jnp.asarray(step, float), steps, values)

  if isinstance(weight, (int, float)):
    return constant
  try:
    steps = jnp.asarray(weight["steps"], float)
    values = jnp.asarray(weight["values"], float)
    rising = not bool((jnp.diff(steps) <= 0).any())
    if steps.ndim != 1 or steps.shape != values.shape or not rising:
      raise ValueError
  except (KeyError, TypeError, ValueError):
    raise UserError(
      f"{where} is {weight}; expected a number or dict(steps=(0, 1000), values=(0.0, 1.0)) "
      "with rising steps and as many values"
    ) from None
  return linear


def mean(loss: Loss) -> jax.Array:
  """Mean over the rows that count; 0 where none does."""
  total = jnp.sum(loss.values * loss.weight)
  return total / jnp.maximum(jnp.sum(loss.weight), 1.0)
