"""Latents of a heart drawn from an ECG: rectified flow (Liu et al. 2023; Lipman et al. 2023) by a
diffusion transformer.

A straight line leads from noise at time 0 to a latent at time 1, x_t = (1 - t) noise + t latent;
the transformer (DiT, Peebles & Xie 2023) learns its velocity, latent - noise, from x_t, t and the
tokens of the ECG, which every block reads by cross-attention, with one more token of the person's
covariates where the config asks for it. Where the ECG is withheld, one learned token takes the
place of its tokens, so that the same network draws from the hearts of all (classifier-free
guidance, Ho & Salimans 2022). Letters: B batch, N latent tokens of C numbers, M ECG tokens, V
covariates, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import kernels, pooling, vit
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.models.towers import video_vit

# name -> width, depth, heads. Widths are multiples of 16.
SIZES = {
  "test": (16, 1, 2),
  "demo": (128, 4, 4),  # for a laptop
  "small": (384, 12, 6),  # DiT-S
  "base": (768, 12, 12),  # DiT-B
  "large": (1024, 24, 16),  # DiT-L
}
FREQUENCIES = 64  # pairs of sine and cosine that encode the time
ZEROS = nn.initializers.zeros


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

    def dense(width, name, **options):
      return vit.Dense(width, self.dtype, name=name, **options)

    modulation = dense(9 * D, "modulation", kernel_init=ZEROS)(nn.silu(when))
    modulation = modulation.reshape(B, 3, 1, 3 * D)  # of each of the three layers
    shifts, scales, gates = jnp.split(modulation, 3, axis=-1)

    def norm(x, layer):
      name = f"norm{layer}"
      return modulated_norm(x, shifts[:, layer], scales[:, layer], self.dtype, name)

    def by_head(x):
      return x.reshape(B, -1, self.heads, D // self.heads)

    start = vit.by_heads(vit.Dense.kernel_init, self.heads)
    qkv = dense(3 * D, "qkv", kernel_init=start)(norm(x, 0))
    attended = kernels.self_attention(qkv, self.heads)
    x = x + gates[:, 0] * dense(D, "proj")(attended)

    kv = dense(2 * D, "cross_kv")(context)
    q = dense(D, "cross_q")(norm(x, 1))
    k, v = jnp.split(kv, 2, axis=-1)
    attended = kernels.attention(by_head(q), by_head(k), by_head(v))
    x = x + gates[:, 1] * dense(D, "cross_proj")(attended.reshape(B, N, D))

    hidden = kernels.gelu(dense(4 * D, "fc1")(norm(x, 2)))
    return x + gates[:, 2] * dense(D, "fc2")(hidden)


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
    """The velocity [B, N, C], at least float32.

    Args:
      x: latents on their way [B, N, C].
      time: [B] in [0, 1].
      tokens: of ECGs [B, M, D'].
      given: [B], 0 where the ECG is withheld.
      grid: latent tokens along (slices, rows, columns).
      covariates: [B, V], standardised, NaN = unknown; None for a model that takes none.
    """

    def dense(width, name, **options):
      return vit.Dense(width, self.dtype, name=name, **options)

    init = nn.initializers.normal(1.0)
    withheld = self.param("no_ecg", init, (1, 1, tokens.shape[-1]), jnp.float32)
    tokens = jnp.where(given[:, None, None] > 0, tokens, withheld)
    norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="context_norm")
    context = norm(dense(self.width, "context")(tokens.astype(self.dtype)))
    if covariates is not None:
      values = pooling.with_unknown(covariates).astype(self.dtype)
      person = dense(self.width, "covariates")(values)
      context = jnp.concatenate([context, person[:, None]], axis=1)

    when = embed_time(time, self.width, self.dtype)
    positions = jnp.asarray(video_vit.sincos_3d(*grid, self.width), self.dtype)
    x = dense(self.width, "embed")(x.astype(self.dtype)) + positions
    block = Block
    if self.remat != "none":
      block = nn.remat(Block, policy=vit.remat_policy(self.remat))
    for i in range(self.depth):
      x = block(self.heads, self.dtype, name=f"block{i}")(x, when, context)
    modulation = dense(2 * self.width, "modulation", kernel_init=ZEROS)(nn.silu(when))
    shift, scale = jnp.split(modulation[:, None], 2, axis=-1)
    x = modulated_norm(x, shift, scale, self.dtype, "norm")
    return at_least_float32(dense(self.channels, "velocity", kernel_init=ZEROS)(x))


def modulated_norm(x, shift, scale, dtype, name: str):
  """LayerNorm without parameters, then scaled and shifted as the time says."""
  norm = nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, dtype=dtype, name=name)
  return norm(x) * (1 + scale) + shift


def embed_time(time, width: int, dtype):
  """time [...] in [0, 1] -> [..., width], by an MLP with the parameters time1 and time2."""
  hidden = vit.Dense(width, dtype, name="time1")(time_features(time).astype(dtype))
  return vit.Dense(width, dtype, name="time2")(nn.silu(hidden))


def time_features(time):
  """time [...] in [0, 1] -> [..., 2 FREQUENCIES]: sines and cosines of 1 to 1,000 radians over the
  line."""
  frequencies = jnp.asarray(1000.0 ** np.linspace(0, 1, FREQUENCIES), jnp.float32)
  angle = at_least_float32(time)[..., None] * frequencies
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def interpolate(latents, keys, dropout: float, each_token: bool = False):
  """A place on the way to each of latents [B, N, C], by its own key [B]; with `each_token`, every
  token at a time of its own.

  Times are logit-normal (0, 1), denser where the velocity is hard to tell (Esser et al. 2024).

  Returns: x [B, N, C], time [B] or [B, N], the velocity there [B, N, C], kept [B]: 0 with
  probability `dropout`.
  """

  def of_row(latent, key):
    noise_key, time_key, drop_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, latent.shape, latent.dtype)
    time = nn.sigmoid(jax.random.normal(time_key, latent.shape[:1] if each_token else ()))
    kept = jax.random.bernoulli(drop_key, 1 - dropout).astype(jnp.float32)
    velocity = latent - noise
    return noise + time[..., None] * velocity, time, velocity, kept

  return jax.vmap(of_row)(latents, keys)


def given_values(guidance: float) -> tuple[float, ...]:
  """For which `given` the network must be called: 1.0 the ECG, 0.0 no ECG."""
  return (float(guidance),) if guidance in (0, 1) else (0.0, 1.0)


def guided(velocity, guidance: float):
  """velocity(given), given 0.0 or 1.0 -> the velocity away from that of any heart by `guidance` (1:
  the ECG's own)."""
  velocities = [velocity(given) for given in given_values(guidance)]
  if len(velocities) == 1:
    return velocities[0]
  without, with_ecg = velocities
  return without + guidance * (with_ecg - without)


def integrate(velocity, noise, steps: int):
  """Follows velocity(x, time [B]) from noise [B, N, C] at time 0 to time 1 by Heun's method, in
  `steps` steps of two calls each.

  The last step is Euler's: the velocity at time 1 itself was never asked for in training.
  """
  B = len(noise)
  size = 1 / steps

  def at(i):
    return jnp.full(B, i * size)

  def heun(i, x):
    slope = velocity(x, at(i))
    next_slope = velocity(x + size * slope, at(i + 1))
    return x + size / 2 * (slope + next_slope)

  x = jax.lax.fori_loop(0, steps - 1, heun, noise)
  return x + size * velocity(x, at(steps - 1))
