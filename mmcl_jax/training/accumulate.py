"""Loss and gradient of a whole batch, computed in parts one after the other (GradCache, Gao et al.
2021).

A contrastive loss compares every row with every other, so the mean over parts is another loss with
fewer negatives, and its gradient another gradient. Here

  1. the model runs over part after part, and only the outputs that the objectives read are kept;
  2. the objectives look at the outputs of the whole batch, and give the gradient with respect to
  them; 3. the model runs over every part again, and takes that gradient back to the parameters.

Activations are those of one part at a time; the price is one more forward pass. Loss, metrics and
gradient are those of the whole batch: random keys belong to samples, so that both passes, and any
number of parts, see the same augmentation, masks and dropped paths.

Batch norm is the exception: each part is normalised by its own statistics (ghost batch norm, Hoffer
et al. 2017), and the running statistics take one update a part, in order. The gradient is then
exactly that of this computation.

Part k of n is the rows k, k + n, k + 2n, ...: every device cuts its own rows, and nothing travels
for it. Augmentation is done part by part, twice, so that no device ever holds the whole batch in
float32. The partitioner sums the gradient over the devices once a part.
"""

import jax
import jax.numpy as jnp

from mmcl_jax.errors import UserError


def check(parts: int, batch: int, mesh) -> None:
  """Raises a UserError where `parts` (config.accumulation) does not divide the rows that each
  device has."""
  shards = mesh.shape.get("data", 1)
  rows = batch // shards
  if not isinstance(parts, int) or parts < 1 or rows % parts:
    divisors = [str(n) for n in range(1, rows + 1) if rows % n == 0]
    shown = ", ".join(divisors[:8])
    if len(divisors) > 8:
      shown += ", ..."
    raise UserError(
      f"config.accumulation is {parts!r}, and of {batch} rows of a batch {rows} lie on each of "
      f"{shards} devices of the mesh's data axis; expected a divisor of {rows}: {shown}"
    )


def value_and_grad(forward, loss, parts: int):
  """(params, statistics, batch) -> (loss, metrics), statistics, gradient with respect to params.

  Args:
    forward: (params, statistics, rows of the batch) -> (outputs, what else the loss sees of the
      batch), statistics. Leaves have one axis of rows, any; one that has none, such as a
        temperature, counts as its mean over the parts.
    loss: what `forward` gives for the whole batch, two arguments -> loss [], metrics.
    parts: how many, 2 or more.
  """

  def compute(params, statistics, batch):
    check(parts, len(jax.tree.leaves(batch)[0]), jax.sharding.get_abstract_mesh())

    def forward_part(params, statistics, k):
      rows = jax.tree.map(lambda x: cut(x, 0, parts, k), batch)
      return forward(params, statistics, rows)

    shapes, _ = jax.eval_shape(forward, params, statistics, batch)
    shapes_of_part, _ = jax.eval_shape(forward_part, params, statistics, 0)
    axes = rows_axes(shapes, shapes_of_part)
    differentiated, constant = leaves_that_count(loss, shapes)

    def leaves_of_part(params, statistics, k):
      """The leaves that the loss reads of part k, those that take a gradient first."""
      outputs, statistics = forward_part(params, statistics, k)
      leaves = jax.tree.leaves(outputs)
      constants = [leaves[i] for i in constant]
      return [leaves[i] for i in differentiated], (constants, statistics)

    # 1. The outputs of all parts.
    stacks = run_parts(leaves_of_part, params, statistics, parts)
    leaves = {}  # of the whole batch, by their number
    for i, stack in zip(differentiated + constant, stacks, strict=True):
      leaves[i] = join(stack, axes[i])

    # 2. The loss of the whole batch, and its gradient with respect to the outputs.
    (value, metrics), cotangents = loss_and_cotangents(loss, shapes, leaves, differentiated)

    # 3. That gradient taken back to the parameters, part after part.
    def cotangents_of_part(k):
      rows = []
      for i, cotangent in zip(differentiated, cotangents, strict=True):
        rows.append(cut(cotangent, axes[i], parts, k))
      return rows

    statistics, gradient = pull_back(leaves_of_part, params, statistics, cotangents_of_part, parts)
    return (value, metrics), statistics, gradient

  return compute


def run_parts(leaves_of_part, params, statistics, parts: int):
  """The leaves of every part, stacked [parts, ...]."""

  def run_part(statistics, k):
    outputs, (constants, statistics) = leaves_of_part(params, statistics, k)
    return statistics, outputs + constants

  _, stacks = jax.lax.scan(run_part, statistics, jnp.arange(parts))
  return stacks


