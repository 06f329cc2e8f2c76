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
    fitting = [n for n in range(1, rows + 1) if rows % n == 0]
    shown = ", ".join(map(str, fitting[:8])) + (", ..." if len(fitting) > 8 else "")
    raise UserError(
      f"config.accumulation is {parts!r}, and of {batch} rows of a batch {rows} lie on each of "
      f"{shards} "
      f"devices of the mesh's data axis; expected a divisor of {rows}: {shown}"
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

    whole, _ = jax.eval_shape(forward, params, statistics, batch)
    part, _ = jax.eval_shape(forward_part, params, statistics, 0)
    axes = []
    for shapes in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
      axes.append(rows_axis(*shapes))
    smooth, given = leaves_that_count(loss, whole)

    def chosen_leaves(params, statistics, k):
      """The leaves that the loss reads of part k, those that take a gradient first."""
      seen, statistics = forward_part(params, statistics, k)
      leaves = jax.tree.leaves(seen)
      return [leaves[i] for i in smooth], ([leaves[i] for i in given], statistics)

    # 1. The outputs of all parts.
    def look(statistics, k):
      outputs, (others, statistics) = chosen_leaves(params, statistics, k)
      return statistics, outputs + others

    _, stacks = jax.lax.scan(look, statistics, jnp.arange(parts))
    known = {}
    for i, stack in zip(smooth + given, stacks, strict=True):
      known[i] = join(stack, axes[i])

    # 2. The loss of the whole batch, and its gradient with respect to the outputs.
    def loss_of(outputs):
      leaves = known | dict(zip(smooth, outputs, strict=True))
      return loss(*filled(whole, leaves))

    outputs = [known[i] for i in smooth]
    (value, metrics), wanted = jax.value_and_grad(loss_of, has_aux=True)(outputs)

    # 3. That gradient taken back to the parameters, part after part.
    def learn(carry, k):
      gradient, statistics = carry
      _, pull, (_, statistics) = jax.vjp(
        lambda params: chosen_leaves(params, statistics, k), params, has_aux=True
      )
      rows = [cut(x, axes[i], parts, k) for i, x in zip(smooth, wanted, strict=True)]
      [more] = pull(rows)
      return (jax.tree.map(jnp.add, gradient, more), statistics), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (gradient, statistics), _ = jax.lax.scan(learn, (zeros, statistics), jnp.arange(parts))
    return (value, metrics), statistics, gradient

  return compute


def leaves_that_count(loss, whole) -> tuple[list[int], list[int]]:
  """Which leaves of `whole`, shapes of (outputs, batch), the loss reads: those that gradients flow
  into, and those of which the values are enough (of the batch itself, and integers)."""
  shapes = jax.tree.leaves(whole)
  outputs = len(jax.tree.leaves(whole[0]))
  smooth, given = [], []
  for i in which_are_read(loss, *whole):
    differentiable = i < outputs and jnp.issubdtype(shapes[i].dtype, jnp.inexact)
    (smooth if differentiable else given).append(i)
  return smooth, given


def filled(shapes, leaves: dict[int, jax.Array]):
  """A tree of these shapes, of `leaves` by their number and zeros for the others."""
  flat, structure = jax.tree.flatten(shapes)
  arrays = []
  for i, shape in enumerate(flat):
    arrays.append(leaves[i] if i in leaves else jnp.zeros(shape.shape, shape.dtype))
  return structure.unflatten(arrays)


def cut(x, axis: int | None, parts: int, k):
  """Rows k, k + parts, ... of x; of what has no rows, a share that adds up to x over the parts."""
  if axis is None:
    return x / parts
  x = x.reshape(*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
  return jax.lax.dynamic_index_in_dim(x, k, axis + 1, keepdims=False)


def join(stack, axis: int | None):
  """What `cut` took apart, from all parts [parts, ...]."""
  if axis is None:
    return stack.mean(axis=0).astype(stack.dtype)
  x = jnp.moveaxis(stack, 0, axis + 1)
  return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])


def rows_axis(whole, part) -> int | None:
  """The axis along which the outputs of a whole batch and of a part of it differ in length, or
  None."""
  differing = []
  for axis, (length, part_length) in enumerate(zip(whole.shape, part.shape, strict=True)):
    if length != part_length:
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
