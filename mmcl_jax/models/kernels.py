"""Functions with a derivative of their own, where the one that JAX derives loses time or memory.

What is as good everywhere has one form. What helps a CPU alone is chosen when a program is lowered,
by its platform (jax.lax.platform_dependent), so that a TPU's program is the same wherever it was
compiled. They have no forward-mode derivative (jax.jvp). Letters: B batch, N tokens, H heads, D
width of a head.

OWN names those in use. To measure one (docs/performance.md), take its name out before anything is
traced: JAX's form takes its place.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from mmcl_jax.support.numerics import at_least_float32

OWN = {"linear", "gelu", "attention", "permute", "convolve"}


# --------------------------------------------------------------------------------------------------------------
# linear


def linear(x, w, b=None):
  """x [..., I] @ w [I, O] + b [O], all of one dtype; None: no bias.

  Rows are flattened, since a CPU would take the weight's gradient of a 3-D x from a transposed copy
  of it. What makes the incoming gradient would be computed once more, with strided access, in that
  product, were it not for the barrier.
  """
  if "linear" not in OWN:
    y = lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))
    return y if b is None else y + b
  y = x.reshape(-1, x.shape[-1]) @ w
  return gradient_barrier(y if b is None else y + b).reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def gradient_barrier(x):
  """x; on a CPU its gradient is computed in full before anything is made of it."""
  return x


gradient_barrier.defvjp(
  lambda x: (x, None),
  lambda _, g: (lax.platform_dependent(g, cpu=lax.optimization_barrier, default=lambda g: g),),
)


# ----------------------------------------------------------------------------------------------------------------
# GELU


def gelu(x):
  """Exact GELU, x Phi(x) (Hendrycks & Gimpel 2016); the forward pass saves its derivative instead
  of x.

  Both are computed in at least float32, where an absolute error of 3e-7 stands against x Phi(x) at
  -6 < x < 6.
  """
  return own_gelu(x) if "gelu" in OWN else jax.nn.gelu(x, approximate=False)


@jax.custom_vjp
def own_gelu(x):
  return gelu_and_derivative(x)[0]


def gelu_and_derivative(x):
  z = at_least_float32(x)
  phi = 0.5 + 0.5 * lax.erf(z * math.sqrt(0.5))
  density = jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
  return (z * phi).astype(x.dtype), (phi + z * density).astype(x.dtype)


own_gelu.defvjp(gelu_and_derivative, lambda derivative, g: (g * derivative,))


# -----------------------------------------------------------------------------------------------------------
# attention


def attention(q, k, v):
  """Softmax attention: q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D]; the softmax in at
  least float32.

  On a CPU `own_attention`. On NVIDIA's GPUs in half precision cuDNN's flash attention, which
  keeps no N x M weights. Elsewhere jax.nn.dot_product_attention as XLA compiles it, on a TPU too:
  there JAX has no other. float64, which JAX would take down to float32, is `own_attention`
  everywhere.
  """
  if q.dtype == jnp.float64:
    return own_attention(q, k, v)
  own = {"cpu": own_attention} if "attention" in OWN else {}
  flash = {"cuda": padded_attention} if suits_cudnn(q, k, gpu_at_hand()) else {}
  return lax.platform_dependent(q, k, v, default=jax.nn.dot_product_attention, **own, **flash)


class Gpu(NamedTuple):
  """One of NVIDIA's, as a program is traced for it."""

  capability: tuple[int, int]  # compute capability, (9, 0): Hopper
  cudnn: int  # version, 91200: 9.12.0


def gpu_at_hand() -> Gpu | None:
  """What programs are traced for here; None: no GPU of NVIDIA's."""
  device = jax.devices()[0]
  if device.platform != "gpu" or "cuda" not in device.client.platform_version:
    return None
  from jax._src.cudnn import fused_attention_stablehlo as wrapper

  capability = tuple(int(part) for part in device.compute_capability.split("."))
  return Gpu(capability, wrapper.check_cudnn_version())


def suits_cudnn(q, k, gpu: Gpu | None) -> bool:
  """Whether q [B, N, H, D] and k [B, M, H, D] go to `padded_attention` on that GPU.

  Not what JAX's wrapper refuses, nor a single query (attention pooling), which has no more weights
  than keys, nor any number of rows (`mmcl export`): such a program is the same wherever it was
  made, and so is one for a GPU that is compiled where there is none.
  """
  if gpu is None or any(map(export.is_symbolic_dim, (*q.shape, *k.shape))):
    return False
  runs = gpu.capability >= (8, 0) and (gpu.capability != (10, 3) or gpu.cudnn >= 91100)
  width = q.shape[-1]
  return (
    runs
    and q.dtype in (jnp.bfloat16, jnp.float16)
    and width % 8 == 0
    and width <= 128
    and q.shape[1] > 1
  )


