"""Functions with a derivative of their own, where the one that JAX derives loses time or memory.

What is as good everywhere has one form. What helps one platform alone is chosen when a program is
lowered (jax.lax.platform_dependent), so that a TPU's program is the same wherever it was compiled.
They have no forward-mode derivative (jax.jvp). Letters: B batch, N tokens, H heads, D width of a
head.

OWN names those in use. To measure one (docs/performance.md), take its name out before anything is
traced: JAX's form takes its place.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export, lax

from mmcl_jax.models import short_attention
from mmcl_jax.support.numerics import at_least_float32

OWN = {"linear", "gelu", "attention", "permute", "convolve"}


# ------------------------------------------------------------------------------------------
# linear


def linear(x, w, b=None):
  """x [..., I] @ w [I, O] + b [O], all of one dtype; None: no bias.

  On a CPU what makes the incoming gradient would be computed once more, with strided access, in the
  weight's, were it not for the barrier.
  """
  if "linear" not in OWN:
    y = product(x, w)
    return y if b is None else y + b
  y = own_product(x, w)
  if b is not None:
    y = y + b
  return gradient_barrier(y)


def product(x, w):
  last_with_first = ((x.ndim - 1,), (0,)), ((), ())
  return lax.dot_general(x, w, last_with_first)


@jax.custom_vjp
def own_product(x, w):
  """x [..., I] @ w [I, O]; on a CPU alone its gradients are of flattened rows.

  A CPU would take the weight's from a transposed copy of a 3-D x. On a TPU it is flattening that
  copies, where the number of tokens is no multiple of 8.
  """
  return product(x, w)


def product_forward(x, w):
  return product(x, w), (x, w)


def product_backward(saved, g):
  return lax.platform_dependent(*saved, g, cpu=gradients_of_rows, default=gradients)


def gradients(x, w, g):
  """Those of x and w, as JAX derives them from the gradient of `product`."""
  _, pull = jax.vjp(product, x, w)
  return pull(g)


def gradients_of_rows(x, w, g):
  rows = x.reshape(-1, x.shape[-1])
  g_rows = g.reshape(-1, g.shape[-1])
  d_rows, d_w = gradients(rows, w, g_rows)
  return d_rows.reshape(x.shape), d_w


own_product.defvjp(product_forward, product_backward)


@jax.custom_vjp
def gradient_barrier(x):
  """x; on a CPU its gradient is computed in full before anything is made of it."""
  return x


def gradient_barrier_forward(x):
  return x, None


def gradient_barrier_backward(_, g):
  def unchanged(g):
    return g

  return (lax.platform_dependent(g, cpu=lax.optimization_barrier, default=unchanged),)


gradient_barrier.defvjp(gradient_barrier_forward, gradient_barrier_backward)


# ------------------------------------------------------------------------------------------
# GELU


def gelu(x):
  """Exact GELU, x Phi(x) (Hendrycks & Gimpel 2016); the forward pass saves its derivative instead
  of x.

  Both are computed in at least float32, where an absolute error of 3e-7 stands against x Phi(x) at
  -6 < x < 6.
  """
  if "gelu" not in OWN:
    return jax.nn.gelu(x, approximate=False)
  return own_gelu(x)


@jax.custom_vjp
def own_gelu(x):
  return gelu_and_derivative(x)[0]


def gelu_and_derivative(x):
  """x Phi(x) and Phi(x) + x phi(x), with Phi the normal distribution and phi its density."""
  z = at_least_float32(x)
  distribution = 0.5 + 0.5 * lax.erf(z * math.sqrt(0.5))
  density = jnp.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
  value = z * distribution
  derivative = distribution + z * density
  return value.astype(x.dtype), derivative.astype(x.dtype)


def gelu_backward(derivative, g):
  return (g * derivative,)


own_gelu.defvjp(gelu_and_derivative, gelu_backward)


# ------------------------------------------------------------------------------------------
# attention


def self_attention(qkv, heads: int):
  """Softmax attention of N tokens to each other: qkv [B, N, 3 D], columns as of `split_qkv`, ->
  [B, N, D].

  On a TPU one kernel that reads qkv where it lies and keeps no N x N weights
  (models/short_attention.py); else `attention`.
  """

  B, N, columns = qkv.shape

  def of_parts(qkv):
    q, k, v = split_qkv(qkv, heads)
    return attention(q, k, v).reshape(B, N, columns // 3)

  if "attention" not in OWN or not short_attention.suits(qkv, heads):
    return of_parts(qkv)
  on_tpu = functools.partial(short_attention.attention, heads=heads)
  return lax.platform_dependent(qkv, tpu=on_tpu, default=of_parts)


def split_qkv(qkv, heads: int):
  """[B, N, 3 D] -> queries, keys and values [B, N, H, D / H].

  The columns lie as [H, 3, D / H]: an equal part of them is all of some heads, so that devices that
  share a matrix (config.sharding) need nothing of each other's (Shoeybi et al. 2019).
  """
  B, N, columns = qkv.shape
  qkv = qkv.reshape(B, N, heads, 3, columns // (3 * heads))
  return qkv[:, :, :, 0], qkv[:, :, :, 1], qkv[:, :, :, 2]


def attention(q, k, v):
  """Softmax attention: q [B, N, H, D], k and v [B, M, H, D] -> [B, N, H, D]; the softmax in at
  least float32.

  On a CPU `own_attention`. On NVIDIA's GPUs in half precision cuDNN's flash attention, which
  keeps no N x M weights. Elsewhere jax.nn.dot_product_attention as XLA compiles it. float64, which
  JAX would take down to float32, is `own_attention` everywhere.
  """
  if q.dtype == jnp.float64:
    return own_attention(q, k, v)
  by_platform = {}
  if "attention" in OWN:
    by_platform["cpu"] = own_attention
  if suits_cudnn(q, k, gpu_at_hand()):
    by_platform["cuda"] = padded_attention
  return lax.platform_dependent(
    q,
    k,
    v,
    **by_platform,
    default=jax.nn.dot_product_attention,
  )


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
  symbolic = any(map(export.is_symbolic_dim, (*q.shape, *k.shape)))
  if gpu is None or symbolic or gpu.capability < (8, 0):
    return False
  if gpu.capability == (10, 3) and gpu.cudnn < 91100:
    return False
  _, queries, _, width = q.shape
  half_precision = q.dtype in (jnp.bfloat16, jnp.float16)
  return half_precision and width % 8 == 0 and width <= 128 and queries > 1


def padded_attention(q, k, v, implementation="cudnn"):
  """Attention over tokens padded to a multiple of 8; no query sees the padding, which is cut off.

  In training cuDNN's wrapper takes even numbers of tokens alone, and patches with CLS are odd. Not
  to be mapped (jax.vmap): in jax 0.10 the wrapper's rule for that cannot take the lengths.
  """

  def pad(x):
    missing = -x.shape[1] % 8
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0)))

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
  """The output, and what `attention_backward` needs: softmax = exponentials / total."""
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, H, N, D], [B, H, M, D]
  scale = q.shape[-1] ** -0.5
  wide = jnp.promote_types(q.dtype, jnp.float32)
  products = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=wide)
  logits = scale * products  # [B, H, N, M]
  largest = logits.max(axis=-1, keepdims=True)
  exponentials = jnp.exp(logits - largest)
  total = exponentials.sum(axis=-1, keepdims=True)  # [B, H, N, 1]
  exponentials = exponentials.astype(v.dtype)
  out = jnp.einsum("bhnm,bhmd->bhnd", exponentials, v)
  out = at_least_float32(out) / total
  saved = q, k, v, out, exponentials, total
  return out.astype(v.dtype).swapaxes(1, 2), saved


def attention_backward(saved, g):
  """Gradients of q, k and v.

  With P the softmax and O the output, the gradient of the logits is P (g v^T - sum over D of g O):
  here g is divided by the total, rather than the exponentials.
  """
  q, k, v, out, exponentials, total = saved
  scale = q.shape[-1] ** -0.5
  g = at_least_float32(g.swapaxes(1, 2)) / total  # [B, H, N, D]
  inner = (g * out).sum(axis=-1, keepdims=True)
  g = g.astype(v.dtype)
  d_weights = jnp.einsum("bhnd,bhmd->bhnm", g, v)
  d_logits = exponentials * (at_least_float32(d_weights) - inner)
  d_logits = d_logits.astype(v.dtype)
  d_q = jnp.einsum("bhnm,bhmd->bhnd", d_logits, k * scale)
  d_k = jnp.einsum("bhnd,bhnm->bhdm", q * scale, d_logits)
  d_v = jnp.einsum("bhnd,bhnm->bhdm", g, exponentials)
  return d_q.swapaxes(1, 2), d_k.transpose(0, 3, 1, 2), d_v.transpose(0, 3, 1, 2)


own_attention.defvjp(attention_forward, attention_backward)


# ------------------------------------------------------------------------------------------
# permutation


def permute(x, order):
  """x [B, N, D] with row i of the result x[b, order[b, i]]; order [B, N] is a permutation in every
  b.

  Its gradient is a gather by the inverse permutation, where that of a gather in general is a
  scatter that adds: slow on a CPU, and in no fixed order on a GPU.
  """
  if "permute" not in OWN:
    return gather(x, order)
  return own_permute(x, order)


def gather(x, order):
  return jnp.take_along_axis(x, order[:, :, None], axis=1)


def permute_forward(x, order):
  return gather(x, order), order


def permute_backward(order, g):
  inverse = jnp.argsort(order, axis=1)
  return gather(g, inverse), None


own_permute = jax.custom_vjp(gather)
own_permute.defvjp(permute_forward, permute_backward)


# ------------------------------------------------------------------------------------------
# convolution


def convolve(x, w, strides, padding, **more):
  """lax.conv_general_dilated of x [B, H, W, C] with w [h, k, C, O], as flax's Conv calls it.

  A CPU multiplies the patches of x [B H' W', h k C] by the kernel as a matrix, because XLA's
  convolution runs on one core for the most part. The patches, h k times as large as x, are cut
  again in the backward pass, so that none are kept.
  """

  def by_xla(x, w):
    return lax.conv_general_dilated(x, w, strides, padding, **more)

  if "convolve" not in OWN:
    return by_xla(x, w)
  as_product = functools.partial(by_patches, strides=strides, padding=padding)
  return lax.platform_dependent(x, w, cpu=jax.checkpoint(as_product), default=by_xla)


def by_patches(x, w, strides, padding):
  """The convolution as one product: every patch of x [B, H, W, C] times w [h, k, C, O]."""
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  _, H, W, _ = x.shape
  h, k, _, channels = w.shape
  down, right = strides
  rows = (H - h) // down + 1  # H', of the result
  columns = (W - k) // right + 1
  pixels = []  # for each place in a patch, the pixels there: [B, H', W', C]
  for i in range(h):
    for j in range(k):
      pixels.append(x[:, i : i + down * rows : down, j : j + right * columns : right])
  patches = jnp.concatenate(pixels, axis=-1)
  return linear(patches, w.reshape(-1, channels))
