"""Synthetic hearts as a source: no files, phenotypes known, the hash of a subject drawn from (seed,
index)."""

import functools

from mmcl_jax.data import schema, synthetic
from mmcl_jax.data.sources import Item, Plan
from mmcl_jax.errors import UserError


TAKES = ("subjects", "seed", "profile", "split", "lax")


def plan(options, identify=None) -> Plan:
  """`options`: `subjects`, `seed`; may have `lax`, the long-axis view. Cohorts of different seeds
  share no subject."""
  if options.subjects < 1 or options.seed < 0:
    raise UserError(
      f"--subjects={options.subjects} --seed={options.seed}; expected at least 1 and 0"
    )
  lax = getattr(options, "lax", False)
  items = [
    Item(synthetic.identify(options.seed, index), 0, index) for index in range(options.subjects)
  ]
  info = {
    "source": f"synthetic hearts, seed {options.seed}",
    "synthetic": True,
    "seed": options.seed,
    "phenotypes": schema.PHENOTYPES,
    "diseases": list(schema.DISEASES),
    "covariates": schema.COVARIATES,
    "ecg_parameters": list(synthetic.ECG_PARAMETERS),
  }
  return Plan(
    items, functools.partial(read, options.seed, lax), info, {"synthetic subjects": len(items)}
  )


def read(seed: int, lax: bool, item: Item):
  return synthetic.subject(seed, item.key, lax=lax), ()