def padded_attention(q, k, v, implementation="cudnn"):
  """Attention over tokens padded to a multiple of 8; no query sees the padding, which is cut off.

  In training cuDNN's wrapper takes even numbers of tokens alone, and patches with CLS are odd. Not
  to be mapped (jax.vmap): in jax 0.10 the wrapper's rule for that cannot take the lengths.
  """

  def pad(x):
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0)))

  def lengths(x):  # all alike: a device with some of the rows reads as many, the first ones
    return jnp.full(x.shape[0], x.shape[1], jnp.int32)

  out = jax.nn.dot_product_attention(
    pad(q),
    pad(k),
    pad(v),
    query_seq_lengths=lengths(q),
    key_value_seq_lengths=lengths(k),
    implementation=implementation,
  )
  return out[:, : q.shape[1]]


@jax.custom_vjp
def own_attention(q, k, v):
  """Attention whose backward pass has no product of a transposed [N, M], which a CPU does at half
  the speed.

  It keeps the exponentials [N, M] and their sums; all other divisions and scalings are of [N, D].
  """
  return attention_forward(q, k, v)[0]


def attention_forward(q, k, v):
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  wide = jnp.promote_types(q.dtype, jnp.float32)
  logits = q.shape[-1] ** -0.5 * jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=wide)
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))  # to be divided by their sum
  total, weights = weights.sum(axis=-1, keepdims=True), weights.astype(v.dtype)
  out = at_least_float32(jnp.einsum("bhnm,bhmd->bhnd", weights, v)) / total
  return out.astype(v.dtype).swapaxes(1, 2), (q, k, v, out, weights, total)


def attention_backward(saved, g):
  q, k, v, out, weights, total = saved
  g = at_least_float32(g.swapaxes(1, 2)) / total
  inner = (g * out).sum(axis=-1, keepdims=True)
  g, scale = g.astype(v.dtype), q.shape[-1] ** -0.5
  slope = weights * (at_least_float32(jnp.einsum("bhnd,bhmd->bhnm", g, v)) - inner)
  slope = slope.astype(v.dtype)
  to_q = jnp.einsum("bhnm,bhmd->bhnd", slope, k * scale)
  to_k, to_v = (jnp.einsum("bhnd,bhnm->bhdm", x, y) for x, y in ((q * scale, slope), (g, weights)))
  return to_q.swapaxes(1, 2), to_k.transpose(0, 3, 1, 2), to_v.transpose(0, 3, 1, 2)


own_attention.defvjp(attention_forward, attention_backward)


# ---------------------------------------------------------------------------------------------------------
# permutation


def permute(x, order):
  """x [B, N, D] with row i of the result x[b, order[b, i]]; order [B, N] is a permutation in every
  b.

  Its gradient is a gather by the inverse permutation, where that of a gather in general is a
  scatter that adds: slow on a CPU, and in no fixed order on a GPU.
  """
  return own_permute(x, order) if "permute" in OWN else gather(x, order)


def gather(x, order):
  return jnp.take_along_axis(x, order[:, :, None], axis=1)


own_permute = jax.custom_vjp(gather)
own_permute.defvjp(
  lambda x, order: (gather(x, order), order),
  lambda order, g: (gather(g, jnp.argsort(order, axis=1)), None),
)


# ---------------------------------------------------------------------------------------------------------
# convolution


def convolve(x, w, strides, padding, **more):
  """lax.conv_general_dilated of x [B, H, W, C] with w [h, k, C, O], as flax's Conv calls it.

  A CPU multiplies the patches of x [B H' W', h k C] by the kernel as a matrix, because XLA's
  convolution runs on one core for the most part. The patches, h k times as large as x, are cut
  again in the backward pass, so that none are kept.
  """

  def whole(x, w):
    return lax.conv_general_dilated(x, w, strides, padding, **more)

  if "convolve" not in OWN:
    return whole(x, w)
  cut = jax.checkpoint(functools.partial(by_patches, strides=strides, padding=padding))
  return lax.platform_dependent(x, w, cpu=cut, default=whole)


def by_patches(x, w, strides, padding):
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  (h, k), (a, b) = w.shape[:2], strides
  rows, columns = (x.shape[1] - h) // a + 1, (x.shape[2] - k) // b + 1
  patches = jnp.concatenate(
    [x[:, i : i + a * rows : a, j : j + b * columns : b] for i in range(h) for j in range(k)],
    axis=-1,
  )
  return linear(patches, w.reshape(-1, w.shape[-1]))
