"""Self-attention of short sequences on a TPU: weights [N, N] stay in vector memory (VMEM).

One program of the kernel computes a few heads of one recording. It reads their columns of the qkv
product where they lie, and holds whole rows of weights, so that the softmax needs neither blocks
nor a running maximum (as in FlashAttention, Dao et al. 2022), and any number of tokens is taken
without padding. The backward pass computes the weights once more from the same columns: the
forward pass saves nothing but qkv.

Letters: B batch, N tokens, H heads, D width of a head.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

log = logging.getLogger(__name__)

# A TPU's registers hold rows of 128 numbers; those of 2 bytes lie in tiles of 16 rows.
LANES, ROWS = 128, 16
MIB = 2**20
# Of VMEM: what TPU v5p and 7x have (v5e and v6e 128, v4 16), and what XLA lets any kernel take.
SMALL_CHIP, ALWAYS = 64 * MIB, 16 * MIB


def suits(qkv, heads: int) -> bool:
  """Whether `attention` takes qkv [B, N, 3 H D].

  Not float64, nor any number of rows (`mmcl export`). Where a TPU is at hand whose VMEM is too
  small, the log says so, once a shape.
  """
  if qkv.dtype not in (jnp.float32, jnp.bfloat16) or any(map(export.is_symbolic_dim, qkv.shape)):
    return False
  _, tokens, columns = qkv.shape
  width = columns // (3 * heads)
  needed = vmem_needed(tokens, heads, width, qkv.dtype.itemsize)
  there = vmem_at_hand()
  if there and needed > there:
    say_too_large(tokens, heads, width, needed, there)
  return needed <= (there or SMALL_CHIP)


def vmem_needed(tokens: int, heads: int, width: int, itemsize: int) -> int:
  """Bytes of VMEM that a program of the backward pass takes at most.

  Columns of qkv, of its gradient and of that of the output, each twice, since the next ones are
  fetched meanwhile; and six [N, N] of float32, where libtpu's compiler was seen to take four.
  """
  rows = round_up(tokens, ROWS)
  together = group(tokens, heads, width)
  columns = 2 * round_up(3 * together * width, LANES) + round_up(together * width, LANES)
  return 2 * rows * columns * itemsize + 6 * rows * round_up(tokens, LANES) * 4


def round_up(number: int, unit: int) -> int:
  return -(-number // unit) * unit


def vmem_at_hand() -> int | None:
  """Bytes of VMEM of the TPU that is traced for: of the mesh, or the first at hand. None: it is no
  TPU."""
  try:
    return pltpu.get_tpu_info().vmem_capacity_bytes
  except ValueError:  # the device is no TPU, or one that this JAX does not know
    return None


@functools.cache
def say_too_large(tokens: int, heads: int, width: int, needed: int, there: int) -> None:
  log.warning(
    "self-attention of %d tokens, %d heads of %d, needs up to %d MiB of VMEM, this TPU has %d: "
    "XLA's attention takes its place, which keeps weights [%d, %d] a head in HBM",
    tokens,
    heads,
    width,
    needed // MIB,
    there // MIB,
    tokens,
    tokens,
  )


def attention(qkv, heads: int, interpret: bool = False):
  """Softmax attention among N tokens: qkv [B, N, 3 H D], its columns in the order [H, 3, D], ->
  [B, N, H D].

  On a mesh every device computes its own rows (`data`) and heads (`model`), where they divide.

  Args:
    interpret: runs the kernel as plain operations, for a test without a TPU.
  """
  return own_attention(qkv, heads, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def own_attention(qkv, heads, interpret):
  return run(forward_kernel, heads, interpret, 1, qkv)


def attention_forward(qkv, heads, interpret):
  return own_attention(qkv, heads, interpret), qkv


def attention_backward(heads, interpret, qkv, g):
  return (run(backward_kernel, heads, interpret, 3, qkv, g.astype(qkv.dtype)),)


own_attention.defvjp(attention_forward, attention_backward)


# ------------------------------------------------------------------------------------------
# on the devices of a mesh


def run(kernel, heads: int, interpret: bool, parts: int, qkv, *more):
  """The kernel on qkv [B, N, 3 H D] and more arrays [B, N, H D] -> [B, N, parts H D]."""
  mesh = jax.sharding.get_abstract_mesh()
  rows = axis_over(mesh, "data", qkv.shape[0])
  columns = axis_over(mesh, "model", heads)
  on_one = functools.partial(
    call, kernel, heads // mesh.shape[columns] if columns else heads, interpret, parts
  )
  if not mesh.auto_axes:
    return on_one(qkv, *more)
  spec = P(rows, None, columns)
  return jax.shard_map(
    on_one,
    in_specs=(spec,) * (1 + len(more)),
    out_specs=spec,
    axis_names=set(mesh.auto_axes),
    check_vma=False,
  )(qkv, *more)


def axis_over(mesh, name: str, length: int) -> str | None:
  """The axis of that name, where the partitioner splits arrays over it and it divides the length.
  None: every device computes all."""
  return name if name in mesh.auto_axes and length % mesh.shape[name] == 0 else None


# ------------------------------------------------------------------------------------------
# on one device


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def call(kernel, heads: int, interpret: bool, parts: int, qkv, *more):
  """`run` on one device."""
  B, N, columns = qkv.shape
  width = columns // (3 * heads)
  together = group(N, heads, width)

  def block(parts):
    return pl.BlockSpec((1, N, parts * together * width), lambda b, i: (b, 0, i))

  return pl.pallas_call(
    functools.partial(kernel, heads=together, width=width),
    grid=(B, heads // together),
    in_specs=[block(3), *[block(1)] * len(more)],
    out_specs=block(parts),
    out_shape=jax.ShapeDtypeStruct(
      (B, N, parts * heads * width),
      qkv.dtype,
      manual_axis_type=jax.typeof(qkv).manual_axis_type,  # within a shard_map of the caller's
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"),
      vmem_limit_bytes=max(vmem_needed(N, heads, width, qkv.dtype.itemsize), ALWAYS),
    ),
    interpret=interpret,
    name=kernel.__name__,
  )(qkv, *more)


def group(tokens: int, heads: int, width: int) -> int:
  """Heads a program: the fewest whose columns are whole rows of registers, and that have the work
  of 512 rows, beside which a program's start is little; else all."""
  for count in range(1, heads):
    whole = count * width % LANES == 0
    if heads % count == 0 and whole and count * tokens >= 512:
      return count
  return heads


