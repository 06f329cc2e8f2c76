"""What objectives share: names of projections, which rows count, distances between phenotypes,
checks of parameters.

A projection is named by its tower: "ecg", or a CMR tower of `config.model.towers`, or either with
".again" for the second augmentation of the same rows (`config.augment.twice`).
"""

import math

import jax
import jax.numpy as jnp

from mmcl_jax.support.numerics import at_least_float32


def tower(name: str) -> tuple[str, bool]:
  """ "image.again" -> ("image", True)."""
  tower, dot, view = str(name).partition(".")
  if not isinstance(name, str) or not tower or (dot and view != "again"):
    raise ValueError(
      f"the projection is named {name!r}; expected ecg or a CMR tower, or either followed by .again"
    )
  return tower, bool(dot)


def projection(outputs, name: str) -> jax.Array:
  """Projection [B, E] by its name; a KeyError where the model has no such tower or no second
  augmentation."""
  which, again = tower(name)
  if again:
    outputs = outputs["again"]
  if which == "ecg":
    return outputs["ecg_projection"]
  return outputs["cmr"][which]["projection"]


def row_weight(batch, *names: str) -> jax.Array:
  """[B]: 1 for rows that are no padding and have what the named projections are made of (ECG, CMR),
  else 0."""
  needed = set()
  for name in names:
    which, _ = tower(name)
    needed.add("has_ecg" if which == "ecg" else "has_cmr")
  weight = at_least_float32(batch["mask"])
  for modality in sorted(needed):
    weight *= batch[modality]
  return weight


def pair(outputs, a: str, b: str) -> tuple[jax.Array, jax.Array]:
  """Both projections of a pair, which must be two."""
  if a == b:
    raise ValueError(
      f"a and b are both {a!r}; expected two projections, such as ecg and a CMR tower"
    )
  return projection(outputs, a), projection(outputs, b)


def inverse_temperature(outputs, temperature: float):
  """The learned one where the model has one (config.model.learned_temperature), else 1 /
  temperature."""
  require_positive(temperature=temperature)
  if "log_scale" in outputs:
    return jnp.exp(outputs["log_scale"])
  return 1.0 / temperature


def average(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Mean of x [B] over the rows that count, 0 where none does."""
  return (x * weight).sum() / jnp.maximum(weight.sum(), 1.0)


def targets_of(batch) -> tuple[jax.Array, jax.Array]:
  """Standardised targets [B, K] with 0 for what is unknown, and which are known [B, K]."""
  targets = at_least_float32(batch["targets"])
  if targets.ndim != 2 or not targets.shape[1]:
    raise ValueError(
      f"batch.targets has the shape {targets.shape}; expected [rows, phenotypes], at least one in "
      "config.data.targets"
    )
  known = ~jnp.isnan(targets)
  return jnp.where(known, targets, 0), known


def phenotype_distance(batch) -> tuple[jax.Array, jax.Array]:
  """How far apart the phenotypes of any two rows are, over the targets that both know.

  Returns: d [B, B], the mean squared difference in SD^2 (a mean, so that it says the same for any
  number of targets), 0 where no target is common; common [B, B], whether any is.
  """
  x, known = targets_of(batch)
  known = known.astype(x.dtype)

  def times(a, b):
    return jnp.einsum("ik,jk->ij", a, b, precision="highest")

  # (x - y)^2 = x^2 - 2xy + y^2, each summed as a matrix product: differences one by one would be
  # stored, [B, B, K].
  count = times(known, known)  # of the targets that both know
  squares = times(jnp.square(x), known) + times(known, jnp.square(x))
  total = jnp.maximum(squares - 2 * times(x, x), 0)
  # rounding leaves something on the diagonal
  own = jnp.eye(len(x), dtype=bool)
  total = jnp.where(own, 0, total)
  return total / jnp.maximum(count, 1), count > 0


def require_positive(**numbers) -> None:
  for name, value in numbers.items():
    if not (is_number(value) and value > 0):
      raise ValueError(f"{name} is {value!r}; expected a number above 0")


def require_not_negative(**numbers) -> None:
  for name, value in numbers.items():
    if not (is_number(value) and value >= 0):
      raise ValueError(f"{name} is {value!r}; expected 0 or a number above")


def is_number(value) -> bool:
  return isinstance(value, (int, float)) and math.isfinite(value)
