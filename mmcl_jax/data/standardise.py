"""How labels are standardised: by the mean and SD of the train split."""

from typing import Any, NamedTuple

import numpy as np

from mmcl_jax.data.cohort import Cohort, train_statistics
from mmcl_jax.errors import UserError

Moments = tuple[np.ndarray, np.ndarray]  # mean and SD, a value a column


class Standardiser(NamedTuple):
  """The labels that a run learns from, and their mean and SD in the train split.

  Attributes:
    targets: K names of phenotypes.
    columns: their K places among the cohort's phenotypes.
    target_moments: mean [K] and SD [K], in the phenotypes' units.
    covariates: V names.
    covariate_moments: mean [V] and SD [V].
    diseases: C names; diseases are 0 or 1 and stay as they are.
  """

  targets: tuple[str, ...]
  columns: tuple[int, ...]
  target_moments: Moments
  covariates: tuple[str, ...]
  covariate_moments: Moments
  diseases: tuple[str, ...] = ()


def of_cohort(cohort: Cohort, targets: tuple[str, ...]) -> Standardiser:
  """The Standardiser of the phenotypes `targets` (empty: all of the cohort's)."""
  phenotypes = list(cohort.info["phenotypes"])
  unknown = [name for name in targets if name not in phenotypes]
  if unknown:
    raise UserError(
      f"config.data.targets has {', '.join(unknown)}; the cohort {cohort.path} has "
      f"{', '.join(phenotypes) or 'no phenotypes'}"
    )
  names = tuple(targets) or tuple(phenotypes)
  columns = [phenotypes.index(name) for name in names]
  mean, sd = train_statistics(cohort, "phenotypes")
  return Standardiser(
    targets=names,
    columns=tuple(columns),
    target_moments=(mean[columns], sd[columns]),
    covariates=tuple(cohort.info["covariates"]),
    covariate_moments=train_statistics(cohort, "covariates"),
    diseases=tuple(cohort.info["diseases"]),
  )


def as_they_are(
  phenotypes: list[str],
  targets: tuple[str, ...] = (),
  covariates: tuple[str, ...] = (),
  diseases: tuple[str, ...] = (),
) -> Standardiser:
  """The Standardiser that changes nothing (mean 0, SD 1), where no cohort has been measured."""

  def moments(names) -> Moments:
    return np.zeros(len(names), np.float32), np.ones(len(names), np.float32)

  return Standardiser(
    targets=tuple(targets),
    columns=tuple(phenotypes.index(name) for name in targets),
    target_moments=moments(targets),
    covariates=tuple(covariates),
    covariate_moments=moments(covariates),
    diseases=tuple(diseases),
  )


def to_json(standardiser: Standardiser) -> dict[str, Any]:
  entry = {}
  for name, value in standardiser._asdict().items():
    if name.endswith("_moments"):
      entry[name] = [np.asarray(x, float).tolist() for x in value]
    else:
      entry[name] = list(value)
  return entry


def from_json(entry: dict[str, Any]) -> Standardiser:
  """The inverse of `to_json`."""
  values = {}
  for name in Standardiser._fields:
    if name.endswith("_moments"):
      mean, sd = entry[name]
      values[name] = np.asarray(mean, np.float32), np.asarray(sd, np.float32)
    else:
      values[name] = tuple(entry[name])
  return Standardiser(**values)
