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
  dt_a = dt[:, None] * a  # [H, N]
  # what an input adds to the state, seen through C
  gain = c * (jnp.exp(dt_a) - 1) / a
  times = jnp.arange(steps)[:, None, None]
  decay = jnp.exp(dt_a * times)  # [steps, H, N]
  total = jnp.einsum("dhn,thn->dth", gain, decay, precision="highest")
  return 2 * total.real


def convolve(u, before, after):
  """y_t = sum over s <= t of before_(t-s) u_s + sum over s > t of after_(s-t-1) u_s.

  Args:
    u: [B, S, H].
    before, after: [S, H].
  """
  steps = u.shape[1]
  length = 2 * steps
  # a circle of 2 S: earlier samples at its beginning, later ones at its end
  kernel = jnp.concatenate([before, after[::-1]])  # [2 S, H]
  spectrum = jnp.fft.rfft(u, length, axis=1)
  product = spectrum * jnp.fft.rfft(kernel, axis=0)
  return jnp.fft.irfft(product, length, axis=1)[:, :steps]


def by_rows(f, x, *shared):
  """f(x, *shared) of rows x [B, ...], each device its own ones: of a Fourier transform the
  partitioner would gather the whole batch."""
  mesh = jax.sharding.get_abstract_mesh()
  if "data" not in mesh.shape or AxisType.Manual in mesh.axis_types:
    return f(x, *shared)
  if len(x) % mesh.shape["data"]:
    return f(x, *shared)
  specs = [P("data")] + [P()] * len(shared)
  on_devices = jax.shard_map(f, in_specs=tuple(specs), out_specs=P("data"))
  return on_devices(x, *shared)


def log_uniform(key, shape, dtype):
  """Initialiser: logarithms of the steps dt."""
  return jax.random.uniform(
    key,
    shape,
    dtype,
    minval=np.log(SLOWEST),
    maxval=np.log(FASTEST),
  )


def harmonics(key, shape, dtype):
  """Initialiser (S4D-Lin): imaginary parts pi n of A [H, N]."""
  numbers = jnp.arange(shape[-1], dtype=dtype)
  return jnp.broadcast_to(jnp.pi * numbers, shape)


class StateSpace(nn.Module):
  """The state-space model over u [B, S, H], a channel at a time, and a direct way from u to y."""

  state: int

  @nn.compact
  def __call__(self, u):
    H = u.shape[-1]
    N = self.state // 2
    half = nn.initializers.constant(np.log(0.5))
    normal = nn.initializers.normal
    log_dt = self.param("log_dt", log_uniform, (H,), jnp.float32)
    log_decay = self.param("log_decay", half, (H, N), jnp.float32)
    frequency = self.param("frequency", harmonics, (H, N), jnp.float32)
    # first axis: the kernels over earlier and later samples; last: real and imaginary parts
    c = self.param("c", normal(np.sqrt(0.5)), (2, H, N, 2), jnp.float32)
    direct = self.param("direct", normal(1.0), (H,), jnp.float32)
    # a negative real part for any log_decay: the state decays
    a = jax.lax.complex(-jnp.exp(log_decay), frequency)
    c = jax.lax.complex(c[..., 0], c[..., 1])
    u = at_least_float32(u)
    kernels_in_time = ssm_kernel(jnp.exp(log_dt), a, c, u.shape[1])  # [2, S, H]
    before, after = kernels_in_time.astype(u.dtype)
    return by_rows(convolve, u, before, after) + direct * u


class Block(nn.Module):
  """LayerNorm(x + GLU(Linear(GELU(state space of x)))), x [B, S, H]."""

  state: int
  layer: int = 0
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x, keys=None):
    H = x.shape[-1]

    def drop(x, i):  # of a block's two dropouts
      return vit.dropout(x, keys, self.dropout, 2 * self.layer + i)

    y = StateSpace(self.state, name="ssm")(x)
    y = drop(kernels.gelu(y), 0)
    y = vit.Dense(2 * H, self.dtype, name="out")(y.astype(self.dtype))
    value, gate = jnp.split(at_least_float32(y), 2, axis=-1)
    y = drop(value * nn.sigmoid(gate), 1)
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
    steps = T // self.patch
    x = ecg.reshape(B, L, steps, self.patch).swapaxes(1, 2)
    x = x.reshape(B, steps, L * self.patch)
    x = vit.Dense(size["width"], self.dtype, name="stem")(x.astype(self.dtype))
    x = at_least_float32(x)  # [B, S, H]
    block_class = Block
    if self.remat != "none":
      block_class = nn.remat(Block, policy=vit.remat_policy(self.remat))
    for i in range(size["depth"]):
      block = block_class(
        size["state"],
        layer=i,
        dropout=self.dropout,
        dtype=self.dtype,
        name=f"block{i}",
      )
      x = block(x, keys)
    return x, x.mean(axis=1)