def forward_kernel(qkv_ref, out_ref, *, heads: int, width: int):
  for head in range(heads):
    q, k, v = (columns(qkv_ref, 3 * head + part, width) for part in range(3))
    exponentials, total = softmax(q, k)
    out = dot(exponentials.astype(v.dtype), v, 1, 0) / total
    put(out_ref, head, width, out)


def backward_kernel(qkv_ref, g_ref, out_ref, *, heads: int, width: int):
  """With E the exponentials, t their sums and g the gradient of the output: that of the logits is E
  (g v^T - sum of E g v^T / t) / t, where g, not E, is divided by t."""
  scale = width**-0.5
  for head in range(heads):
    q, k, v = (columns(qkv_ref, 3 * head + part, width) for part in range(3))
    exponentials, total = softmax(q, k)
    g = columns(g_ref, head, width)
    g = (g.astype(jnp.float32) / total).astype(g.dtype)
    d_weights = dot(g, v, 1, 1)
    inner = (exponentials * d_weights).sum(axis=-1, keepdims=True) / total
    d_logits = (exponentials * (d_weights - inner)).astype(q.dtype)
    put(out_ref, 3 * head, width, scale * dot(d_logits, k, 1, 0))
    put(out_ref, 3 * head + 1, width, scale * dot(d_logits, q, 0, 0))
    put(out_ref, 3 * head + 2, width, dot(exponentials.astype(g.dtype), g, 0, 0))


def softmax(q, k):
  """Exponentials [N, N] of the logits, less the largest of their row, and the sum of each row."""
  products = dot(q, k, 1, 1)
  largest = products.max(axis=-1, keepdims=True)
  exponentials = jnp.exp(q.shape[-1] ** -0.5 * (products - largest))
  return exponentials, exponentials.sum(axis=-1, keepdims=True)


def dot(a, b, of_a: int, of_b: int):
  """Product over the dimensions of_a and of_b of two matrices, float32."""
  contracted = ((of_a,), (of_b,)), ((), ())
  # jax_default_matmul_precision is of float32; products of bfloat16 numbers are exact in it
  precision = lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
  return lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def columns(ref, i: int, width: int):
  return ref[0, :, i * width : (i + 1) * width]


def put(ref, i: int, width: int, x):
  ref[0, :, i * width : (i + 1) * width] = x.astype(ref.dtype)
