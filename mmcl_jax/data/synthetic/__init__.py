"""A synthetic heart: a 12-lead ECG and a short-axis CMR of the same subject, with known phenotypes.

For demonstrations and tests of the whole path where no cohort is at hand, and for benchmarks with a
known ceiling.
"""

import numpy as np

from mmcl_jax.data import measure, schema
from mmcl_jax.data.synthetic import cmr, ecg, population

# What a perfect reader of the ECG would know of the heart; see `couplings`.
ECG_PARAMETERS = ("heart_rate", "qrs_width", "qrs_gain", "t_gain")


def identify(seed: int, index: int) -> np.ndarray:
  """The subject's hash, uint32 [2]; no two (seed, index) share one."""
  return schema.subject_hash(f"synthetic/{seed}/{index}", salt=b"synthetic")


def subject(
  seed: int,
  index: int,
  grid: cmr.Grid = cmr.Grid(),
  lax: bool = False,
) -> dict[str, np.ndarray]:
  """The record of one subject as in `schema`, the same for (seed, index) in any process and any
  order.

  The ECG is raw, in mV. Phenotypes are measured on the labels. One key is not part of the schema:
  `ecg_parameters`, float32 [E], the values of ECG_PARAMETERS behind the recording, free of nuisance
  and noise. `lax` adds the long-axis view; everything else is the same without it.
  """
  population_of_one = population.draw(seed, [index])
  traits = {name: values[0] for name, values in population_of_one.items()}
  rng = population.generator(seed, index, 2)
  volumes, labels, cine = cmr.heart(traits, rng, grid)
  spacing = np.array(grid.spacing, np.float32)
  measured = measure.phenotypes(labels, spacing, traits["heart_rate"])
  record = {
    "subject": identify(seed, index),
    "has_ecg": np.True_,
    "has_cmr": np.True_,
    "ecg": ecg.ecg(traits, population.generator(seed, index, 1)),
    "ed_es_volumes": volumes,
    "labels": labels,
    "cine_slice": cine,
    "three_frames": cine[[0, cmr.ES // 2, cmr.ES]],
    "spacing": spacing,
    "phenotypes": np.array(list(measured.values()), np.float32),
    "diseases": _values(traits, schema.DISEASES),
    "covariates": _values(traits, schema.COVARIATES),
    "ecg_parameters": _values(traits, ECG_PARAMETERS),
  }
  if lax:
    rng = population.generator(seed, index, 2)  # as of the short axis: the same heart
    plane_rng = population.generator(seed, index, 3)
    record["lax"], _ = cmr.long_axis(traits, rng, plane_rng, grid)
  return record


def _values(traits, names):
  return np.array([traits[name] for name in names], np.float32)
