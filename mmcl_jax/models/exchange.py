"""The dtype in which devices exchange the gradients of matrices and convolutions.

A model that computes in bfloat16 rounds its float32 parameters before it uses them. The gradient of
a rounded parameter is in bfloat16 as well, and left alone, the partitioner sums it over the devices
in that. A layer that uses its parameters by `rounded` has each device's gradient turned into
float32 first, or not, as config.gradient_dtype says (`gradients_in`).
"""

import contextlib
import contextvars

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from mmcl_jax.errors import UserError

DTYPES = ("float32", "bfloat16")
DTYPE = contextvars.ContextVar("dtype", default="float32")


@contextlib.contextmanager
def gradients_in(dtype: str):
  """Layers that are traced within exchange their gradients in `dtype` of DTYPES."""
  token = DTYPE.set(dtype)
  try:
    yield
  finally:
    DTYPE.reset(token)


def check(config) -> None:
  """Raises a UserError where config.gradient_dtype is unknown, or narrower than config.model.dtype,
  in which gradients are computed."""
  dtype = config.gradient_dtype
  if dtype not in DTYPES:
    raise UserError(f"config.gradient_dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
  if dtype == "bfloat16" and config.model.dtype != dtype:
    raise UserError(
      f"config.gradient_dtype is bfloat16, and config.model.dtype is {config.model.dtype}; "
      "expected bfloat16 there too, or config.gradient_dtype=float32"
    )


def narrow() -> bool:
  """Whether gradients stay in the dtype of the computation, rather than that of the parameters."""
  return DTYPE.get() == "bfloat16"


def rounded(layer, x, *params):
  """layer(x, *params) with the parameters in the dtype of x; rows of x [B, ...] lie over `data`.

  Every device computes the gradient of its rows in that dtype, and the devices sum it in the
  parameters' own. Where `data` does not divide B, they sum it as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  devices = mesh.shape.get("data", 1)
  wider = [p for p in params if jnp.finfo(p.dtype).bits > jnp.finfo(x.dtype).bits]
  if narrow() or not wider or devices == 1 or x.shape[0] % devices:
    return layer(x, *in_dtype(params, x.dtype))

  @jax.custom_vjp
  def call(x, *params):
    return layer(x, *in_dtype(params, x.dtype))

  def forward(x, *params):
    return call(x, *params), (x, params)

  def backward(saved, g):
    x, params = saved
    used = in_dtype(params, x.dtype)
    _, to_x = jax.vjp(lambda x: layer(x, *used), x)

    def of_rows(x, g, *used):
      # they differ from device to device from here on, or JAX would sum their gradients at once
      used = [lax.pcast(p, "data", to="varying") for p in used]
      _, to_params = jax.vjp(lambda *used: layer(x, *used), *used)
      gradients = [gradient.astype(p.dtype) for gradient, p in zip(to_params(g), params)]
      return lax.psum(gradients, "data")

    on_each_device = jax.shard_map(
      of_rows,
      in_specs=(P("data"), P("data"), *[P()] * len(used)),
      out_specs=P(),
      axis_names={"data"},
    )
    return *to_x(g), *on_each_device(x, g, *used)

  call.defvjp(forward, backward)
  return call(x, *params)


def in_dtype(params, dtype) -> list:
  return [p.astype(dtype) for p in params]


def conv(convolve=lax.conv_general_dilated) -> dict:
  """What makes flax's Conv use its kernel by `rounded`, and its bias as it is; convolve: as lax has
  it."""

  def keep_kernel(x, kernel, bias, dtype):
    return x.astype(dtype), kernel, bias

  def by_rounded(x, kernel, *args, **more):
    return rounded(lambda x, kernel: convolve(x, kernel, *args, **more), x, kernel)

  return dict(promote_dtype=keep_kernel, conv_general_dilated=by_rounded)
