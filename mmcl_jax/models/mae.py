"""Masked-autoencoder parts (He et al. 2022): random masking per sample, and the decoder."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmcl_jax.models import kernels, vit
from mmcl_jax.models.kernels import at_least_float32


def random_mask(
  keys: jax.Array, tokens: int, ratio: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Hides a share `ratio` of the tokens, independently per sample.

  Args:
    keys: [B] random keys, one a sample: the mask of a sample does not depend on its neighbours in
      the batch.

  Returns:
    keep [B, M] visible tokens; restore [B, N] where each token stands in (visible, hidden); mask
      [B, N], 1 = hidden.
  """

  def draw(key):
    return jax.random.uniform(key, (tokens,))

  noise = jax.vmap(draw)(keys)
  order = jnp.argsort(noise, axis=1)
  restore = jnp.argsort(order, axis=1)
  visible = tokens - round(tokens * ratio)
  keep = order[:, :visible]
  mask = (restore >= visible).astype(jnp.float32)
  return keep, restore, mask


class Decoder(nn.Module):
  """Visible tokens -> the whole signal: mask tokens in the gaps, a few blocks, one linear to
  samples."""

  width: int
  depth: int
  heads: int
  patch: int
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan: bool = False

  @nn.compact
  def __call__(self, tokens, restore, leads):
    """Fills the gaps in.

    Args:
      tokens: [B, 1 + M, D], CLS first, normed.
      restore: [B, N], of `random_mask`.
      leads: L.

    Returns: signal [B, L, T], at least float32.
    """
    B, N = restore.shape
    x = vit.Dense(self.width, self.dtype, name="embed")(tokens)  # [B, 1 + M, width]
    cls = x[:, :1]
    visible = x[:, 1:]
    mask_token = self.param("mask_token", nn.initializers.normal(0.02), (1, 1, self.width))
    hidden = jnp.broadcast_to(mask_token, (B, N - visible.shape[1], self.width))
    hidden = hidden.astype(x.dtype)
    patches = jnp.concatenate([visible, hidden], axis=1)
    patches = kernels.permute(patches, restore)  # [B, N, width], in the order of the signal
    positions = vit.sincos_2d(leads, N // leads, self.width)
    patches += jnp.asarray(positions, x.dtype)
    x = jnp.concatenate([cls, patches], axis=1)
    blocks = vit.make_blocks(self.depth, self.heads, dtype=self.dtype)
    x = vit.apply_blocks(blocks, x, None, self.remat, self.scan)
    x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
    x = vit.Dense(self.patch, self.dtype, name="pred")(x)  # [B, 1 + N, samples of a patch]
    return at_least_float32(x[:, 1:]).reshape(B, leads, -1)