def loss_and_cotangents(loss, shapes, leaves: dict[int, jax.Array], differentiated: list[int]):
  """(loss, metrics) of the whole batch, and the gradient with respect to the leaves of these
  numbers."""

  def loss_of(outputs):
    replaced = dict(zip(differentiated, outputs, strict=True))
    return loss(*filled(shapes, leaves | replaced))

  outputs = [leaves[i] for i in differentiated]
  return jax.value_and_grad(loss_of, has_aux=True)(outputs)


def pull_back(leaves_of_part, params, statistics, cotangents_of_part, parts: int):
  """The batch statistics after all parts, and the gradient with respect to params, summed over
  them."""

  def pull_back_part(carry, k):
    gradient, statistics = carry

    def outputs_of(params):
      return leaves_of_part(params, statistics, k)

    _, to_params, (_, statistics) = jax.vjp(outputs_of, params, has_aux=True)
    (gradient_of_part,) = to_params(cotangents_of_part(k))
    gradient = jax.tree.map(jnp.add, gradient, gradient_of_part)
    return (gradient, statistics), None

  zeros = jax.tree.map(jnp.zeros_like, params)
  (gradient, statistics), _ = jax.lax.scan(pull_back_part, (zeros, statistics), jnp.arange(parts))
  return statistics, gradient


def leaves_that_count(loss, shapes) -> tuple[list[int], list[int]]:
  """Which leaves of (outputs, batch) the loss reads, by their numbers: those that take a gradient,
  and those of which the values are enough (of the batch itself, and integers)."""
  leaves = jax.tree.leaves(shapes)
  outputs, _ = shapes
  count = len(jax.tree.leaves(outputs))
  differentiated, constant = [], []
  for i in which_are_read(loss, *shapes):
    if i < count and jnp.issubdtype(leaves[i].dtype, jnp.inexact):
      differentiated.append(i)
    else:
      constant.append(i)
  return differentiated, constant


def filled(shapes, leaves: dict[int, jax.Array]):
  """A tree of these shapes, of `leaves` by their number and zeros for the others."""
  flat, structure = jax.tree.flatten(shapes)
  arrays = []
  for i, shape in enumerate(flat):
    x = leaves[i] if i in leaves else jnp.zeros(shape.shape, shape.dtype)
    arrays.append(x)
  return structure.unflatten(arrays)


def cut(x, axis: int | None, parts: int, k):
  """Rows k, k + parts, ... of x; of what has no rows, a share that adds up to x over the parts."""
  if axis is None:
    return x / parts
  before, rows, after = split_shape(x.shape, axis)
  x = x.reshape(*before, rows // parts, parts, *after)
  return jax.lax.dynamic_index_in_dim(x, k, axis + 1, keepdims=False)


def join(stack, axis: int | None):
  """What `cut` took apart, from all parts [parts, ...]."""
  if axis is None:
    return stack.mean(axis=0).astype(stack.dtype)
  parts, *shape = stack.shape
  before, rows, after = split_shape(shape, axis)
  x = jnp.moveaxis(stack, 0, axis + 1)
  return x.reshape(*before, rows * parts, *after)


def split_shape(shape, axis: int):
  """Lengths before an axis, its own, lengths after it."""
  return shape[:axis], shape[axis], shape[axis + 1 :]


def rows_axes(shapes, shapes_of_part) -> list[int | None]:
  """`rows_axis` of every leaf."""
  axes = []
  for pair in zip(jax.tree.leaves(shapes), jax.tree.leaves(shapes_of_part), strict=True):
    axes.append(rows_axis(*pair))
  return axes


def rows_axis(whole, part) -> int | None:
  """The axis along which the outputs of a whole batch and of a part of it differ in length, or
  None."""
  differing = []
  lengths = zip(whole.shape, part.shape, strict=True)
  for axis, (of_whole, of_part) in enumerate(lengths):
    if of_whole != of_part:
      differing.append(axis)
  if len(differing) > 1:
    raise UserError(
      f"config.accumulation is above 1, and the model makes an output of shape {whole.shape} in "
      "which several axes depend on the number of rows; expected one axis of rows; set "
      "config.accumulation=1"
    )
  return differing[0] if differing else None


def which_are_read(function, *args) -> list[int]:
  """The leaves of args (their shapes) that `function` computes anything from."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  read = {id(x) for x in jaxpr.outvars}
  for equation in jaxpr.eqns:
    read.update(id(x) for x in equation.invars)
  return [i for i, x in enumerate(jaxpr.invars) if id(x) in read]
