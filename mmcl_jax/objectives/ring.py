"""InfoNCE over a global batch whose [B, B] logits nobody holds: block by block, and round the
devices.

A device keeps its B / n rows of one side. The other side's rows go round the mesh axis `data`, each
with what it has summed up so far (ring attention, Liu et al. 2023; for contrastive losses Inf-CL,
Cheng et al. 2024). Where the two meet, blocks of at most BLOCK x BLOCK logits are computed once and
serve both directions: rows keep a running maximum and sum of exponentials, columns take theirs
along and come home with it. The backward pass goes round once more with the finished logarithms,
from which every block's gradient follows (as in FlashAttention, Dao et al. 2022). A device holds
O(B E / n) and a few blocks, never O(B^2) and not even the whole other side, O(B E).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

BLOCK = 1024  # rows at most, of either side: 4 MiB of float32 logits, enough work for a matrix unit

dot = functools.partial(jnp.einsum, precision="highest")


def info_nce(a, b, scale, subject, valid, b_to_a: float = 0.5) -> tuple[jax.Array, jax.Array]:
  """`contrastive.info_nce` among the rows that `contrastive.may_compare` allows: same values, hits
  and gradients.

  Args:
    a, b: [B, E] of unit length, at least float32.
    scale: 1 / temperature.
    subject: [B, 2]; two rows of one subject are not compared.
    valid: [B], 0 for rows that do not count.
    b_to_a: share of the direction in which each b looks for its own a.

  Returns: values [B]; rank-one hits [B].
  """
  # 0: rows that fill up a block
  who = {"row": jnp.arange(1, len(a) + 1), "subject": subject, "valid": valid > 0}
  x = scale * a
  dtype = jnp.promote_types(x.dtype, b.dtype)
  own, rows, columns, hit = sums(x.astype(dtype), b.astype(dtype), who)
  return (1 - b_to_a) * rows + b_to_a * columns - own, hit


@jax.custom_vjp
def sums(x, y, who):
  """With s = x y^T: own s_ii, log sum_k e^{s_ik}, log sum_k e^{s_ki} and whether s_ii is above all
  other s_ik, each [B]."""
  return on_own_rows(forward, x, y, who)


def sums_forward(x, y, who):
  own, rows, columns, hit = sums(x, y, who)
  return (own, rows, columns, hit), (x, y, who, rows, columns)


def sums_backward(kept, cotangents):
  return *on_own_rows(backward, *kept, *cotangents[:3]), None


sums.defvjp(sums_forward, sums_backward)


def on_own_rows(function, *args):
  """function(devices, send, *args) on every device of the mesh axis `data`, over its own rows of
  arrays [B, ...].

  Without a mesh, or with one device along `data`, all rows are own ones. Along other axes all is
  replicated.
  """
  devices = jax.sharding.get_abstract_mesh().shape.get("data", 1)
  if devices == 1:
    return function(1, lambda tree: tree, *args)
  neighbours = [(i, (i + 1) % devices) for i in range(devices)]

  def send(tree):
    return jax.lax.ppermute(tree, "data", neighbours)

  on_device = functools.partial(function, devices, send)
  return jax.shard_map(on_device, in_specs=P("data"), out_specs=P("data"))(*args)


def forward(devices, send, x, y, who):
  """`sums` of this device's rows."""

  def of_blocks(theirs, columns, mine, rows):
    logits, pair, others = compare(mine, theirs)
    own, *rows = rows
    own += jnp.where(pair, logits, 0).sum(axis=1)
    columns = add(columns, logits, others, axis=0)
    rows = add(rows, logits, others, axis=1)
    return columns, (own, *rows)

  mine, theirs = blocks({"z": x, **who}), blocks({"z": y, **who})
  zero = jnp.zeros_like(mine["z"][..., 0])
  # maximum, sum of exponentials relative to it
  nobody = jnp.full_like(zero, jnp.finfo(zero.dtype).min), zero
  start = (zero, *nobody)
  (own, *rows), columns = go_round(devices, send, of_blocks, mine, start, theirs, nobody)

  # of others and oneself
  def log_sum(largest, total):
    return jnp.logaddexp(own, largest + jnp.log(total))

  hit = own > rows[0]
  return joined((own, log_sum(*rows), log_sum(*columns), hit), len(x))


