"""Latents of a heart drawn a few tokens at a time: masked autoregression (MAR, Li et al. 2024),
CardioNets' generator.

A transformer looks at the ECG and at those latent tokens that are known, and tells of each of the
others what it may be; a small network makes that token of noise, by a flow of its own
(models.generator; MAR has a diffusion there). Hearts are drawn in rounds, in an order left to
chance: few tokens at first, which decide what the heart is like, and many at the end. Letters: B
batch, N latent tokens of C numbers, M of them drawn in a round, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmcl_jax.models import generator, vit
from mmcl_jax.models.kernels import at_least_float32

DEPTH = 3  # residual blocks of a token's flow, as published
ROUNDS = 16  # of drawing; MAR has 64 and more, each of them a look of the transformer


class TokenFlow(nn.Module):
  """The velocity of tokens, each at its own time on its way from noise, by what the transformer
  tells of it: an MLP."""

  width: int
  channels: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, time, told):
    """x [B, M, C], time [B, M] in [0, 1], told [B, M, D] -> velocity [B, M, C]."""

    def dense(width, name, **more):
      return vit.Dense(width, self.dtype, name=name, **more)

    still = dict(kernel_init=nn.initializers.zeros)

    def norm(x, shift, scale, name):
      return (
        nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False, dtype=self.dtype, name=name)(x)
        * (1 + scale)
        + shift
      )

    when = dense(self.width, "time2")(
      nn.silu(dense(self.width, "time1")(generator.waves(time).astype(self.dtype)))
    )
    by = nn.silu(when + dense(self.width, "told")(told.astype(self.dtype)))
    x = dense(self.width, "embed")(x.astype(self.dtype))
    for i in range(DEPTH):
      shift, scale, gate = jnp.split(
        dense(3 * self.width, f"modulation{i}", **still)(by), 3, axis=-1
      )
      y = nn.silu(dense(self.width, f"fc1_{i}")(norm(x, shift, scale, f"norm{i}")))
      x = x + gate * dense(self.width, f"fc2_{i}")(y)
    x = norm(x, *jnp.split(dense(2 * self.width, "modulation", **still)(by), 2, axis=-1), "norm")
    return at_least_float32(dense(self.channels, "velocity", **still)(x))


class MaskedGenerator(nn.Module):
  """What may stand at the hidden places of latents, given an ECG's tokens or none."""

  width: int
  depth: int
  heads: int
  channels: int
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"

  def setup(self):
    # Its time is the share of tokens that are known, its velocities are what the flow of a token is
    # told.
    self.trunk = generator.Generator(
      self.width, self.depth, self.heads, self.width, self.dtype, self.remat
    )
    self.token = TokenFlow(self.width, self.channels, self.dtype)

  def tell(self, latents, hidden, tokens, given, grid, covariates=None):
    """latents [B, N, C], of which those with hidden [B, N] = 1 are not looked at -> told [B, N, D];
    the rest: Generator."""
    hidden = hidden[..., None]
    x = jnp.concatenate([jnp.where(hidden > 0, 0, latents), hidden], axis=-1)
    return self.trunk(x, 1 - hidden.mean(axis=(1, 2)), tokens, given, grid, covariates)


def hide(keys, tokens: int):
  """hidden [B, tokens] by its own key [B]: a share of them anywhere, as before a random one of many
  rounds (known_after).

  MAR hides 0.7 of them or more, which spares its encoder most of them. Here the transformer is told
  the share, so it must have met all that drawing goes through.
  """

  def one(key):
    share_key, place_key = jax.random.split(key)
    share = jnp.cos(np.pi / 2 * jax.random.uniform(share_key))
    return (jax.random.permutation(place_key, tokens) < jnp.ceil(share * tokens)).astype(
      jnp.float32
    )

  return jax.vmap(one)(keys)


def known_after(tokens: int, rounds: int) -> np.ndarray:
  """How many tokens are known after each round, from 0 to `tokens` [rounds + 1].

  Hidden ones fall like a cosine (MaskGIT, Chang et al. 2022), by at least one a round.
  """
  i = np.arange(rounds + 1)
  return np.clip(
    np.round(tokens * (1 - np.cos(np.pi / 2 * i / rounds))), i, tokens - rounds + i
  ).astype(int)


def draw(tell, velocity, noise, order, steps: int, rounds: int = ROUNDS):
  """Latents [B, N, C] from noise [B, N, C], token by token.

  Args:
    tell: (latents, hidden [B, N]) -> told, arrays [B, N, ...] that `velocity` understands.
    velocity: (x [B, M, C], time [B, M], told at those places) -> velocity [B, M, C].
    order: [B, N], places in the order in which they are drawn.
    steps: of each token's flow (generator.integrate).
    rounds: looks; at most one a token.
  """
  B, N, _ = noise.shape
  rounds = min(rounds, N)
  known = known_after(N, rounds)
  at_once, known = int(np.diff(known).max()), jnp.asarray(known)
  take = jax.vmap(lambda x, places: x[places])
  put = jax.vmap(lambda x, places, new: x.at[places].set(new))

  def one_round(i, found):
    latents, hidden = found
    start = jnp.minimum(known[i], N - at_once)
    turn = start + jnp.arange(at_once)
    places = jax.lax.dynamic_slice_in_dim(order, start, at_once, axis=1)
    told = jax.tree.map(lambda x: take(x, places), tell(latents, hidden))

    def along(x, time):
      return velocity(x, jnp.broadcast_to(time[:, None], x.shape[:2]), told)

    fresh = ((turn >= known[i]) & (turn < known[i + 1]))[None, :, None]
    drawn = jnp.where(
      fresh, generator.integrate(along, take(noise, places), steps), take(latents, places)
    )
    return put(latents, places, drawn), put(
      hidden, places, jnp.where(fresh[..., 0], 0.0, take(hidden, places))
    )

  return jax.lax.fori_loop(0, rounds, one_round, (jnp.zeros_like(noise), jnp.ones((B, N))))[0]
