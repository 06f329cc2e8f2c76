"""InfoNCE over a global batch without ever holding its [B, B] logits: block by block, around a ring
of devices.

Each device keeps its B / n rows of one side. The rows of the other side travel along the mesh axis
`data` from device to device, together with what has been summed up for them so far (ring attention,
Liu et al. 2023; for contrastive losses Inf-CL, Cheng et al. 2024). At every stop, blocks of at most
BLOCK x BLOCK logits are computed once and serve both directions: rows keep a running maximum and
sum of exponentials, and columns carry theirs along until they are back on their own device. The
backward pass goes around once more with the finished logarithms, from which the gradient of every
block follows (as in FlashAttention, Dao et al. 2022). A device holds O(B E / n) numbers and a few
blocks, never O(B^2), and not even the whole other side, O(B E).
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
  identity = {
    "row": jnp.arange(1, len(a) + 1),  # 0: rows that fill up a block
    "subject": subject,
    "valid": valid > 0,
  }
  x = scale * a
  dtype = jnp.promote_types(x.dtype, b.dtype)
  own, rows, columns, hit = sums(x.astype(dtype), b.astype(dtype), identity)
  return (1 - b_to_a) * rows + b_to_a * columns - own, hit


@jax.custom_vjp
def sums(x, y, identity):
  """With s = x y^T: own s_ii, log sum_k e^{s_ik}, log sum_k e^{s_ki} and whether s_ii is above all
  other s_ik, each [B].

  Args:
    x, y: [B, E].
    identity: row, subject and valid of each row (`info_nce`), which say who is compared with whom.
  """
  return on_each_device(forward, x, y, identity)


def sums_forward(x, y, identity):
  own, rows, columns, hit = sums(x, y, identity)
  saved = x, y, identity, rows, columns
  return (own, rows, columns, hit), saved


def sums_backward(saved, cotangents):
  d_own, d_rows, d_columns, _ = cotangents
  d_x, d_y = on_each_device(backward, *saved, d_own, d_rows, d_columns)
  return d_x, d_y, None


sums.defvjp(sums_forward, sums_backward)


def on_each_device(function, *args):
  """function(devices, send, *args) on every device of the mesh axis `data`, over its own rows of
  arrays [B, ...].

  Without a mesh, or with one device along `data`, all rows are own ones. Along other axes all is
  replicated.
  """
  devices = jax.sharding.get_abstract_mesh().shape.get("data", 1)

  def keep(tree):
    return tree

  if devices == 1:
    return function(1, keep, *args)
  to_next = [(i, (i + 1) % devices) for i in range(devices)]

  def send(tree):
    return jax.lax.ppermute(tree, "data", to_next)

  on_device = functools.partial(function, devices, send)
  on_devices = jax.shard_map(on_device, in_specs=P("data"), out_specs=P("data"))
  return on_devices(*args)


# Below, `mine` are the rows of x that stay on this device, `theirs` those of y that travel; `rows`
# and `columns` is what is summed up for each of them.


def forward(devices, send, x, y, identity):
  """`sums` of this device's rows."""

  def visit(theirs, columns, mine, rows):
    logits, pair, others = compare(mine, theirs)  # [I, J] each
    own, largest, total = rows
    own += jnp.where(pair, logits, 0).sum(axis=1)
    columns = add(columns, logits, others, axis=0)
    largest, total = add((largest, total), logits, others, axis=1)
    return columns, (own, largest, total)

  mine = in_blocks({"z": x, **identity})
  theirs = in_blocks({"z": y, **identity})
  zero = jnp.zeros_like(mine["z"][..., 0])
  lowest = jnp.full_like(zero, jnp.finfo(zero.dtype).min)
  # the maximum over the others, and the sum of exponentials relative to it
  rows = zero, lowest, zero  # own logit first
  columns = lowest, zero
  rows, columns = go_round(devices, send, visit, mine, rows, theirs, columns)
  own, row_largest, row_total = rows
  column_largest, column_total = columns

  def log_sum(largest, total):  # over the others and oneself
    return jnp.logaddexp(own, largest + jnp.log(total))

  hit = own > row_largest
  row_sum = log_sum(row_largest, row_total)
  column_sum = log_sum(column_largest, column_total)
  return out_of_blocks((own, row_sum, column_sum, hit), len(x))


