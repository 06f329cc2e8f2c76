"""KL autoencoder of the heart at two moments: its short-axis stacks at ED and ES <-> a few latent
tokens.

The first half of latent generation (Rombach et al. 2022), of CardioNets' too (Ding et al. 2026). As
in ViT-VQGAN (Yu et al. 2022) encoder and decoder are transformers over patches, whose products a
CPU, a GPU and a TPU do alike; a patch spans the same place at both phases, so that one token says
how that place moves. Letters: B batch, P phases, Z slices, H W pixels, N tokens, C numbers a token.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import vit
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.models.towers import video_vit

PHASES = 2
# of a latent: its exponential is finite in float32 and far from the ends
LOG_VARIANCE = (-20.0, 10.0)

# name -> width, depth, heads of the encoder and of the decoder. Widths are multiples of 16.
SIZES = {
  "test": (16, 1, 2),
  "demo": (128, 2, 4),  # for a laptop
  "small": (384, 6, 6),
  "base": (768, 12, 12),
}


class Tokenizer(nn.Module):
  """Stacks [B, P, Z, H, W] in [0, 1] <-> latents [B, N, C]; Z, H, W are multiples of `patch`'s
  sides."""

  width: int
  depth: int
  heads: int
  patch: tuple[int, int, int]
  channels: int
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"
  scan: bool = False

  def setup(self):
    self.patch_embed = vit.Dense(self.width, self.dtype)
    self.encoder = self.blocks()
    self.encoder_norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
    self.posterior = vit.Dense(2 * self.channels, self.dtype)
    self.latent_embed = vit.Dense(self.width, self.dtype)
    self.decoder = self.blocks()
    self.decoder_norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)
    self.pixels = vit.Dense(PHASES * int(np.prod(self.patch)), self.dtype)

  def blocks(self) -> list[nn.Module]:
    return [vit.Block(self.heads, i, dtype=self.dtype) for i in range(self.depth)]

  def transform(self, x, grid, blocks, norm):
    x += jnp.asarray(video_vit.sincos_3d(*grid, self.width), x.dtype)
    return norm(vit.apply_blocks(blocks, x, None, self.remat, self.scan))

  def encode(self, stacks):
    """stacks [B, P, Z, H, W] -> mean and log-variance [B, N, C] of the latents, at least
    float32."""
    x = 2 * stacks - 1
    patches = [video_vit.patchify(x[:, phase], self.patch) for phase in range(PHASES)]
    x = self.patch_embed(jnp.concatenate(patches, axis=-1).astype(self.dtype))
    grid = grid_of(stacks.shape[2:], self.patch)
    x = self.posterior(self.transform(x, grid, self.encoder, self.encoder_norm))
    mean, log_variance = jnp.split(at_least_float32(x), 2, axis=-1)
    return mean, jnp.clip(log_variance, *LOG_VARIANCE)

  def decode(self, latents, shape):
    """latents [B, N, C] -> stacks [B, P, Z, H, W], `shape` = (Z, H, W); in [0, 1] as far as it has
    learned to."""
    x = self.latent_embed(latents.astype(self.dtype))
    x = self.transform(x, grid_of(shape, self.patch), self.decoder, self.decoder_norm)
    patches = jnp.split(at_least_float32(self.pixels(x)), PHASES, axis=-1)
    phases = [video_vit.unpatchify(x, shape, self.patch) for x in patches]
    return 0.5 + 0.5 * jnp.stack(phases, axis=1)

  def __call__(self, stacks, keys=None):
    """stacks [B, P, Z, H, W] and back. keys [B]: latents are drawn (training); None: they are their
    mean.

    Returns: latent_mean, latent_log_variance [B, N, C], reconstruction [B, P, Z, H, W].
    """
    mean, log_variance = self.encode(stacks)
    latents = mean if keys is None else draw(mean, log_variance, keys)
    return {
      "latent_mean": mean,
      "latent_log_variance": log_variance,
      "reconstruction": self.decode(latents, stacks.shape[2:]),
    }


def draw(mean, log_variance, keys):
  """A latent of each row [B, N, C] by its own key [B] (Kingma & Welling 2014)."""

  def of_row(key):
    return jax.random.normal(key, mean.shape[1:], mean.dtype)

  noise = jax.vmap(of_row)(keys)
  return mean + jnp.exp(0.5 * log_variance) * noise


def grid_of(shape, patch) -> tuple[int, ...]:
  """Tokens of stacks of `shape` (Z, H, W) along slices, rows and columns."""
  return tuple(length // side for length, side in zip(shape, patch))
