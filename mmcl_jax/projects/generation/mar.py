"""Latents of a heart drawn a few tokens at a time: masked autoregression (MAR, Li et al. 2024),
CardioNets' generator.

A transformer reads the ECG and those latent tokens that are known, and gives each of the others a
condition z; a small network makes that token from noise given z, by a flow of its own (generator;
MAR has a diffusion there). Hearts are drawn in rounds, in random order: few tokens at first, which
decide what the heart is like, and many at the end. Letters: B batch, N latent tokens of C numbers,
M of them drawn in a round, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import vit
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.projects.generation.generator import (
  ZEROS,
  Generator,
  embed_time,
  integrate,
  modulated_norm,
)

DEPTH = 3  # residual blocks of a token's flow, as published
ROUNDS = 16  # of drawing; MAR has 64 and more, each of them a call of the transformer


class TokenFlow(nn.Module):
  """The velocity of tokens, each at its own time on its way from noise, given its condition: an
  MLP."""

  width: int
  channels: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, time, z):
    """x [B, M, C], time [B, M] in [0, 1], z [B, M, D] -> velocity [B, M, C]."""

    def dense(width, name, **options):
      return vit.Dense(width, self.dtype, name=name, **options)

    when = embed_time(time, self.width, self.dtype)
    condition = nn.silu(when + dense(self.width, "told")(z.astype(self.dtype)))
    x = dense(self.width, "embed")(x.astype(self.dtype))
    for i in range(DEPTH):
      modulation = dense(3 * self.width, f"modulation{i}", kernel_init=ZEROS)(condition)
      shift, scale, gate = jnp.split(modulation, 3, axis=-1)
      y = modulated_norm(x, shift, scale, self.dtype, f"norm{i}")
      y = nn.silu(dense(self.width, f"fc1_{i}")(y))
      x = x + gate * dense(self.width, f"fc2_{i}")(y)
    modulation = dense(2 * self.width, "modulation", kernel_init=ZEROS)(condition)
    shift, scale = jnp.split(modulation, 2, axis=-1)
    x = modulated_norm(x, shift, scale, self.dtype, "norm")
    return at_least_float32(dense(self.channels, "velocity", kernel_init=ZEROS)(x))


class MaskedGenerator(nn.Module):
  """What may stand at the hidden places of latents, given an ECG's tokens or none."""

  width: int
  depth: int
  heads: int
  channels: int
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"

  def setup(self):
    # Its time is the share of tokens that are known, its velocities are the conditions z.
    self.trunk = Generator(self.width, self.depth, self.heads, self.width, self.dtype, self.remat)
    self.token = TokenFlow(self.width, self.channels, self.dtype)

  def condition(self, latents, hidden, tokens, given, grid, covariates=None):
    """latents [B, N, C], of which those with hidden [B, N] = 1 are not read -> z [B, N, D]; the
    other arguments: see Generator."""
    hidden = hidden[..., None]
    x = jnp.concatenate([jnp.where(hidden > 0, 0, latents), hidden], axis=-1)
    return self.trunk(x, 1 - hidden.mean(axis=(1, 2)), tokens, given, grid, covariates)


def hide(keys, tokens: int):
  """hidden [B, tokens] by its own key [B]: a share of them anywhere, as before a random one of many
  rounds (known_after).

  MAR hides 0.7 of them or more, which spares its encoder most of them. Here the transformer is told
  the share, so it must have met all that drawing goes through.
  """

  def of_row(key):
    share_key, place_key = jax.random.split(key)
    share = jnp.cos(np.pi / 2 * jax.random.uniform(share_key))
    ranks = jax.random.permutation(place_key, tokens)
    return (ranks < jnp.ceil(share * tokens)).astype(jnp.float32)

  return jax.vmap(of_row)(keys)


def known_after(tokens: int, rounds: int) -> np.ndarray:
  """How many tokens are known after each round, from 0 to `tokens` [rounds + 1].

  Hidden ones fall like a cosine (MaskGIT, Chang et al. 2022), by at least one a round.
  """
  i = np.arange(rounds + 1)
  hidden = np.cos(np.pi / 2 * i / rounds)
  count = np.round(tokens * (1 - hidden))
  return np.clip(count, i, tokens - rounds + i).astype(int)


def take(x, places):
  """x [B, N, ...] at places [B, M] -> [B, M, ...]."""
  return jax.vmap(lambda row, at: row[at])(x, places)


def put(x, places, new):
  """x [B, N, ...] with new [B, M, ...] at places [B, M]."""

  def of_row(row, at, values):
    return row.at[at].set(values)

  return jax.vmap(of_row)(x, places, new)


def draw(condition, velocity, noise, order, steps: int, rounds: int = ROUNDS):
  """Latents [B, N, C] from noise [B, N, C], token by token.

  Args:
    condition: (latents, hidden [B, N]) -> z, arrays [B, N, ...] that `velocity` understands.
    velocity: (x [B, M, C], time [B, M], z at those places) -> velocity [B, M, C].
    order: [B, N], places in the order in which they are drawn.
    steps: of each token's flow (generator.integrate).
    rounds: calls of `condition`; at most one a token.
  """
  B, N, _ = noise.shape
  rounds = min(rounds, N)
  schedule = known_after(N, rounds)
  most = int(np.diff(schedule).max())
  known = jnp.asarray(schedule)

  def draw_round(i, drawn):
    latents, hidden = drawn
    # as many places in every round, of which those before known[i] stay as they are
    start = jnp.minimum(known[i], N - most)
    rank = start + jnp.arange(most)
    places = jax.lax.dynamic_slice_in_dim(order, start, most, axis=1)
    z = jax.tree.map(lambda x: take(x, places), condition(latents, hidden))

    def of_tokens(x, time):
      return velocity(x, jnp.broadcast_to(time[:, None], x.shape[:2]), z)

    new = integrate(of_tokens, take(noise, places), steps)
    fresh = (rank >= known[i]) & (rank < known[i + 1])
    new = jnp.where(fresh[None, :, None], new, take(latents, places))
    still_hidden = jnp.where(fresh[None], 0.0, take(hidden, places))
    return put(latents, places, new), put(hidden, places, still_hidden)

  start = jnp.zeros_like(noise), jnp.ones((B, N))
  latents, _ = jax.lax.fori_loop(0, rounds, draw_round, start)
  return latents
