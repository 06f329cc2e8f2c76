"""Trees that are compared, and variables to compare with."""

import jax
import numpy as np


def difference(found, expected):
  """Largest difference of two trees, relative to the largest expected value of the leaf."""

  def of(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert x.shape == y.shape
    return np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)

  assert jax.tree.structure(found) == jax.tree.structure(expected)
  return max(map(of, jax.tree.leaves(found), jax.tree.leaves(expected)))


def drawn(shapes, seed=0):
  """Variables of these shapes, none of them 0 or 1, as fresh ones would be."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    if path[-1].key in ("var", "scale"):
      return rng.uniform(0.5, 1.5, x.shape).astype(x.dtype)
    return (
      rng.normal(size=x.shape) / np.sqrt(np.prod(x.shape[:-1]) if path[-1].key == "kernel" else 4)
    ).astype(x.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)