def backward(devices, send, x, y, identity, rows, columns, d_own, d_rows, d_columns):
  """The gradients with respect to this device's x and y [B / n, E], from those with respect to the
  first three of `sums`, of which `rows` and `columns` are the second and third."""

  def visit(theirs, d_theirs, mine, d_mine):
    logits, pair, others = compare(mine, theirs)  # [I, J] each
    d_sum, log_sum, d_own = (mine[name][:, None] for name in ("d_sum", "log_sum", "d_own"))
    # the gradient of log sum e^s is the softmax e^(s - log sum e^s)
    of_rows = d_sum * jnp.exp(logits - log_sum)
    of_columns = theirs["d_sum"] * jnp.exp(logits - theirs["log_sum"])
    of_sums = jnp.where(pair | others, of_rows + of_columns, 0)
    d_logits = of_sums + jnp.where(pair, d_own, 0)
    d_theirs = d_theirs + dot("ij,ie->je", d_logits, mine["z"])
    d_mine = d_mine + dot("ij,je->ie", d_logits, theirs["z"])
    return d_theirs, d_mine

  mine = {"z": x, "log_sum": rows, "d_sum": d_rows, "d_own": d_own}
  theirs = {"z": y, "log_sum": columns, "d_sum": d_columns}
  mine = in_blocks(mine | identity)
  theirs = in_blocks(theirs | identity)
  zero = jnp.zeros_like(mine["z"])
  gradients = go_round(devices, send, visit, mine, zero, theirs, zero)
  return out_of_blocks(gradients, len(x))


def go_round(devices, send, visit, mine, rows, theirs, columns):
  """Brings every block of `mine` together with every block of all devices' `theirs`.

  Args:
    visit: (theirs, columns, mine, rows), a block of each -> columns, rows.
    rows, columns: what is kept for each row, at the start.

  Returns: rows and columns at the end, both of this device's own rows.
  """

  def all_of_mine(rows, travelling):
    """Takes one block of theirs past all of mine."""
    their_block, columns = travelling

    def one_of_mine(columns, staying):
      my_block, rows = staying
      return visit(their_block, columns, my_block, rows)

    columns, rows = jax.lax.scan(one_of_mine, columns, (mine, rows))
    return rows, columns

  def one_stop(state, _):
    rows, theirs, columns = state
    rows, columns = jax.lax.scan(all_of_mine, rows, (theirs, columns))
    theirs, columns = send((theirs, columns))
    return (rows, theirs, columns), None

  start = rows, theirs, columns
  (rows, _, columns), _ = jax.lax.scan(one_stop, start, length=devices)
  return rows, columns


def compare(mine, theirs):
  """Logits [I, J] of two blocks, which of them are of one row with itself, and which of rows that
  are compared otherwise."""
  pair = mine["row"][:, None] == theirs["row"]
  same_ids = mine["subject"][:, None] == theirs["subject"]  # [I, J, 2]
  same = same_ids.all(axis=-1)  # so is a row to itself
  others = ~same & mine["valid"][:, None] & theirs["valid"]
  logits = dot("ie,je->ij", mine["z"], theirs["z"])
  return logits, pair, others


def add(running, logits, others, axis):
  """Takes a block's logits into the running maximum and the sum of exponentials relative to it."""
  largest, total = running
  lowest = jnp.finfo(logits.dtype).min
  of_block = logits.max(axis, where=others, initial=lowest)
  new = jnp.maximum(largest, of_block)
  exponentials = jnp.exp(logits - jnp.expand_dims(new, axis))
  terms = jnp.where(others, exponentials, 0)
  total = total * jnp.exp(largest - new)  # relative to the new maximum
  return new, total + terms.sum(axis)


def in_blocks(tree):
  """Rows [R, ...] -> [blocks, rows of a block, ...], the last filled up with zeros: no row, and not
  valid."""
  rows = len(jax.tree.leaves(tree)[0])
  count = math.ceil(rows / BLOCK)
  size = math.ceil(rows / count)

  def cut(x):
    padding = [(0, count * size - rows)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(count, size, *x.shape[1:])

  return jax.tree.map(cut, tree)


def out_of_blocks(tree, rows: int):
  """The way back: the first `rows` rows [R, ...] of blocks."""

  def join(x):
    return x.reshape(-1, *x.shape[2:])[:rows]

  return jax.tree.map(join, tree)