def backward(devices, send, x, y, who, rows, columns, to_own, to_rows, to_columns):
  """The gradients with respect to this device's x and y [B / n, E]; `to_own` ... are those with
  respect to `sums`."""

  def of_blocks(theirs, d_theirs, mine, d_mine):
    logits, pair, others = compare(mine, theirs)
    of_rows = mine["to"][:, None] * jnp.exp(logits - mine["log_sum"][:, None])
    of_columns = theirs["to"] * jnp.exp(logits - theirs["log_sum"])
    softmax = jnp.where(pair | others, of_rows + of_columns, 0)
    d_logits = softmax + jnp.where(pair, mine["to_own"][:, None], 0)
    d_theirs = d_theirs + dot("ij,ie->je", d_logits, mine["z"])
    d_mine = d_mine + dot("ij,je->ie", d_logits, theirs["z"])
    return d_theirs, d_mine

  mine = blocks({"z": x, "log_sum": rows, "to": to_rows, "to_own": to_own, **who})
  theirs = blocks({"z": y, "log_sum": columns, "to": to_columns, **who})
  zero = jnp.zeros_like(mine["z"])
  gradients = go_round(devices, send, of_blocks, mine, zero, theirs, zero)
  return joined(gradients, len(x))


def go_round(devices, send, of_blocks, mine, rows, theirs, columns):
  """Takes every block of `mine` with every block of everybody's `theirs`.

  Args:
    of_blocks: (theirs, columns, mine, rows), a block of each -> columns, rows.
    rows, columns: what is kept for each row, at the start.

  Returns: rows and columns at the end, both of this device's own rows.
  """

  def visit(state, _):
    rows, theirs, columns = state

    def one_block(rows, block):
      theirs, columns = block

      def with_one_of_mine(columns, own_block):
        return of_blocks(theirs, columns, *own_block)

      columns, rows = jax.lax.scan(with_one_of_mine, columns, (mine, rows))
      return rows, columns

    rows, columns = jax.lax.scan(one_block, rows, (theirs, columns))
    return (rows, *send((theirs, columns))), None

  (rows, _, columns), _ = jax.lax.scan(visit, (rows, theirs, columns), length=devices)
  return rows, columns


def compare(mine, theirs):
  """Logits of two blocks, which of them are of one row with itself, and which of rows that are
  compared otherwise."""
  pair = mine["row"][:, None] == theirs["row"]
  same = (mine["subject"][:, None] == theirs["subject"]).all(axis=-1)  # so is a row to itself
  others = ~same & mine["valid"][:, None] & theirs["valid"]
  logits = dot("ie,je->ij", mine["z"], theirs["z"])
  return logits, pair, others


def add(running, logits, others, axis):
  """Takes a block's logits into the running maximum and the sum of exponentials relative to it."""
  largest, total = running
  lowest = jnp.finfo(logits.dtype).min
  new = jnp.maximum(largest, logits.max(axis, where=others, initial=lowest))
  terms = jnp.where(others, jnp.exp(logits - jnp.expand_dims(new, axis)), 0)
  return new, total * jnp.exp(largest - new) + terms.sum(axis)


def blocks(tree):
  """Rows [R, ...] -> [blocks, rows of a block, ...], the last filled up with zeros: no row, and not
  valid."""
  rows = len(jax.tree.leaves(tree)[0])
  count = math.ceil(rows / BLOCK)
  size = math.ceil(rows / count)

  def in_blocks(x):
    padding = [(0, count * size - rows)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

  return jax.tree.map(in_blocks, tree)


def joined(tree, rows: int):
  """The way back: the first `rows` rows [R, ...] of blocks."""

  def in_rows(x):
    return x.reshape(-1, *x.shape[2:])[:rows]

  return jax.tree.map(in_rows, tree)
