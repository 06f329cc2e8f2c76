"""FLOPs of a training step, counted in the traced program."""

import math

from jax.interpreters import partial_eval


def matmul_flops(jaxpr) -> int:
  """FLOPs of the matrix products and convolutions of a traced step, in all devices together; 2 a
  multiply-add.

  Unlike the compiler's count it is of the step as written: loops count as often as they run,
  nothing that is computed twice because it is not split. What no output needs counts for nothing;
  what remat computes again counts again. A `while` of unknown length counts once.

  Args:
    jaxpr: `jax.jit(step).trace(...).jaxpr`.
  """
  needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
  return flops_of(needed)


def flops_of(jaxpr) -> int:
  """matmul_flops of all that stands in a jaxpr."""
  total = 0
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name = eqn.primitive.name
    if name == "dot_general":
      total += dot_flops(eqn)
    elif name == "conv_general_dilated":
      total += convolution_flops(eqn)
    else:
      total += inner_flops(eqn)
  return total


def dot_flops(eqn) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval
  out = eqn.outvars[0].aval
  return 2 * out.size * math.prod(left.shape[i] for i in contracted)


def convolution_flops(eqn) -> int:
  kernel = eqn.invars[1].aval
  numbers = eqn.params["dimension_numbers"]
  # multiply-adds of one output; in groups already divided
  taps = kernel.size // kernel.shape[numbers.rhs_spec[0]]
  # dilation puts zeros in between
  return 2 * eqn.outvars[0].aval.size * taps // math.prod(eqn.params["lhs_dilation"])


def inner_flops(eqn) -> int:
  """Of an operation that holds others: of a loop as often as it runs, of a branch the largest."""
  inner = []
  for value in eqn.params.values():
    inner += [flops_of(jaxpr) for jaxpr in subjaxprs(value)]
  name = eqn.primitive.name
  if name == "cond":
    return max(inner, default=0)
  if name == "scan":
    return eqn.params["length"] * sum(inner)
  if name == "pallas_call":
    return math.prod(eqn.params["grid_mapping"].grid) * sum(inner)
  if name == "shard_map":
    # newly_manual_axes in jax 0.10
    axes = next(value for key, value in eqn.params.items() if key.endswith("manual_axes"))
    return math.prod(eqn.params["mesh"].shape[axis] for axis in axes) * sum(inner)
  return sum(inner)


def subjaxprs(value) -> list:
  values = value if isinstance(value, (tuple, list)) else [value]
  return [x for x in values if hasattr(getattr(x, "jaxpr", x), "eqns")]
