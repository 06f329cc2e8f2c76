"""`s4`: structured state-space layers (S4, Gu et al., ICLR 2022) over an ECG, as Mehari &
Strodthoff 2023 (IEEE JBHI) use them: four layers of width 512 that look both ways, each with GELU,
a gated Linear, a residual and a LayerNorm after it.

The state matrix is diagonal (S4D-Lin, Gu et al., NeurIPS 2022). Of a channel with input u and step
dt, the state of N complex numbers and the output are

    x_t = exp(dt A) x_(t-1) + (exp(dt A) - 1) / A u_t        y_t = 2 Re(C x_t)

which is a convolution of u with k_t = 2 Re(sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n t)), here
by Fourier transform. A second kernel goes over the later samples. All of that is at least float32.

Letters: B batch, L leads, T samples, S steps, H width, N complex numbers of a state.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

from mmcl_jax.errors import UserError
from mmcl_jax.models import kernels, vit
from mmcl_jax.models.kernels import at_least_float32
from mmcl_jax.models.towers import one_of

# state: real numbers of a channel's state, two for each of its N complex ones
SIZES = {
  "test": dict(width=8, depth=2, state=4),
  # for a laptop
  "demo": dict(width=64, depth=2, state=16),
  # Mehari & Strodthoff 2023
  "base": dict(width=512, depth=4, state=64),
}
SLOWEST, FASTEST = 1e-3, 1e-1  # where the steps dt start, log-uniform


def ssm_kernel(dt, a, c, steps: int):
  """k_0 ... k_(steps - 1) of the recurrence above.

  Args:
    dt: [H], above 0.
    a: [H, N] complex, real parts below 0.
    c: [D, H, N] complex, of D kernels.

  Returns:
    [D, steps, H], real.
  """
  dt_a = dt[:, None] * a
  c = c * (jnp.exp(dt_a) - 1) / a
  powers = jnp.exp(dt_a * jnp.arange(steps)[:, None, None])  # [steps, H, N]
  return 2 * jnp.einsum("dhn,thn->dth", c, powers, precision="highest").real


def convolve(u, before, after):
  """y_t = sum over s <= t of before_(t-s) u_s + sum over s > t of after_(s-t-1) u_s.

  Args:
    u: [B, S, H].
    before, after: [S, H].
  """
  steps = u.shape[1]
  # a circle of 2 S: earlier samples at its beginning, later ones at its end
  kernel = jnp.concatenate([before, after[::-1]])
  product = jnp.fft.rfft(u, 2 * steps, axis=1) * jnp.fft.rfft(kernel, axis=0)
  return jnp.fft.irfft(product, 2 * steps, axis=1)[:, :steps]


def by_rows(f, x, *shared):
  """f(x, *shared) of rows x [B, ...], each device its own ones: of a Fourier transform the
  partitioner would gather the whole batch."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or "data" not in mesh.axis_names or AxisType.Manual in mesh.axis_types:
    return f(x, *shared)
  if x.shape[0] % mesh.shape["data"]:
    return f(x, *shared)
  specs = (P("data"), *(P() for _ in shared))
  return jax.shard_map(f, in_specs=specs, out_specs=P("data"))(x, *shared)


class StateSpace(nn.Module):
  """The state-space model over u [B, S, H], a channel at a time, and a direct way from u to y."""

  state: int

  @nn.compact
  def __call__(self, u):
    H, N = u.shape[-1], self.state // 2

    def log_uniform(key, shape, dtype):
      return jax.random.uniform(key, shape, dtype, minval=np.log(SLOWEST), maxval=np.log(FASTEST))

    def frequencies(key, shape, dtype):
      return jnp.broadcast_to(jnp.pi * jnp.arange(N, dtype=dtype), shape)

    log_dt = self.param("log_dt", log_uniform, (H,), jnp.float32)
    log_decay = self.param("log_decay", nn.initializers.constant(np.log(0.5)), (H, N), jnp.float32)
    frequency = self.param("frequency", frequencies, (H, N), jnp.float32)
    # real and imaginary parts, of the kernels over earlier and later samples
    c = self.param("c", nn.initializers.normal(np.sqrt(0.5)), (2, H, N, 2), jnp.float32)
    direct = self.param("direct", nn.initializers.normal(1.0), (H,), jnp.float32)
    a = jax.lax.complex(-jnp.exp(log_decay), frequency)
    c = jax.lax.complex(c[..., 0], c[..., 1])
    u = at_least_float32(u)
    before, after = ssm_kernel(jnp.exp(log_dt), a, c, u.shape[1]).astype(u.dtype)
    return by_rows(convolve, u, before, after) + direct * u


class Block(nn.Module):
  """LayerNorm(x + GLU(Linear(GELU(state space of x)))), x [B, S, H]."""

  state: int
  layer: int = 0
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, keys=None):
    y = kernels.gelu(StateSpace(self.state, name="ssm")(x))
    y = vit.dropout(y, keys, self.dropout, 2 * self.layer).astype(self.dtype)
    y = vit.Dense(2 * x.shape[-1], self.dtype, name="out")(y)
    y, gate = jnp.split(at_least_float32(y), 2, axis=-1)
    y = vit.dropout(y * nn.sigmoid(gate), keys, self.dropout, 2 * self.layer + 1)
    return nn.LayerNorm(epsilon=1e-5, name="norm")(x + y)


class S4(nn.Module):
  """ECG [B, L, T] -> tokens [B, S, H], one a step, and their mean [B, H].

  Attributes:
    size: a name of SIZES, or such a dict.
    patch: samples of all leads that become one step; the published network sees 100 a second.
    dropout: in training.
  """

  size: Any
  patch: int = 5
  dropout: float = 0.2
  dtype: jnp.dtype = jnp.float32
  remat: str = "none"

  def check(self, where: str, shape) -> None:
    """Raises a UserError where the parameters do not suit an ECG of `shape` (L, T)."""
    if isinstance(self.size, str):
      one_of(where, "size", self.size, SIZES)
    if not isinstance(self.patch, int) or self.patch < 1 or shape[1] % self.patch:
      raise UserError(
        f"{where}.patch is {self.patch}, which does not divide config.data.samples = {shape[1]}"
      )

  @nn.compact
  def __call__(self, ecg, rows=None, train=False, keys=None):
    """Returns: tokens [B, T / patch, H], embedding [B, H]."""
    size = SIZES[self.size] if isinstance(self.size, str) else self.size
    B, L, T = ecg.shape
    x = ecg.reshape(B, L, T // self.patch, self.patch).swapaxes(1, 2)
    x = x.reshape(B, T // self.patch, L * self.patch).astype(self.dtype)
    x = at_least_float32(vit.Dense(size["width"], self.dtype, name="stem")(x))
    block = Block
    if self.remat != "none":
      block = nn.remat(Block, policy=vit.remat_policy(self.remat))
    block = functools.partial(block, size["state"], dropout=self.dropout, dtype=self.dtype)
    for i in range(size["depth"]):
      x = block(layer=i, name=f"block{i}")(x, keys)
    return x, x.mean(axis=1)
