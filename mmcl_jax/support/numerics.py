"""Types of numbers, for models and objectives alike."""

import jax
import jax.numpy as jnp


def at_least_float32(x) -> jax.Array:
  """bfloat16 and integers become float32; float32 and float64 stay."""
  x = jnp.asarray(x)
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
