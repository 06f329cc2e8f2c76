"""Projection heads."""

import flax.linen as nn
import jax.numpy as jnp

from mmcl_jax.models.resnet import BatchNorm


class Projection(nn.Module):
  """Linear - ReLU - Linear with bias (MMCL).

  norm: without bias, batch norm after each (SimCLR v1, newer heads). last: what that of the second
  Linear is: affine, plain (without scale and bias) or none. hidden 0: one Linear (CardiacNets).
  """

  hidden: int
  width: int
  norm: bool = False
  last: str = "affine"

  @nn.compact
  def __call__(self, x, rows=None, train=False):
    """x [B, D] -> [B, E]; rows [B] weight of each row in the batch statistics."""
    if not self.hidden:
      return nn.Dense(self.width, name="fc")(x)
    if rows is None:
      rows = jnp.ones(len(x))

    def norm(x, name, affine=True):
      if not self.norm:
        return x
      dtype = jnp.promote_types(x.dtype, jnp.float32)
      return BatchNorm(dtype, affine=affine, name=name)(x, rows, train)

    x = nn.Dense(self.hidden, use_bias=not self.norm, name="fc1")(x)
    x = nn.relu(norm(x, "norm1"))
    x = nn.Dense(self.width, use_bias=not self.norm, name="fc2")(x)
    if self.last == "none":
      return x
    return norm(x, "norm2", affine=self.last == "affine")
