"""Latents of a heart drawn from an ECG: rectified flow (Liu et al. 2023; Lipman et al. 2023) by a
diffusion transformer.

A straight line leads from noise at time 0 to a latent at time 1, x_t = (1 - t) noise + t latent;
the transformer (DiT, Peebles & Xie 2023) learns its velocity, latent - noise, from x_t, t and the
tokens of the ECG, which every block looks up by cross-attention, with one more token of the
person's covariates where the config asks for it. Where the ECG is withheld, one learned token takes
the place of its tokens, so that the same network draws from the hearts of all (classifier-free
guidance, Ho & Salimans 2022). Letters: B batch, N latent tokens of C numbers, M ECG tokens, V
covariates, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import kernels, pooling, vit
from mmcl_jax.models.towers import video_vit
from mmcl_jax.models.kernels import at_least_float32

# name -> width, depth, heads. Widths are multiples of 16.
SIZES = {
  "test": (16, 1, 2),
  "demo": (128, 4, 4),  # for a laptop
  "small": (384, 12, 6),  # DiT-S
  "base": (768, 12, 12),  # DiT-B
  "large": (1024, 24, 16),  # DiT-L
}
WAVES = 64  # pairs of sine and cosine that tell the time


class Block(nn.Module):
  """x [B, N, D], when [B, D] (time), context [B, M, D]: self-attention, cross-attention, MLP, each
  scaled and gated by the time.

  All gates start at 0, so that a block starts as the identity (adaLN-Zero).
  """

  heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, when, context):
    B, N, D = x.shape

    def dense(width, name, **more):
      return vit.Dense(width, self.dtype, name=name, **more)

    def split(x):
      return x.reshape(B, -1, self.heads, D // self.heads)

    modulation = dense(9 * D, "modulation", kernel_init=nn.initializers.zeros)(nn.silu(when))
    shifts, scales, gates = jnp.split(modulation[:, None].reshape(B, 3, 1, 3 * D), 3, axis=-1)

    def norm(x, i):
      y = nn.LayerNorm(
        epsilon=1e-6, use_scale=False, use_bias=False, dtype=self.dtype, name=f"norm{i}"
      )(x)
      return y * (1 + scales[:, i]) + shifts[:, i]

    q, k, v = map(split, jnp.split(dense(3 * D, "qkv")(norm(x, 0)), 3, axis=-1))
    x = x + gates[:, 0] * dense(D, "proj")(kernels.attention(q, k, v).reshape(B, N, D))
    k, v = map(split, jnp.split(dense(2 * D, "cross_kv")(context), 2, axis=-1))
    q = split(dense(D, "cross_q")(norm(x, 1)))
    x = x + gates[:, 1] * dense(D, "cross_proj")(kernels.attention(q, k, v).reshape(B, N, D))
    return x + gates[:, 2] * dense(D, "fc2")(kernels.gelu(dense(4 * D, "fc1")(norm(x, 2))))


class Generator(nn.Module):
  """The velocity of latents at a time, given an ECG's tokens or none."""

  width: int
  depth: int
  heads: int
  channels: int
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"

  @nn.compact
  def __call__(self, x, time, tokens, given, grid, covariates=None):
    """x [B, N, C], time [B] in [0, 1], tokens [B, M, D'] of ECGs, given [B] (0: withheld) ->
    velocity [B, N, C].

    grid: latent tokens along (slices, rows, columns); covariates [B, V], standardised, NaN =
    unknown.
    """

    def dense(width, name, **more):
      return vit.Dense(width, self.dtype, name=name, **more)

    nothing = self.param(
      "no_ecg", nn.initializers.normal(1.0), (1, 1, tokens.shape[-1]), jnp.float32
    )
    tokens = jnp.where(given[:, None, None] > 0, tokens, nothing).astype(self.dtype)
    context = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="context_norm")(
      dense(self.width, "context")(tokens)
    )
    if covariates is not None:
      told = dense(self.width, "covariates")(pooling.with_unknown(covariates).astype(self.dtype))
      context = jnp.concatenate([context, told[:, None]], axis=1)
    when = dense(self.width, "time2")(
      nn.silu(dense(self.width, "time1")(waves(time).astype(self.dtype)))
    )
    x = dense(self.width, "embed")(x.astype(self.dtype)) + jnp.asarray(
      video_vit.sincos_3d(*grid, self.width), self.dtype
    )
    block = Block if self.remat == "none" else nn.remat(Block, policy=vit.remat_policy(self.remat))
    for i in range(self.depth):
      x = block(self.heads, self.dtype, name=f"block{i}")(x, when, context)
    modulation = dense(2 * self.width, "modulation", kernel_init=nn.initializers.zeros)(
      nn.silu(when)
    )
    shift, scale = jnp.split(modulation[:, None], 2, axis=-1)
    x = (
      nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, dtype=self.dtype, name="norm")(x)
      * (1 + scale)
      + shift
    )
    return at_least_float32(dense(self.channels, "velocity", kernel_init=nn.initializers.zeros)(x))


def waves(time):
  """time [...] in [0, 1] -> [..., 2 WAVES]: sines and cosines of 1 to 1,000 radians over the
  line."""
  angle = at_least_float32(time)[..., None] * jnp.asarray(
    1000.0 ** np.linspace(0, 1, WAVES), jnp.float32
  )
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def on_the_line(latents, keys, dropout: float, each_token: bool = False):
  """A place on the way to each of latents [B, N, C], by its own key [B]; with `each_token`, every
  token at a time of its own.

  Times are logit-normal (0, 1), denser where the velocity is hard to tell (Esser et al. 2024).

  Returns: x [B, N, C], time [B] or [B, N], the velocity there [B, N, C], kept [B]: 0 with
  probability `dropout`.
  """

  def one(latent, key):
    noise_key, time_key, drop_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, latent.shape, latent.dtype)
    time = nn.sigmoid(jax.random.normal(time_key, latent.shape[:1] if each_token else ()))
    kept = jax.random.bernoulli(drop_key, 1 - dropout).astype(jnp.float32)
    return noise + time[..., None] * (latent - noise), time, latent - noise, kept

  return jax.vmap(one)(latents, keys)


def looks(guidance: float) -> tuple[float, ...]:
  """What must be looked at for it: 1.0 the ECG, 0.0 no ECG."""
  return (float(guidance),) if guidance in (0, 1) else (0.0, 1.0)


def guided(velocity, guidance: float):
  """velocity(given), given 0.0 or 1.0 -> the velocity away from that of any heart by `guidance` (1:
  the ECG's own)."""
  without, *more = map(velocity, looks(guidance))
  return without + guidance * (more[0] - without) if more else without


def integrate(velocity, noise, steps: int):
  """Follows velocity(x, time [B]) from noise [B, N, C] at time 0 to time 1 by Heun's method,
  `steps` steps of two looks each.

  The last step is Euler's: the velocity at time 1 itself was never asked for in training.
  """
  B, size = len(noise), 1 / steps

  def at(i):
    return jnp.full(B, i * size)

  def heun(i, x):
    slope = velocity(x, at(i))
    return x + size / 2 * (slope + velocity(x + size * slope, at(i + 1)))

  x = jax.lax.fori_loop(0, steps - 1, heun, noise)
  return x + size * velocity(x, at(steps - 1))
