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
      f"config.accumulation is {parts!r}, and of {batch} rows of a batch {rows} lie on each of {shards} "
      f"devices of the mesh's data axis; expected a divisor of {rows}: {shown}"
    )


def value_and_grad(forward, loss, parts: int):
  """(params, statistics, batch) -> (loss, metrics), statistics, gradient with respect to params.

  Args:
    forward: (params, statistics, rows of the batch) -> (outputs, what else the loss sees of the
      batch), statistics. Leaves have one axis of rows, any; one that has none, such as a
        temperature, counts as its mean over the parts.
    loss: what `forward` gives for the whole batch, two arguments -> loss [], metrics.
    parts: how many; 1 keeps all activations and runs the model once.
  """
  return at_once(forward, loss) if parts == 1 else in_parts(forward, loss, parts)


def at_once(forward, loss):
  def compute(params, statistics, batch):
    def of(params):
      seen, after = forward(params, statistics, batch)
      value, metrics = loss(*seen)
      return value, (metrics, after)

    (value, (metrics, after)), gradient = jax.value_and_grad(of, has_aux=True)(params)
    return (value, metrics), after, gradient

  return compute


def in_parts(forward, loss, parts: int):
  def compute(params, statistics, batch):
    check(parts, len(jax.tree.leaves(batch)[0]), jax.sharding.get_abstract_mesh())

    def of_part(batch, k):
      return jax.tree.map(lambda x: cut(x, 0, parts, k), batch)

    whole, _ = jax.eval_shape(forward, params, statistics, batch)
    part, _ = jax.eval_shape(
      lambda *args: forward(*args[:2], of_part(args[2], 0)), params, statistics, batch
    )
    axes = [
      rows_axis(*shapes)
      for shapes in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True)
    ]
    shapes, structure = jax.tree.flatten(whole)
    read = which_are_read(loss, *whole)
    # Gradients flow into outputs that are read; of the batch itself, and of integers, the values
    # are enough.
    outputs = len(jax.tree.leaves(whole[0]))
    smooth = [i for i in read if i < outputs and jnp.issubdtype(shapes[i].dtype, jnp.inexact)]
    given = [i for i in read if i not in smooth]

    def run(params, statistics, k):
      seen, statistics = forward(params, statistics, of_part(batch, k))
      leaves = jax.tree.leaves(seen)
      return [leaves[i] for i in smooth], ([leaves[i] for i in given], statistics)

    def look(statistics, k):
      found, (also, statistics) = run(params, statistics, k)
      return statistics, found + also

    _, stacks = jax.lax.scan(look, statistics, jnp.arange(parts))
    known = {i: join(x, axes[i]) for i, x in zip(smooth + given, stacks, strict=True)}

    def judge(found):
      leaves = known | dict(zip(smooth, found, strict=True))
      return loss(
        *structure.unflatten(
          leaves.get(i, jnp.zeros(x.shape, x.dtype)) for i, x in enumerate(shapes)
        )
      )

    (value, metrics), wanted = jax.value_and_grad(judge, has_aux=True)([known[i] for i in smooth])

    def learn(carry, k):
      gradient, statistics = carry
      _, pull, (_, statistics) = jax.vjp(
        lambda params: run(params, statistics, k), params, has_aux=True
      )
      [more] = pull([cut(x, axes[i], parts, k) for i, x in zip(smooth, wanted, strict=True)])
      return (jax.tree.map(jnp.add, gradient, more), statistics), None

    (gradient, statistics), _ = jax.lax.scan(
      learn, (jax.tree.map(jnp.zeros_like, params), statistics), jnp.arange(parts)
    )
    return (value, metrics), statistics, gradient

  return compute


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
  differing = [
    i
    for i, lengths in enumerate(zip(whole.shape, part.shape, strict=True))
    if lengths[0] != lengths[1]
  ]
  if len(differing) > 1:
    raise UserError(
      f"config.accumulation is above 1, and the model makes an output of shape {whole.shape} in which several "
      "axes depend on the number of rows; expected one axis of rows; set config.accumulation=1"
    )
  return differing[0] if differing else None


def which_are_read(function, *args) -> list[int]:
  """The leaves of args (their shapes) that `function` computes anything from."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  read = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {
    id(x) for x in jaxpr.outvars
  }
  return [i for i, x in enumerate(jaxpr.invars) if id(x) in read]
